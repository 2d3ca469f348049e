"""Whether the dynamic axes that a user asks for are axes of the example inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from attnopt.errors import CaptureError

_EXAMPLE = '{"x": {0: torch.export.Dim.DYNAMIC}}'


def require_notation(asked: object) -> None:
    """Raises CaptureError for what is no mapping or list, as torch.export takes them."""
    if not isinstance(asked, (Mapping, list, tuple)):
        raise CaptureError(
            f"invalid value dynamic_shapes={asked!r}", hint=f'use "auto", None, or a mapping such as {_EXAMPLE}'
        )


def require_axes(named: Mapping[str, object], asked: Mapping[str, object] | Sequence[object]) -> None:
    """Raises CaptureError for inputs and axes that there are not, and for what is no size: torch.export ignores some of it, and
    tells of the rest as if the model could not be captured.  ``named``: the example inputs, in the order of the call."""
    by_name = asked if isinstance(asked, Mapping) else dict(zip(named, asked, strict=False))
    if unknown := [str(name) for name in by_name if name not in named]:
        raise CaptureError(
            f"dynamic_shapes names unknown inputs {', '.join(unknown)}; the inputs are {', '.join(named)}",
            hint="use the names of the example inputs; those in **kwargs go by keyword",
        )
    for name, x in named.items():
        _require(name, x, by_name.get(name))


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
