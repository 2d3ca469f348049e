"""Single entries of a tensor computed by a graph, at sizes where the whole tensor would be too large."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from attnopt.graph.evaluate import evaluate, size_at
from attnopt.graph.interpreter import COMPUTED, Interpreter
from attnopt.graph.nodes import arg, aten, get_attr, is_number, is_state, run_call, value, wrap

_WHOLE = 1 << 20  # a tensor of at most this many elements is computed as a whole

Index = tuple[Tensor, ...]  # one index tensor per axis, which broadcast against each other


class UnsupportedError(Exception):
    """An operator of which no single entries can be computed."""


class InvalidSizesError(Exception):
    """The graph itself does not run at these sizes."""


class _Formal(Interpreter):
    """Sizes, and tensors that have a shape and no values."""

    def __init__(self, gm: fx.GraphModule, sizes: Mapping[Any, int]) -> None:
        super().__init__(gm)
        self.sizes, self.mode = sizes, FakeTensorMode(allow_non_fake_inputs=True)

    def leaf(self, node: fx.Node) -> Any:
        val = value(node)
        if node.op == "call_function" and not is_number(node):
            return COMPUTED
        if not isinstance(val, Tensor):
            return size_at(val, self.sizes)
        with self.mode:
            return torch.empty([size_at(s, self.sizes) for s in val.shape], dtype=val.dtype, device=val.device)

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        try:
            with self.mode:
                return target(*args, **kwargs)
        except (UnsupportedFakeTensorException, DynamicOutputShapeException, DataDependentOutputException) as e:
            raise UnsupportedError(str(e)) from e
        except NotImplementedError as e:
            raise UnsupportedError(str(e)) from e
        except Exception as e:
            raise InvalidSizesError(str(e)) from e


class Entries:
    """Entries of any node of ``gm``, with the graph's symbols at ``sizes`` and its inputs filled with ``fill``."""

    def __init__(self, gm: fx.GraphModule, sizes: Mapping[Any, int], fill: Any = None) -> None:
        self._gm, self._sizes, self._fill = gm, sizes, fill
        self._formal = _Formal(gm, sizes)
        self._whole: dict[fx.Node, Tensor] = {}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Raises InvalidSizesError for sizes at which the nodes above fail, UnsupportedError if unknown."""
        return tuple(self._formal(node).shape)

    def at(self, node: fx.Node, index: Index) -> Tensor:
        """The entries at ``index``, with as many axes, that broadcast to its shape.  Raises UnsupportedError."""
        found = self._at(node, index)
        ndim = max((i.dim() for i in index), default=0)
        return found.reshape((1,) * (ndim - found.dim()) + found.shape)

    def _at(self, node: fx.Node, index: Index) -> Tensor:
        if node.op == "get_attr" and not is_state(node):
            return _taken(get_attr(self._gm, str(node.target)).detach(), index)
        if node.op in ("placeholder", "get_attr"):
            if self._fill is None:
                raise UnsupportedError(f"depends on the input {node.name}")
            return torch.full((1,) * len(index), self._fill, dtype=value(node).dtype)
        if math.prod(self.shape(node)) <= _WHOLE:
            if node not in self._whole:
                self._whole[node] = evaluate(self._gm, node, self._sizes, self._fill)
            return _taken(self._whole[node], index)
        if node.target in _MOVES:
            return self._moved(node, index)
        if node.target in _MADE:
            return _MADE[node.target](self, node, index)
        if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _ALSO_POINTWISE:
            return self._each(node, index)
        raise UnsupportedError(f"entries of {node.target}")

    def _each(self, node: fx.Node, index: Index) -> Tensor:
        """Number by number: of each operand the entries that meet at ``index``."""
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self._operand(n, index))
        made: Tensor = run_call(node, args, {k: v for k, v in kwargs.items() if k != "memory_format"})
        return made

    def _operand(self, node: fx.Node, index: Index) -> Any:
        if not isinstance(value(node), Tensor):
            return size_at(value(node), self._sizes)
        sizes = self.shape(node)
        inner = index[len(index) - len(sizes) :]
        return self.at(node, tuple(torch.zeros_like(i) if n == 1 else i for i, n in zip(inner, sizes, strict=True)))

    def _moved(self, node: fx.Node, index: Index) -> Tensor:
        source = arg(node, 0)
        return self.at(source, _MOVES[node.target](self, node, index, self.shape(source)))

    def number(self, x: Any) -> Any:
        return size_at(value(x), self._sizes) if isinstance(x, fx.Node) else x


def _taken(x: Tensor, index: Index) -> Tensor:
    return x[index] if index else x


Move = Callable[[Entries, fx.Node, Index, tuple[int, ...]], Index]


def _reshaped(entries: Entries, node: fx.Node, index: Index, source: tuple[int, ...]) -> Index:
    place = torch.zeros((), dtype=torch.int64)
    for i, size in zip(index, entries.shape(node), strict=True):
        place = place * size + i
    found: list[Tensor] = []
    for size in reversed(source):
        found.append(place % size)
        place = place // size
    return tuple(reversed(found))


def _permuted(entries: Entries, node: fx.Node, index: Index, source: tuple[int, ...]) -> Index:
    order = [wrap(d, len(source)) for d in arg(node, 1)]
    return tuple(index[order.index(d)] for d in range(len(source)))


def _transposed(entries: Entries, node: fx.Node, index: Index, source: tuple[int, ...]) -> Index:
    named = node.target is aten.transpose.int
    a, b = (wrap(d, len(source)) for d in ((arg(node, 1), arg(node, 2)) if named else (-2, -1)))
    found = list(index)
    found[a], found[b] = found[b], found[a]
    return tuple(found)


def _unsqueezed(entries: Entries, node: fx.Node, index: Index, source: tuple[int, ...]) -> Index:
    axis = wrap(arg(node, 1), len(index))
    return (*index[:axis], *index[axis + 1 :])


def _expanded(entries: Entries, node: fx.Node, index: Index, source: tuple[int, ...]) -> Index:
    inner = index[len(index) - len(source) :]
    return tuple(torch.zeros_like(i) if n == 1 else i for i, n in zip(inner, source, strict=True))


def _repeated(entries: Entries, node: fx.Node, index: Index, source: tuple[int, ...]) -> Index:
    return tuple(i % n for i, n in zip(index[len(index) - len(source) :], source, strict=True))


def _selected(entries: Entries, node: fx.Node, index: Index, source: tuple[int, ...]) -> Index:
    axis = wrap(arg(node, 1), len(source))
    place = torch.tensor(wrap(entries.number(arg(node, 2)), source[axis]))
    return (*index[:axis], place, *index[axis:])


def _sliced(entries: Entries, node: fx.Node, index: Index, source: tuple[int, ...]) -> Index:
    axis = wrap(arg(node, 1, 0), len(source))
    start, step = entries.number(arg(node, 2)) or 0, entries.number(arg(node, 4, 1))
    start = min(max(start + source[axis] if start < 0 else start, 0), source[axis])
    return (*index[:axis], start + step * index[axis], *index[axis + 1 :])


def _flipped(entries: Entries, node: fx.Node, index: Index, source: tuple[int, ...]) -> Index:
    axes = {wrap(d, len(source)) for d in arg(node, 1)}
    return tuple(source[d] - 1 - i if d in axes else i for d, i in enumerate(index))


_RESHAPES = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip

_MOVES: dict[Any, Move] = {
    **dict.fromkeys(_RESHAPES, _reshaped),
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
    aten.t.default: _transposed,
    aten.mT.default: _transposed,
    aten.unsqueeze.default: _unsqueezed,
    aten.expand.default: _expanded,
    aten.expand_as.default: _expanded,
    aten.repeat.default: _repeated,
    aten.select.int: _selected,
    aten.slice.Tensor: _sliced,
    aten.flip.default: _flipped,
}
_ALSO_POINTWISE = {
    aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.type_as.default, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.contiguous.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.lift_fresh_copy.default, aten.fill.Scalar, aten.__and__.Tensor, aten.__or__.Tensor,
}  # fmt: skip


def _triangle(entries: Entries, node: fx.Node, index: Index) -> Tensor:
    diagonal = entries.number(arg(node, 1, 0))
    ahead = index[-1] - index[-2]
    kept = ahead <= diagonal if node.target is aten.tril.default else ahead >= diagonal
    found = entries.at(arg(node, 0), index)
    return torch.where(kept, found, torch.zeros((), dtype=found.dtype))


def _counted(entries: Entries, node: fx.Node, index: Index) -> Tensor:
    bounds = [entries.number(a) for a in node.args]
    start, step = (bounds[0] if len(bounds) > 1 else 0), (bounds[2] if len(bounds) > 2 else 1)
    return (start + step * index[0]).to(value(node).dtype)


def _constant(number: float | None) -> Callable[[Entries, fx.Node, Index], Tensor]:
    def of(entries: Entries, node: fx.Node, index: Index) -> Tensor:
        last = arg(node, 2 if node.target is aten.new_full.default else 1)
        filled = entries.number(last) if number is None else number
        return torch.full((1,) * len(index), filled, dtype=value(node).dtype)

    return of


def _joined(entries: Entries, node: fx.Node, index: Index) -> Tensor:
    parts, axis = arg(node, 0), wrap(arg(node, 1, 0), len(index))
    found: Tensor | None = None
    begin = 0
    for part in parts:
        size = entries.shape(part)[axis]
        here = (index[axis] >= begin) & (index[axis] < begin + size)
        inner = (*index[:axis], (index[axis] - begin).clamp(0, max(0, size - 1)), *index[axis + 1 :])
        if size:
            taken = entries.at(part, inner).to(value(node).dtype)
            found = taken if found is None else torch.where(here, taken, found)
        begin += size
    if found is None:
        raise UnsupportedError("entries of nothing")
    return found


def _stacked(entries: Entries, node: fx.Node, index: Index) -> Tensor:
    parts, axis = arg(node, 0), wrap(arg(node, 1, 0), len(index))
    inner = (*index[:axis], *index[axis + 1 :])
    found = entries.at(parts[0], inner)
    for place, part in enumerate(parts[1:], 1):
        found = torch.where(index[axis] == place, entries.at(part, inner), found)
    return found


def _indexed(entries: Entries, node: fx.Node, index: Index) -> Tensor:
    """``x[places]`` with adjacent index tensors."""
    source, given = arg(node, 0), list(arg(node, 1))
    named = [axis for axis, g in enumerate(given) if g is not None]
    places = [given[axis] for axis in named]
    if named != list(range(named[0], named[0] + len(named))) or any(value(p).dtype == torch.bool for p in places):
        raise UnsupportedError("entries of an index with gaps or of bools")
    sizes = entries.shape(source)
    width = max(len(entries.shape(p)) for p in places)
    at = index[named[0] : named[0] + width]
    found: list[Tensor] = []
    for axis, place in zip(named, places, strict=True):
        inner = entries._operand(place, at)
        found.append(torch.where(inner < 0, inner + sizes[axis], inner))
    return entries.at(source, (*index[: named[0]], *found, *index[named[0] + width :]))


_MADE: dict[Any, Callable[[Entries, fx.Node, Index], Tensor]] = {
    aten.tril.default: _triangle,
    aten.triu.default: _triangle,
    aten.arange.default: _counted,
    aten.arange.start: _counted,
    aten.arange.start_step: _counted,
    aten.full.default: _constant(None),
    aten.new_full.default: _constant(None),
    aten.zeros.default: _constant(0),
    aten.new_zeros.default: _constant(0),
    aten.ones.default: _constant(1),
    aten.new_ones.default: _constant(1),
    aten.cat.default: _joined,
    aten.stack.default: _stacked,
    aten.index.Tensor: _indexed,
}
