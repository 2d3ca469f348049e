"""What every command shares: printing as text or JSON, a sign of life on stderr, and warnings as one line each."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from attnopt.errors import AttnoptError, AttnoptWarning

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnopt.cli_model import Named


def show(arguments: argparse.Namespace, data: Any, table: RenderableType) -> None:
    """``data`` as JSON where that was asked for, else the table."""
    from attnopt.tables import to_text

    if arguments.json:
        print(json.dumps(data, indent=2, ensure_ascii=False, default=str))
        return
    if not sys.stdout.isatty():
        print(to_text(table, width=160))  # a pipe has no width of its own
        return
    from rich.console import Console

    Console().print(table)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr where somebody watches."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def watched(what: str) -> Callable[[range], Iterable[int]]:
    """Steps with a progress bar on stderr where somebody watches."""

    def watch(steps: range) -> Iterable[int]:
        if not sys.stderr.isatty():
            return steps
        from rich.console import Console
        from rich.progress import track

        return track(steps, what, console=Console(stderr=True), transient=True)

    return watch


def resolved(name: str) -> Named:
    from attnopt.cli_model import resolve

    with working(f"loading {name}"):
        return resolve(name)


def require_model(name: str, named: Named, why: str) -> None:
    """AttnoptError for a saved model, or one without example inputs."""
    if named.saved is not None:
        raise AttnoptError(f"{name} is a saved model: {why}", hint="name the model that it was made from")
    if not named.args and not named.kwargs:
        raise AttnoptError(
            f"{name} gave a model without example inputs", hint="let it return (model, args) or (model, args, kwargs)"
        )


@contextlib.contextmanager
def warnings_told() -> Iterator[None]:
    """attnopt's own warnings as one line each; those of others as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", AttnoptWarning)
        as_before = warnings.showwarning

        def told(message: Any, category: type[Warning], *rest: Any, **options: Any) -> None:
            if issubclass(category, AttnoptWarning):
                print(f"attnopt: warning: {message}", file=sys.stderr)
            else:
                as_before(message, category, *rest, **options)

        warnings.showwarning = told
        yield
