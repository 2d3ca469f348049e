"""What every command shares: printing as text or JSON, and warnings as one line each."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attnopt.base.progress import working
from attnopt.errors import AttnoptError, AttnoptWarning

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnopt.cli.load_model import Named


def show(arguments: argparse.Namespace, data: object, table: RenderableType) -> None:
    """``data`` as JSON if requested, otherwise the table."""
    from attnopt.render.tables import to_text

    if arguments.json:
        print(json.dumps(data, indent=2, ensure_ascii=False, default=str))
        return
    if not sys.stdout.isatty():
        print(to_text(table, width=160))  # a pipe has no width
        return
    from rich.console import Console

    Console().print(table)


def resolved(arguments: argparse.Namespace, needs_sizes: bool = False) -> Named:
    """The model of the command.  ``needs_sizes``: the result depends on the sizes of an ONNX file's free axes."""
    from attnopt.cli.load_model import resolve
    from attnopt.cli.onnx_inputs import Given, require_onnx

    given = Given.of(arguments, needs_sizes)
    require_onnx(given, arguments.model)
    with working(f"loading {arguments.model}"):
        return resolve(arguments.model, given)


def require_model(name: str, named: Named, why: str) -> None:
    """AttnoptError for a saved model, or one without example inputs."""
    require_original(name, named, why)
    if not named.args and not named.kwargs:
        raise AttnoptError(
            f"{name} returned a model without example inputs",
            hint="make it return (model, args) or (model, args, kwargs)",
        )


def require_original(name: str, named: Named, why: str) -> None:
    """AttnoptError for a saved model."""
    if named.saved is not None:
        raise AttnoptError(f"{name} is a saved model: {why}", hint="pass the original model")


@contextlib.contextmanager
def warnings_told() -> Iterator[None]:
    """attnopt's own warnings as one line each; others unchanged."""
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
