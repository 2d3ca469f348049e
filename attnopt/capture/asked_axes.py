"""Whether the dynamic axes that a user asks for are axes of the example inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.export import ShapesCollection

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.dynamic_axes import is_variadic, named_arguments
from attnopt.errors import CaptureError

_EXAMPLE = '{"x": {0: torch.export.Dim.DYNAMIC}}'


def require_axes(forward: Callable[..., object], inputs: CallInputs, asked: object) -> None:
    """Raises CaptureError for inputs and axes that there are not, and for what is not torch.export's notation: it ignores some
    of it, and tells of the rest as if the model could not be captured."""
    if asked is None or isinstance(asked, ShapesCollection):
        return
    named, _ = named_arguments(forward, *inputs)
    if isinstance(asked, (list, tuple)):
        asked = dict(zip(named, asked, strict=False))
    if not isinstance(asked, Mapping):
        raise CaptureError(
            f"invalid value dynamic_shapes={asked!r}", hint=f'use "auto", None, or a mapping such as {_EXAMPLE}'
        )
    unknown = [] if is_variadic(forward) else [str(name) for name in asked if name not in named]
    if unknown:
        raise CaptureError(
            f"dynamic_shapes names unknown inputs {', '.join(unknown)}; the inputs are {', '.join(named)}",
            hint="use the names of the example inputs",
        )
    for name, x in named.items():
        _require(name, x, asked.get(name))


def _require(name: str, x: object, asked: object) -> None:
    if asked is None:
        return
    if isinstance(x, Tensor):
        _require_of_tensor(name, x, asked)
    elif isinstance(x, (list, tuple)) and isinstance(asked, (list, tuple)):
        for i, (of_x, of_asked) in enumerate(zip(x, asked, strict=False)):
            _require(f"{name}[{i}]", of_x, of_asked)
    elif isinstance(x, Mapping) and isinstance(asked, Mapping):
        for key, of_x in x.items():
            _require(f"{name}[{key!r}]", of_x, asked.get(key))


def _require_of_tensor(name: str, x: Tensor, asked: object) -> None:
    sizes = dict(enumerate(asked)) if isinstance(asked, (list, tuple)) else asked
    if not isinstance(sizes, Mapping):
        raise CaptureError(f"dynamic_shapes of {name} is {asked!r}, not a mapping from axes", hint=f"write {_EXAMPLE}")
    for axis, size in sizes.items():
        if axis not in range(x.dim()):
            raise CaptureError(
                f"dynamic_shapes names axis {axis!r} of {name}, which has {x.dim()} axes",
                hint="number the axes from 0",
            )
        if isinstance(size, (str, float, bool)):
            raise CaptureError(
                f"dynamic_shapes of {name}: axis {axis} is {size!r}", hint=f"write {_EXAMPLE}, or torch.export.Dim(...)"
            )
