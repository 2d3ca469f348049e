"""Reading masks by evaluation: the values of a mask at many input sizes, and the pattern that equals it at all of them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import Tensor, fx

from attnopt.graph.entries import Entries, InvalidSizesError
from attnopt.graph.entry_rules import UnsupportedError
from attnopt.graph.evaluate import Sizes, inputs_behind, is_heavy, size_at, symbols, within
from attnopt.graph.nodes import ancestors, arg, calls, get_attr, is_number, is_state, is_tensor, operand, value
from attnopt.graph.ops import Kind, of
from attnopt.match.block_masks import blocks_in
from attnopt.match.mask_numbers import Lengths, Numbers, numbers_behind
from attnopt.patterns import Causal, Full, Pattern, Window

_WHOLE = 1 << 20  # a mask of at most this many entries is evaluated fully
_LINES = 48  # of a larger one, this many rows and columns
_SLICES = of(Kind.SLICE)  # one to the end is written with the largest number
_LOOKS_UP = of(
    Kind.SLICE, Kind.LOOKUP, Kind.EMBEDDING, Kind.RESHAPE, Kind.ONES, Kind.PERMUTE, Kind.EXPAND, Kind.COPY, Kind.CAST
)
_APART = 200.0  # a softmax ignores a score this far below another, both with room for their products
_FAR = 2048  # tokens over which a slow decay tells its rate


@dataclass(frozen=True, eq=False)
class Sample:
    """The values of tensors at one choice of sizes: ``values`` [..., rows, columns] of each.

    ``whole_rows``: every column is there.
    """

    q_len: int
    kv_len: int
    rows: Tensor
    columns: Tensor
    whole_rows: bool
    values: tuple[Tensor, ...]

    def of(self, pattern: Pattern, num_heads: int = 1) -> Tensor:
        """Which of these pairs are visible in ``pattern``: [1, rows, columns], or [num_heads, rows, columns] by head."""
        i, j = self.rows[:, None] + (self.kv_len - self.q_len), self.columns[None, :]
        heads = [pattern.for_head(h) for h in range(num_heads if pattern.is_per_head else 1)]
        return torch.stack([p.at_length(self.kv_len).visible(i, j) for p in heads])


def samples(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    lengths: Lengths | None = None,
    fill: float | None = None,
    smooth: bool = False,
) -> tuple[Sample, ...] | None:
    """The values of ``nodes``, whose last two axes are queries and keys, at the sizes of the example and at others.

    Independent sizes take different values, and lengths exceed every integer
    constant above the nodes.  None if that cannot be shown.  Inputs are filled with ``fill``.
    ``smooth``: as in ``numbers_behind``.
    """
    known = _KNOWN.setdefault(gm, _Known(gm))
    return known.samples(tuple(nodes), lengths or _lengths(nodes), fill, smooth)


def _lengths(nodes: Sequence[fx.Node]) -> Lengths:
    """The number of rows and of columns that the nodes broadcast to."""
    shapes = [(1, 1, *value(n).shape) for n in nodes]
    rows, columns = (next((s[axis] for s in shapes if _varies(s[axis])), 1) for axis in (-2, -1))
    return rows, columns


def _varies(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) or size != 1


class _Known:
    """Samples of one graph, shared by nodes that compute the same: every layer may have its own copy of a mask."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._number: dict[object, int] = {}
        self._entries: dict[object, Entries] = {}
        self._samples: dict[object, tuple[Sample, ...] | None] = {}

    def samples(
        self, nodes: tuple[fx.Node, ...], lengths: Lengths, fill: float | None, smooth: bool
    ) -> tuple[Sample, ...] | None:
        numbers: dict[fx.Node, int] = {}
        key = (*(self._structure(n, numbers) for n in nodes), *map(str, lengths), fill, smooth)
        if key not in self._samples:
            self._samples[key] = self._look(nodes, lengths, fill, smooth)
        return self._samples[key]

    def _structure(self, target: fx.Node, numbers: dict[fx.Node, int]) -> int:
        """Equal for nodes that compute the same."""
        stack = [target]
        while stack:
            node = stack[-1]
            waiting = [] if is_number(node) else [n for n in node.all_input_nodes if n not in numbers]
            if node in numbers or waiting:
                stack.extend(waiting) if node not in numbers else stack.pop()
                continue
            stack.pop()
            if is_number(node):
                key: object = str(value(node))
            elif node.op == "call_function":
                key = (node.target, str(fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{numbers[n]}")))
            else:
                key = (node.op, str(node.target))
            numbers[node] = self._number.setdefault(key, len(self._number))
        return numbers[target]

    def _look(
        self, nodes: tuple[fx.Node, ...], lengths: Lengths, fill: float | None, smooth: bool
    ) -> tuple[Sample, ...] | None:
        numbers = numbers_behind(nodes, lengths, smooth)
        if numbers is None:
            return None
        found: list[Sample] = []
        for choices, needed in _choices(self._gm.graph, lengths, numbers, _FAR if smooth else 0):
            valid = False
            for sizes in choices:
                try:
                    found += self._at(nodes, lengths, sizes, fill, numbers)
                    valid = True
                except (InvalidSizesError, RuntimeError, IndexError):
                    continue  # the model does not run at these sizes itself
                except (UnsupportedError, ValueError, TypeError):
                    return None
            if needed and choices and not valid:
                return None
        return tuple(found)

    def _at(
        self, nodes: tuple[fx.Node, ...], lengths: Lengths, sizes: Sizes, fill: float | None, numbers: Numbers
    ) -> Iterator[Sample]:
        key = (tuple(sizes.items()), fill)
        entries = self._entries.setdefault(key, Entries(self._gm, sizes, fill))
        q_len, kv_len = (size_at(s, sizes) for s in lengths)
        for rows, columns in _lines(q_len, kv_len, numbers):
            values = tuple(_lines_of(entries, n, rows, columns) for n in nodes)
            yield Sample(q_len, kv_len, rows, columns, len(columns) == kv_len, values)


_KNOWN: WeakKeyDictionary[fx.GraphModule, _Known] = WeakKeyDictionary()


def _lines(q_len: int, kv_len: int, numbers: Numbers) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows and the columns to look at: all of them, or some rows whole and some columns whole."""
    rows, columns = torch.arange(q_len), torch.arange(kv_len)
    if q_len * kv_len <= _WHOLE:
        yield rows, columns
        return
    if numbers.anywhere:
        step = max(1, _WHOLE // kv_len)
        yield from ((rows[i : i + step], columns) for i in range(0, q_len, step))
        return
    yield _some(q_len, numbers.places, kv_len - q_len), columns
    yield rows, _some(kv_len, numbers.places, 0)


def _some(length: int, numbers: frozenset[int], offset: int) -> Tensor:
    """Places at both ends, around each of the numbers, and anywhere."""
    near = {place for n in numbers for place in (n - 1, n, n + 1, n - offset, length - 1 - n)}
    named = sorted(p for p in {0, 1, 2, length // 2, length - 2, *near} if 0 <= p < length)
    chosen = named if len(named) <= _LINES else [named[i * len(named) // _LINES] for i in range(_LINES)]
    anywhere = torch.randint(length, (16,), generator=torch.Generator().manual_seed(length)).tolist()
    return torch.tensor(sorted({*chosen, *anywhere, length - 1}))


def _lines_of(entries: Entries, node: fx.Node, rows: Tensor, columns: Tensor) -> Tensor:
    """The entries of a node in these rows and columns, sampled along long other axes."""
    sizes = (1, 1, *entries.shape(node))
    lead = [_few(n, len(rows) * len(columns)) for n in entries.shape(node)[:-2]]
    ndim = len(lead) + 2
    last = [
        torch.zeros(1, dtype=torch.int64) if n == 1 else x for n, x in zip(sizes[-2:], (rows, columns), strict=True)
    ]
    index = [x.reshape([-1 if d == axis else 1 for d in range(ndim)]) for axis, x in enumerate((*lead, *last))]
    found = entries.at(node, tuple(index[ndim - len(entries.shape(node)) :]))
    return found.expand(*(len(x) for x in lead), len(rows), len(columns))


def _few(size: int, beside: int) -> Tensor:
    """Every index of an axis, or its ends and some in between."""
    most = max(3, (1 << 22) // max(1, beside))
    return torch.arange(size) if size <= most else torch.unique(torch.linspace(0, size - 1, most).long())


def _choices(graph: fx.Graph, lengths: Lengths, numbers: Numbers, least: int) -> list[tuple[list[Sizes], bool]]:
    """Groups of sizes, with whether one of each group must be valid: the example; near ones, all symbols distinct; those where
    the lengths exceed all numbers; sizes in between, around each number, and below the example;
    one with lengths of ``least``, if that is above 0."""
    example = symbols(graph)
    order = list(example)
    last = len(order) - 1
    near = [
        {s: example[s] + 3 + 2 * k for k, s in enumerate(order)},
        {s: example[s] + 8 + 3 * (last - k) for k, s in enumerate(order)},
        {s: example[s] * (2 + k) for k, s in enumerate(order)},
        {s: example[s] * (2 + last - k) for k, s in enumerate(order)},
    ]
    growing = [s for s in order if any(isinstance(n, torch.SymInt) and s in n.node.expr.free_symbols for n in lengths)]
    far: list[Sizes] = []
    between: list[Sizes] = []
    times = next((2**p for p in range(18) if _is_beyond(example, growing, 2**p, lengths, numbers.reach)), 2**17)
    if growing and times > 2:
        ends = len(growing) - 1
        for more, odd in ((operator.pos, 0), (lambda k: ends - k, 0), (operator.pos, 1)):
            far.append(example | {s: example[s] * (times + more(k)) + odd * (1 + 2 * k) for k, s in enumerate(growing)})
        steps = [m * 2**p for p in range(1, times.bit_length()) for m in (2, 3) if m * 2**p < 2 * times]
        between += [
            example | {s: example[s] * m // 2 + k * odd for k, s in enumerate(growing)} for m in steps for odd in (0, 1)
        ]
    if least:
        far.append(example | {s: max(example[s], least) for s in growing})
    for place in sorted({n + d for n in numbers.places for d in (-1, 0, 1) if n <= numbers.reach} | {1, 2, 3}):
        between += [example | {s: place + k * odd for k, s in enumerate(growing)} for odd in (0, 1)]
    others = [s for s in order if s in numbers.sizes and s not in growing]
    if others:
        between.append(example | {s: max(example[s], numbers.reach) + 1 + 2 * k for k, s in enumerate(others)})
    groups = ((near, True), (far, True), (between, False))
    return [([example], True), *((_distinct(graph, example, sizes), needed) for sizes, needed in groups)]


def _is_beyond(example: Sizes, growing: list[sympy.Symbol], times: int, lengths: Lengths, reach: int) -> bool:
    sizes = example | {s: example[s] * times for s in growing}
    return all(size_at(n, sizes) > reach for n in lengths if isinstance(n, torch.SymInt))


def _distinct(graph: fx.Graph, example: Sizes, wanted: list[Sizes]) -> list[Sizes]:
    """The choices within the graph's bounds, each once, without the example."""
    found = [within(graph, sizes) for sizes in wanted] if example else []
    return [s for s, _ in itertools.groupby(found) if s != example]


def may_hide(node: fx.Node, fill: float) -> bool:
    """An addend of the scores may be a mask next to which a score of ``fill`` is visible.

    It is not if it comes from activations without such a large number (possibly subtracted), or if its
    values are known.
    """
    gm = node.graph.owning_module
    assert isinstance(gm, fx.GraphModule)
    limit = -fill - _APART
    table = _table_of(node)
    if table is not None:
        stored = get_attr(gm, str(table.target))
        return stored.is_meta or _holds_large(stored, limit)
    made = list(ancestors(node, stop=is_heavy))
    constants = [get_attr(gm, str(n.target)) for n in made if n.op == "get_attr"]
    if any((n.op == "placeholder" and not is_number(n)) or is_state(n) for n in made):
        return True
    if any(c.is_meta for c in constants):
        return True
    if inputs_behind(node):
        large = [x for n in made for x in _literals(n) if abs(x) > limit]
        return bool(large) or any(_holds_large(c, limit) for c in constants)
    seen = samples(gm, [node])
    return seen is None or any(_holds_large(x, limit) for sample in seen for x in sample.values)


def _table_of(node: fx.Node) -> fx.Node | None:
    """The stored tensor whose entries ``node`` has, wherever they are looked up."""
    while calls(node, _LOOKS_UP) and is_tensor(arg(node, 0)):
        node = operand(node)
    return node if node.op == "get_attr" and not is_state(node) else None


def _holds_large(x: Tensor, limit: float) -> bool:
    return bool(((x > limit) | (x < -limit)).any())


def _literals(node: fx.Node) -> list[float]:
    """Every number among the arguments of a call that may become a value."""
    if calls(node, _SLICES):
        return []
    leaves = torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
    return [float(x) for x in leaves if isinstance(x, (int, float))]


def name_pattern(seen: Sequence[tuple[Sample, Tensor]]) -> Pattern | None:
    """The pattern whose meaning these visible-masks [..., rows, columns] are, at every sample; None if there is none."""
    flat = [(sample, visible.reshape(-1, *visible.shape[-2:])) for sample, visible in seen]
    if any(not bool((m == m[:1]).all()) for _, m in flat):
        return None
    longest, mask = max((pair for pair in flat if pair[0].whole_rows), key=lambda pair: pair[0].kv_len)
    varies = len({(sample.q_len, sample.kv_len) for sample, _ in flat}) > 1
    for candidate in _candidates(longest, mask[0], varies):
        if all(torch.equal(sample.of(candidate), m[:1]) for sample, m in flat):
            return candidate
    return None


def _candidates(sample: Sample, mask: Tensor, varies: bool) -> list[Pattern]:
    """Full, causal, the band visible in the rows and, at one length, blocks.

    With dynamic lengths, a band counts only if keys beyond both its ends are observed to be hidden.
    """
    steps = sample.columns[None, :] - sample.rows[:, None] - (sample.kv_len - sample.q_len)
    found: list[Pattern] = [Full(), Causal()]
    if not mask.any():
        return found
    left, right = max(0, -int(steps[mask].min())), max(0, int(steps[mask].max()))
    if varies and not (int(steps.min()) < -left and right < int(steps.max())):
        return found
    found += [Window(left, right), Causal() & Window(left, 0)]
    if not varies and sample.q_len == sample.kv_len == len(sample.rows) and bool(mask.any(-1).all()):
        found += blocks_in(mask)
    return found


def as_visible(bias: Tensor, floor: float = -1e4, beside: bool = False, whole_rows: bool = True) -> Tensor | None:
    """A bias that only hides, as a bool mask: 0 where visible, at most ``floor`` elsewhere, no query without a key.

    In such a bias, the weights of hidden keys underflow to exactly 0, so it equals a mask.  ``beside``:
    visible keys may have a bias, as long as hidden ones are that far below it.  Without ``whole_rows`` a query
    may have its keys elsewhere.
    """
    if bias.dtype == torch.bool:
        visible = bias
    else:
        visible = bias > floor if beside else bias == 0
        if beside and visible.any():
            floor += float(bias[visible].min().clamp(max=0.0))
        if not bool((visible | (bias <= floor)).all()):
            return None
    return visible if not whole_rows or bool(visible.any(-1).all()) else None
