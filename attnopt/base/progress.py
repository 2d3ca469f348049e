"""Progress of long jobs on stderr, if interactive."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
_shown: Progress | None = None  # the display of the outermost job; jobs inside it are further lines


@contextmanager
def working(what: str, steps: int | None = None) -> Iterator[Callable[[], None]]:
    """A line while the job runs, with a bar if the number of steps is known; call the result after each step."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    with _display() as display:
        task = display.add_task(what, total=steps)
        try:
            yield lambda: display.advance(task)
        finally:
            display.remove_task(task)


def watched(items: Collection[T], what: str) -> Iterator[T]:
    """``items``, with a bar."""
    with working(what, len(items)) as step:
        for item in items:
            yield item
            step()


@contextmanager
def _display() -> Iterator[Progress]:
    global _shown
    if _shown is not None:
        yield _shown
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as _shown:
        try:
            yield _shown
        finally:
            _shown = None
