"""Dynamic axes of model inputs: the request, expressed per tensor under the name of its argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, fx, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from attnopt.base.object_fields import is_object
from attnopt.base.sizes import is_static
from attnopt.capture.asked_axes import require_axes, require_notation
from attnopt.graph.nodes import input_name

Axes = dict[int, object]
Asked = list[Axes | None]  # for each leaf of the inputs; None: it is in an object
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Auto:
    """The first ``axes`` axes of every tensor that the model allows to vary; None for all."""

    axes: int | None = None


def named_arguments(
    forward: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[dict[str, object], int]:
    """Every argument under a unique name, in call order, and the number of positional ones.

    Arguments in ``*args`` are called ``args_0``, ``args_1``, ...; those in ``**kwargs`` have their keyword."""
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(args)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    for i in range(len(args) - len(names)):
        name = f"{rest}_{i}"
        while name in kwargs or name in names:
            name += "_"
        names.append(name)
    return {**dict(zip(names, args, strict=True)), **kwargs}, len(args)


def is_variadic(forward: Callable[..., object]) -> bool:
    return any(p.kind in _VARIADIC for p in inspect.signature(forward).parameters.values())


def arguments_by_name(
    forward: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """The given arguments, in the order of torch.export: each keyword in ``**kwargs`` under its own name."""
    if is_variadic(forward):
        return named_arguments(forward, args, kwargs)[0]
    return dict(inspect.signature(forward).bind(*args, **kwargs).arguments)


@contextmanager
def plain_signature(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Iterator[None]:
    """Inside, ``forward`` names each argument of this call: torch.export supports no axes for ``**kwargs``."""
    if not is_variadic(model.forward):
        yield
        return
    named, positional = named_arguments(model.forward, args, kwargs)
    names, known = list(named), vars(model).get("forward")
    taken = ", ".join(("self", *names[:positional], *(("*",) if kwargs else ()), *names[positional:]))
    given = ", ".join((*names[:positional], *(f"{n}={n}" for n in names[positional:])))
    made: dict[str, object] = {}
    own = type(model)
    call = own.forward if known is None else lambda self, *a, **k: known(*a, **k)
    exec(
        f"def forward({taken}):\n    return _call_(self, {given})", {"_call_": call}, made
    )  # its code is its signature
    about = {"__module__": own.__module__, "__qualname__": own.__qualname__, "forward": made["forward"]}
    vars(model).pop("forward", None)
    model.__class__ = type(own.__name__, (own,), about)
    try:
        yield
    finally:
        model.__class__ = own
        if known is not None:
            model.forward = known


def asked_shapes(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], asked: Any) -> Any:
    """torch.export's notation for this call, with a name for each argument; ``asked`` is that notation or ``Auto``."""
    if isinstance(asked, Auto):
        return _automatic(model.forward, args, kwargs, asked)
    if isinstance(asked, ShapesCollection):
        asked = asked.dynamic_shapes(model, args, dict(kwargs))  # type: ignore[no-untyped-call]
    if asked is None:
        return None
    require_notation(asked)
    if is_variadic(model.forward):
        asked = _spread(model, args, kwargs, asked)
    require_axes(named_arguments(model.forward, args, kwargs)[0], asked)
    return asked


def _spread(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], asked: Any) -> dict[str, object]:
    """By the name of each argument, also of those in ``*args`` and ``**kwargs``."""
    parameters = inspect.signature(model.forward).parameters
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    if isinstance(asked, (tuple, list)):
        asked = dict(zip(bound, asked, strict=True))
    named, positional = named_arguments(model.forward, args, kwargs)
    spread: dict[str, object] = {}
    for name, shapes in asked.items():
        kind = parameters[name].kind if name in parameters else None
        if kind is inspect.Parameter.VAR_KEYWORD:
            spread.update(shapes or {})
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            first = positional - len(bound.get(name, ()))
            spread.update(zip(list(named)[first:positional], shapes or (), strict=bool(shapes)))
        else:
            spread[name] = shapes
    return {**dict.fromkeys(named), **spread}


