"""Patterns of tokens on a grid: neighbourhoods in one, two or three dimensions, and tokens beside the grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnopt.base.intervals import Ranges, Reach, common, merged
from attnopt.base.options import choice, switches, whole, whole_tuple
from attnopt.errors import PolicyError
from attnopt.patterns.algebra import Pattern

T = TypeVar("T")
Box = tuple[tuple[int, int], ...]  # first and last coordinate along each axis


@dataclass(frozen=True, repr=False, init=False)
class Neighborhood(Pattern):
    """Tokens on a grid, in row-major order, see the keys around them (NATTEN, arXiv:2204.07143; GNA, arXiv:2504.16922).

    Along every axis, query c of n sees a window of ``kernel`` keys around the leader of its group of ``stride``
    queries, ``c // stride * stride + stride // 2``; an even kernel has one more key before the leader than after it.
    ``dilation``: only tokens with the same remainder count, so a window spans ``kernel * dilation`` tokens.
    ``causal``: the window ends at the query, and starts where that of the last query in the group does.
    ``edge``: at the border, the window is shifted inside ("shift") or clipped ("clip").
    ``kernel``, ``stride``, ``dilation`` and ``causal`` are one value for all axes, or one per axis.  Positions beyond
    the grid see nothing.  Raises PolicyError.
    """

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    edge: str

    def __init__(
        self,
        grid: int | Sequence[int],
        kernel: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        edge: str = "shift",
    ) -> None:
        owner = "Neighborhood"
        sizes = whole_tuple(owner, "grid", grid, None, least=1)
        if not 1 <= len(sizes) <= 3:
            raise PolicyError(f"{owner}: invalid value grid={grid!r}: expected one, two or three sizes")
        values: dict[str, Any] = {"grid": sizes}
        for option, given in (("kernel", kernel), ("stride", stride), ("dilation", dilation)):
            values[option] = whole_tuple(owner, option, given, len(sizes), least=1)
        if any(s > k for s, k in zip(values["stride"], values["kernel"], strict=True)):
            raise PolicyError(
                f"{owner}: stride={stride!r} is larger than kernel={kernel!r}",
                hint="some queries would not see themselves; use a stride no larger than the kernel",
            )
        values["causal"] = switches(owner, "causal", causal, len(sizes))
        values["edge"] = choice(owner, "edge", edge, ("shift", "clip"))
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def lengths(self) -> range:
        return range(prod(self.grid), prod(self.grid) + 1)

    @property
    def is_causal(self) -> bool:
        return all(c or k == 1 or n == 1 for c, k, n in zip(self.causal, self.kernel, self.grid, strict=True))

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        tokens = prod(self.grid)
        seen = (i >= 0) & (i < tokens) & (j >= 0) & (j < tokens)
        for axis, size in enumerate(self.grid):
            inner = prod(self.grid[axis + 1 :])
            query, key = i // inner % size, j // inner % size
            dilation = self.dilation[axis]
            start, stop = self._window(axis, query)
            seen = seen & (key // dilation >= start) & (key // dilation < stop)
            if dilation > 1:
                seen = seen & (query % dilation == key % dilation)
        return seen

    def beyond(self, i: Tensor, kv_len: int) -> Tensor | None:
        if self.edge != "clip" or any(self.causal):
            return None
        inside = torch.ones_like(i)
        for axis, size in enumerate(self.grid):
            place = i // prod(self.grid[axis + 1 :]) % size
            start, stop = self._window(axis, place)
            dilation = self.dilation[axis]
            alike = (size - place % dilation + dilation - 1) // dilation  # tokens that dilated windows count
            inside = inside * (_smaller(stop, alike) - _larger(start, 0))
        is_token = (i >= 0) & (i < prod(self.grid))
        return torch.where(is_token, prod(self.kernel) - inside, 0)

    def order(self, q_len: int) -> NDArray[np.int64]:
        """Tile by tile: a tile of queries shares more keys than a row.  With dilation, by remainder first."""
        sides = np.meshgrid(*(np.arange(n) for n in self.grid), indexing="ij")
        tile = min(_tiles(len(self.grid)), key=lambda t: prod(a + k - 1 for a, k in zip(t, self.kernel, strict=True)))
        within = [side // d for side, d in zip(sides, self.dilation, strict=True)]
        keys = (
            *(side % d for side, d in zip(sides, self.dilation, strict=True)),
            *(w // t for w, t in zip(within, tile, strict=True)),
            *(w % t for w, t in zip(within, tile, strict=True)),
        )
        order = np.lexsort([key.reshape(-1) for key in reversed(keys)])
        return np.concatenate([order[order < q_len], np.arange(order.size, q_len)])

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        tokens = prod(self.grid)
        boxes = _boxes(max(0, first), min(last, tokens - 1), self.grid)
        some = merged(r for box in boxes for r in _flat([self._some(*side) for side in enumerate(box)], self.grid))
        if first < 0 or last >= tokens:
            return Reach(all=(), some=some)
        sure = (_flat([self._sure(*side) for side in enumerate(box)], self.grid) for box in boxes)
        return Reach(all=reduce(common, sure), some=some)

    def neighbours(self, tile: tuple[int, ...]) -> Iterator[Pattern]:
        """Strides that share tiles, and kernels aligned with tiles."""
        sizes = tile if len(tile) == len(self.grid) else (1,) * (len(self.grid) - 1) + tile
        options = []
        for n, kernel, stride, size in zip(self.grid, self.kernel, self.stride, sizes, strict=True):
            shared = {s for s in (stride, size // 2, size) if stride <= s <= kernel}
            whole = {(s, kernel + (s - kernel) % (2 * size)) for s in shared}
            options.append(sorted({(s, kernel) for s in shared} | {(s, k) for s, k in whole if k <= n}))
        for chosen in product(*options):
            strides, kernels = zip(*chosen, strict=True)
            yield Neighborhood(self.grid, kernels, strides, self.dilation, self.causal, self.edge)

    def box(self, tile: int | Sequence[int] | None) -> tuple[int, ...]:
        dimensions = len(self.grid)
        sizes = {1: 64, 2: 8, 3: 4}[dimensions] if tile is None else tile
        return whole_tuple("tile", "sizes", sizes, dimensions, least=1)

    def box_share(self, box: tuple[int, ...]) -> float:
        """Such kernels store the tokens of a box contiguously (NATTEN's "token permutation", arXiv:2504.16922)."""
        axes = zip(self.grid, self.kernel, self.stride, self.dilation, self.causal, strict=True)
        lines = (
            Neighborhood(n, k, s, d, c, self.edge).layout(n, n, t, t)
            for (n, k, s, d, c), t in zip(axes, box, strict=True)
        )
        return prod(line.visits for line in lines)

    def __repr__(self) -> str:
        values = {"grid": self.grid, "kernel": self.kernel, "stride": self.stride, "dilation": self.dilation}
        usual = {"stride": 1, "dilation": 1, "causal": False, "edge": "shift"}
        shown = {name: _short(value) for name, value in (*values.items(), ("causal", self.causal))} | {
            "edge": self.edge
        }
        if len(self.grid) > 1:
            shown["grid"] = self.grid
        told = (f"{name}={value!r}" for name, value in shown.items() if name not in usual or value != usual[name])
        return f"Neighborhood({', '.join(told)})"

    def _window(self, axis: int, coordinate: Any) -> tuple[Any, Any]:
        """Start and stop of the window of a query (an int or a tensor), counted within its remainder class."""
        kernel, stride, dilation = self.kernel[axis], self.stride[axis], self.dilation[axis]
        place, size = coordinate, self.grid[axis]
        if dilation > 1:
            place, size = coordinate // dilation, (size - coordinate % dilation + dilation - 1) // dilation
        if self.causal[axis]:
            leader = _smaller(place // stride * stride + stride - 1, size - 1)
            return leader - kernel + 1, place + 1
        start = place // stride * stride + stride // 2 - kernel // 2
        if self.edge == "shift":
            start = _larger(_smaller(start, size - kernel), 0)
        return start, start + kernel

    def _keys(self, axis: int, coordinate: int) -> Ranges:
        """What the query at this coordinate sees along one axis."""
        start, stop = self._window(axis, coordinate)
        size, dilation = self.grid[axis], self.dilation[axis]
        rest = coordinate % dilation
        start, stop = max(start, 0), min(stop, (size - rest + dilation - 1) // dilation)
        if dilation == 1:
            return merged([(start, stop)])
        return tuple((rest + dilation * place, rest + dilation * place + 1) for place in range(start, stop))

    def _some(self, axis: int, side: tuple[int, int]) -> Ranges:
        first, last = side
        dilation = self.dilation[axis]
        if last - first + 1 < dilation or first == last:
            return merged(r for c in range(first, last + 1) for r in self._keys(axis, c))
        start = min(r[0] for c in range(first, first + dilation) for r in self._keys(axis, c)[:1])
        stop = max(r[1] for c in range(last - dilation + 1, last + 1) for r in self._keys(axis, c)[-1:])
        return ((start, stop),)

    def _sure(self, axis: int, side: tuple[int, int]) -> Ranges:
        first, last = side
        if first != last and self.dilation[axis] > 1:
            return ()  # neighbours are of different remainders
        return common(self._keys(axis, first), self._keys(axis, last))


@dataclass(frozen=True, repr=False)
class Prefix(Pattern):
    """The first ``n`` tokens (class token, registers) see all tokens and are visible to all; the others follow
    ``rest``.

    In ``rest``, the first token after the prefix is at position 0.
    """

    n: int
    rest: Pattern

    def __post_init__(self) -> None:
        whole("Prefix", "n", self.n)
        if not isinstance(self.rest, Pattern):
            raise PolicyError(f"Prefix: invalid value rest={self.rest!r}: expected a pattern")

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return (self.rest,)

    @property
    def lengths(self) -> range | None:
        rest = self.rest.lengths
        return None if rest is None else range(rest.start + self.n, rest.stop + self.n)

    @property
    def is_causal(self) -> bool:
        return self.n == 0 and self.rest.is_causal

    @property
    def is_positional(self) -> bool:
        return True

    def for_head(self, place: int) -> Pattern:
        return Prefix(self.n, self.rest.for_head(place))

    def for_heads(self, places: Sequence[int]) -> Pattern:
        return Prefix(self.n, self.rest.for_heads(places))

    def at_length(self, kv_len: int) -> Pattern:
        return Prefix(self.n, self.rest.at_length(kv_len - self.n))

    def beyond(self, i: Tensor, kv_len: int) -> Tensor | None:
        rest = self.rest.beyond(i - self.n, kv_len - self.n)
        return None if rest is None else torch.where((i >= 0) & (i < self.n), 0, rest)

    def order(self, q_len: int) -> NDArray[np.int64] | None:
        rest = self.rest.order(max(0, q_len - self.n))
        return None if rest is None else np.concatenate([np.arange(min(self.n, q_len)), rest + self.n])

    def neighbours(self, tile: tuple[int, ...]) -> Iterator[Pattern]:
        return (Prefix(self.n, changed) for changed in self.rest.neighbours(tile))

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return ((i >= 0) & (i < self.n)) | (j < self.n) | self.rest.visible(i - self.n, j - self.n)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        before, everything = ((0, self.n),), ((0, kv_len),)
        if first >= 0 and last < self.n:
            return Reach(all=everything, some=everything)
        start = max(first, self.n) if first >= 0 else first
        rest = self.rest.reach(start - self.n, last - self.n, max(0, kv_len - self.n)).moved(self.n)
        touched = first < self.n and last >= 0
        return Reach(merged((*before, *rest.all)), everything if touched else merged((*before, *rest.some)))


def _tiles(axes: int, queries: int = 32) -> list[tuple[int, ...]]:
    """The factorizations of ``queries``, a power of two, into powers of two, one per axis."""
    if axes == 1:
        return [(queries,)]
    sizes = [2**n for n in range(queries.bit_length())]
    return [(size, *rest) for size in sizes for rest in _tiles(axes - 1, queries // size)]


def _short(values: tuple[T, ...]) -> T | tuple[T, ...]:
    """One value instead of one per axis if all are equal."""
    return values[0] if len(set(values)) == 1 else values


def _boxes(first: int, last: int, grid: tuple[int, ...]) -> list[Box]:
    """The run of tokens from ``first`` to ``last`` as boxes of the grid; none if empty."""
    if first > last:
        return []
    if len(grid) == 1:
        return [((first, last),)]
    inner = prod(grid[1:])
    (top, left), (bottom, right) = divmod(first, inner), divmod(last, inner)
    if top == bottom:
        return [((top, top), *box) for box in _boxes(left, right, grid[1:])]
    head = [((top, top), *box) for box in _boxes(left, inner - 1, grid[1:])] if left else []
    tail = [((bottom, bottom), *box) for box in _boxes(0, right, grid[1:])] if right < inner - 1 else []
    whole_rows = (top + bool(head), bottom - bool(tail))
    middle: list[Box] = [(whole_rows, *((0, n - 1) for n in grid[1:]))] if whole_rows[0] <= whole_rows[1] else []
    return head + middle + tail


def _flat(sides: list[Ranges], grid: tuple[int, ...]) -> Ranges:
    """The tokens whose coordinate along every axis is in the ranges of that axis."""
    tokens, size = sides[-1], grid[-1]
    for ranges, length in zip(sides[-2::-1], grid[-2::-1], strict=True):
        if tokens == ((0, size),):
            tokens = tuple((start * size, stop * size) for start, stop in ranges)
        else:
            places = (c for start, stop in ranges for c in range(start, stop))
            tokens = tuple((c * size + start, c * size + stop) for c in places for start, stop in tokens)
        size *= length
    return merged(tokens)


def _smaller(a: Any, b: Any) -> Any:
    if not isinstance(a, Tensor):
        return min(a, b)
    return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)


def _larger(a: Any, b: int) -> Any:
    return a.clamp(min=b) if isinstance(a, Tensor) else max(a, b)
