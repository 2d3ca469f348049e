"""Which model the command line means: ``package.module:factory``, a saved directory or an ONNX file."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.errors import AttnoptError

if TYPE_CHECKING:
    from torch import nn

    from attnopt.cli.onnx_inputs import Given

EXPECTED = "a model, (model, args) or (model, args, kwargs)"


@dataclass(frozen=True)
class Named:
    """A model with the example inputs to capture it with.  ``saved`` is the folder that it was loaded from, if any."""

    model: nn.Module
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = field(default_factory=dict)
    saved: Path | None = None


def resolve(name: str, given: Given) -> Named:
    """The model called ``name``, an ONNX file with the ``given`` inputs.  Raises AttnoptError if there is none."""
    if Path(name).is_dir():
        import attnopt

        return Named(attnopt.load(name), saved=Path(name))
    from attnopt.cli.onnx_inputs import example_inputs, further_inputs, is_onnx

    if is_onnx(name):
        from attnopt.onnx.load.load import opened

        own = example_inputs(Path(name), given)
        inputs = tuple(own.values())  # by position: a name in a file may not be an identifier
        return Named(opened(name, inputs, {}), inputs, dict(further_inputs(own, given)))
    if name.endswith(".ort"):
        raise AttnoptError(
            f"{name} is in ONNX Runtime's own format, which is not supported",
            hint="pass the .onnx file that it was converted from",
        )
    module_name, separator, attribute = name.partition(":")
    if not (separator and module_name and attribute):
        raise AttnoptError(
            f"{name!r} is not a model: there is no such folder, and it does not have the form package.module:factory",
            hint="pass for instance my_models:encoder, a folder that attnopt saved, or an .onnx file",
        )
    return _built(name, called(name))


def called(name: str) -> object:
    """What the function ``package.module:function`` returns.  Raises AttnoptError."""
    module_name, _, attribute = name.partition(":")
    function = _factory(module_name, attribute)
    try:
        return function()
    except Exception as error:
        raise AttnoptError(f"{name} failed: {_told(error)}") from error


def returned_batches(name: str) -> Iterable[Any]:
    """What the function ``package.module:function`` returns, if that may be batches.  Raises AttnoptError."""
    found = called(name)
    if not isinstance(found, Iterable) or isinstance(found, (str, Mapping)) or hasattr(found, "dtype"):
        raise AttnoptError(
            f"{name} returned {type(found).__name__}, expected an iterable of batches",
            hint="return a list of tensors, of tuples of args or of dicts of kwargs",
        )
    return found


def _factory(module_name: str, attribute: str) -> Callable[[], object]:
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None:
            raise AttnoptError(f"importing {module_name} failed: {_told(error)}") from error
        if not (module_name + ".").startswith(error.name + "."):
            raise AttnoptError(f"{module_name} needs a module that is not installed: {error.name}") from error
        raise AttnoptError(
            f"there is no module {error.name!r} in {here} or on the Python path",
            hint="name the module without .py" if module_name.endswith(".py") else None,
        ) from error
    except Exception as error:
        raise AttnoptError(f"importing {module_name} failed: {_told(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise AttnoptError(f"{module_name} has no {attribute!r}", hint=_alternatives(found))
        found = getattr(found, part)
    if not callable(found):
        raise AttnoptError(
            f"{module_name}:{attribute} is a {type(found).__name__}, expected a function without arguments"
        )
    return found  # type: ignore[no-any-return]


def _built(name: str, made: object) -> Named:
    from torch import nn

    if isinstance(made, nn.Module):
        return Named(made.eval())
    match made:
        case (nn.Module() as model, tuple() | list() as args):
            return Named(model.eval(), tuple(args))
        case (nn.Module() as model, tuple() | list() as args, dict() | None as kwargs):
            return Named(model.eval(), tuple(args), dict(kwargs or {}))
    got = (
        "(" + ", ".join(type(item).__name__ for item in made) + ")" if isinstance(made, tuple) else type(made).__name__
    )
    raise AttnoptError(f"{name} returned {got}, expected {EXPECTED}")


def _told(error: BaseException) -> str:
    """The error with the line of the user's code in which it came up."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _alternatives(module: object) -> str | None:
    import inspect

    names = [name for name, _ in inspect.getmembers(module, inspect.isfunction) if not name.startswith("_")]
    return f"it has {', '.join(names[:8])}" if names else None
