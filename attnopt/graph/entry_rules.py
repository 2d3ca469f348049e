"""How the entries of an operator's result come from those of its operands: one rule for each operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.fx.node import Target

from attnopt.graph.nodes import arg, aten, calls, is_call, value, wrap
from attnopt.graph.ops import Kind, of, rules

Index = tuple[Tensor, ...]  # one index tensor per axis, which broadcast against each other


class UnsupportedError(Exception):
    """An operator of which no single entries can be computed."""


class Entries(Protocol):
    """Entries of the nodes of a graph at given sizes."""

    def shape(self, node: fx.Node) -> tuple[int, ...]: ...

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]: ...

    def at(self, node: fx.Node, index: Index) -> Tensor: ...

    def operand(self, node: fx.Node, index: Index) -> Any: ...

    def number(self, x: Any) -> Any: ...


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


def _rolled(entries: Entries, node: fx.Node, index: Index, source: tuple[int, ...]) -> Index:
    shifts, axes = arg(node, 1), arg(node, 2, ())
    if not axes:
        raise UnsupportedError("entries of a roll of all axes at once")
    found = list(index)
    for shift, axis in zip(shifts, axes, strict=True):
        found[axis] = (found[axis] - entries.number(shift)) % source[axis]
    return tuple(found)


def _repeated_each(entries: Entries, node: fx.Node, index: Index, source: tuple[int, ...]) -> Index:
    times, axis = arg(node, 1), arg(node, 2, node.kwargs.get("dim"))
    if not isinstance(axis, int) or (isinstance(times, fx.Node) and isinstance(value(times), Tensor)):
        raise UnsupportedError("entries of a repetition of the flat tensor, or by a tensor")
    at = wrap(axis, len(source))
    return (*index[:at], index[at] // entries.number(times), *index[at + 1 :])


MOVES: dict[Target, Move] = rules(
    {
        Kind.RESHAPE: _reshaped,
        "squeeze": _reshaped,
        "unsqueeze": _unsqueezed,
        "permute": _permuted,
        "transpose t mT": _transposed,
        Kind.EXPAND: _expanded,
        "repeat": _repeated,
        "repeat_interleave": _repeated_each,
        "select": _selected,
        "slice": _sliced,
        "flip": _flipped,
        "roll": _rolled,
    }
)


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
        inner = entries.operand(place, at)
        found.append(torch.where(inner < 0, inner + sizes[axis], inner))
    return entries.at(source, (*index[: named[0]], *found, *index[named[0] + width :]))


def _index_selected(entries: Entries, node: fx.Node, index: Index) -> Tensor:
    axis = wrap(arg(node, 1), len(index))
    place = entries.at(arg(node, 2), (index[axis],))
    return entries.at(arg(node, 0), (*index[:axis], place, *index[axis + 1 :]))


def _piece(entries: Entries, node: fx.Node, index: Index) -> Tensor:
    """One part of a split tensor."""
    split, number = arg(node, 0), arg(node, 1)
    if not calls(split, _SPLITS):
        raise UnsupportedError(f"entries of one result of {split.target}")
    unbinds = is_call(split, aten.unbind.int)
    x, dim = arg(split, 0), arg(split, 1 if unbinds else 2, split.kwargs.get("dim", 0))
    axis = wrap(dim, len(entries.shape(x)))
    if unbinds:
        return entries.at(x, (*index[:axis], torch.tensor(number), *index[axis:]))
    before = sum(sizes[axis] for sizes in entries.shapes(split)[:number])
    return entries.at(x, (*index[:axis], index[axis] + before, *index[axis + 1 :]))


_SPLITS = of(Kind.SPLIT)


def _padded(entries: Entries, node: fx.Node, index: Index) -> Tensor:
    """A number around a tensor; ``pads`` are the widths before and after, from the last axis on."""
    x, pads = arg(node, 0), [entries.number(p) for p in arg(node, 1)]
    *mode, filled = (arg(node, 2, "constant"), arg(node, 3)) if is_call(node, aten.pad.default) else (arg(node, 2, 0),)
    if mode not in ([], ["constant"]):
        raise UnsupportedError(f"entries of a padding in the mode {mode[0]}")
    inner, inside = list(index), torch.tensor(True)
    for i, before in enumerate(pads[::2], 1):
        place, size = index[-i] - before, entries.shape(x)[-i]
        inside = inside & (place >= 0) & (place < size)
        inner[-i] = place.clamp(0, max(0, size - 1))
    found = entries.at(x, tuple(inner))
    return torch.where(inside, found, torch.tensor(entries.number(filled) or 0, dtype=found.dtype))


MADE: dict[Target, Callable[[Entries, fx.Node, Index], Tensor]] = rules(
    {
        Kind.TRIANGLE: _triangle,
        "arange": _counted,
        "full new_full": _constant(None),
        "zeros new_zeros": _constant(0),
        "ones new_ones": _constant(1),
        "cat": _joined,
        "stack": _stacked,
        "index": _indexed,
        "index_select": _index_selected,
        "getitem": _piece,
        Kind.PAD: _padded,
    }
)
NO_ENTRIES = {
    "split split_with_sizes chunk unbind tensor_split": "several tensors: getitem has the rule",
    "gather": "indices for each entry are not index arithmetic",
    "view_as_complex view_as_real": "a mask has no complex numbers",
}