def _automatic(
    forward: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object], auto: Auto
) -> object:
    def of(x: object) -> Any:
        if isinstance(x, Tensor):
            axes = x.dim() if auto.axes is None else min(auto.axes, x.dim())
            return dict.fromkeys(range(axes), Dim.AUTO)
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*map(of, x))
        if isinstance(x, (list, tuple)):
            return type(x)(of(i) for i in x)
        return {k: of(v) for k, v in x.items()} if isinstance(x, dict) else None

    if auto.axes == 0:
        return None
    return {name: of(x) for name, x in arguments_by_name(forward, args, kwargs).items()}


def axes_of_leaves(
    forward: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object], shapes: object
) -> Asked:
    """For every leaf of the inputs, the requested dynamic axes; none can be requested of a leaf in an object."""
    named, _ = named_arguments(forward, args, kwargs)
    if isinstance(shapes, (list, tuple)):
        shapes = dict(zip(inspect.signature(forward).bind(*args, **kwargs).arguments, shapes, strict=False))
    if not isinstance(shapes, Mapping):
        return list(_aligned(named, None))
    return [axes for name, x in named.items() for axes in _aligned(x, shapes.get(name))]


def _aligned(x: object, shapes: object) -> Iterator[Axes | None]:
    if is_object(x):
        yield from (None for _ in pytree.tree_leaves(x))
        return
    match x, shapes:
        case _, None:
            yield from _unasked(x)
        case Tensor(), Mapping():
            yield _varying(shapes.items())
        case Tensor(), [*sizes]:
            yield _varying(enumerate(sizes))
        case dict(), Mapping():
            for key, inner in x.items():
                yield from _aligned(inner, shapes.get(key))
        case ((list() | tuple()), [*parts]) if len(parts) == len(x):
            for inner, part in zip(x, parts, strict=True):
                yield from _aligned(inner, part)
        case _, [*parts] if len(parts) == len(leaves := pytree.tree_leaves(x)):
            for inner, part in zip(leaves, parts, strict=True):
                yield from _aligned(inner, part)
        case _:
            yield from _unasked(x)


def _unasked(x: object) -> Iterator[Axes | None]:
    for leaf in pytree.tree_leaves(x, is_leaf=is_object):
        yield from (None for _ in pytree.tree_leaves(leaf)) if is_object(leaf) else ({},)


def _varying(axes: Iterable[tuple[object, object]]) -> Axes:
    return {
        a: dim for a, dim in axes if isinstance(a, int) and not (dim is None or dim is Dim.STATIC or type(dim) is int)
    }


def without(
    shapes: Mapping[str, object], named: Mapping[str, object], fixed: set[tuple[int, int]]
) -> dict[str, object]:
    """``shapes`` of all arguments without these axes, by the number of the leaf outside of objects."""
    place = count()

    def of(x: object, asked: Any) -> Any:
        if is_object(x):
            return asked
        if isinstance(x, Tensor):
            leaf = next(place)
            return {a: dim for a, dim in asked.items() if (leaf, a) not in fixed} or None
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*map(of, x, asked))
        if isinstance(x, (list, tuple)):
            return type(x)(of(i, a) for i, a in zip(x, asked, strict=True))
        if isinstance(x, dict):
            return {k: of(v, asked[k]) for k, v in x.items()}
        for _ in outside(_unasked(x)):
            next(place)
        return asked

    found = {name: of(x, shapes[name]) for name, x in named.items()}
    return {name: found[name] for name in shapes}


def outside(asked: Iterable[Axes | None]) -> list[Axes]:
    """Of the leaves that are in no object."""
    return [axes for axes in asked if axes is not None]


def fixed_axes(inputs: Sequence[fx.Node], asked: Sequence[Axes]) -> tuple[str, ...]:
    """Requested axes of a graph's inputs that stayed static, as ``x[1] = 8``."""
    if len(inputs) != len(asked):
        return ()
    sizes = [(input_name(n), n.meta["val"].shape, axes) for n, axes in zip(inputs, asked, strict=True) if axes]
    return tuple(
        f"{name}[{axis}] = {shape[axis]}"
        for name, shape, axes in sizes
        for axis in axes
        if axis < len(shape) and is_static(shape[axis])
    )
