"""The pattern algebra against a definition in plain Python, its notation, and its behaviour under symbolic tracing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_strategies import LEAVES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from attnopt.errors import PolicyError
from attnopt.patterns import (
    And,
    BlockLayout,
    Blocks,
    Causal,
    Dilated,
    Full,
    Global,
    Keys,
    Neighborhood,
    Not,
    Or,
    Pattern,
    PerHead,
    Periodic,
    Prefix,
    RandomBlocks,
    Segments,
    Sinks,
    Span,
    Strided,
    Window,
    parse,
)
from attnopt.patterns import block_layout as layout_module


def _joined(inner: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    heads = st.dictionaries(st.integers(0, 3), inner, max_size=3)
    return st.one_of(
        st.tuples(inner, inner).map(lambda ab: ab[0] & ab[1]),
        st.tuples(inner, inner).map(lambda ab: ab[0] | ab[1]),
        inner.map(lambda a: ~a),
        st.builds(Prefix, st.integers(0, 2), inner),
        st.builds(PerHead, heads, inner),
    )


PATTERNS = st.recursive(LEAVES, _joined, max_leaves=5)
LENGTHS = st.integers(1, 9)


def sees(p: Pattern, h: int, i: int, j: int, keys: int) -> bool:
    """The definition: whether the query at position i of head h sees key j of all ``keys``."""
    match p:
        case Full():
            return True
        case Causal():
            return j <= i
        case Window(left, right):
            return i - left <= j <= i + right
        case Span(left, right, before, after):
            return (
                i - left - int(round(1000 * before) * keys / 1000)
                <= j
                <= i + right + int(round(1000 * after) * keys / 1000)
            )
        case Dilated(left, right, dilation):
            return any(j == i + dilation * step for step in range(-left, right + 1))
        case Sinks(n):
            return j < n
        case Keys(ranges):
            return any(start <= j < stop for start, stop in ranges)
        case Global(positions):
            return i in positions or j in positions
        case Strided(stride):
            return (i - j) % stride == 0
        case Periodic(period, start, count):
            return j % period in range(start, start + count)
        case Blocks(size, halo, shift, edge):
            members = [k for k in range(-200, 300) if (k - shift) // size == (i - shift) // size]
            window = range(members[0] - halo, members[-1] + halo + 1)
            return j in (window if edge == "clip" else moved_inside(window, keys))
        case Neighborhood():
            return near(p, i, j)
        case Prefix(n, rest):
            return 0 <= i < n or j < n or sees(rest, h, i - n, j - n, keys - n)
        case Segments(ids, pairs):
            of = [number for number, count in ids for _ in range(count)]
            if not (0 <= i < len(of) and j < len(of)):
                return False
            return of[i] == of[j] if pairs is None else (of[i], of[j]) in pairs
        case RandomBlocks(size, count, blocks, seed):
            return j // size in drawn(i // size, count, blocks, seed)
        case BlockLayout(table, block):
            row, col = i // block, j // block
            return 0 <= row < len(table) and any(start <= col < stop for start, stop in table[row])
        case And(joined):
            return all(sees(q, h, i, j, keys) for q in joined)
        case Or(joined):
            return any(sees(q, h, i, j, keys) for q in joined)
        case Not(inner):
            return not sees(inner, h, i, j, keys)
        case PerHead(groups=groups, default=default):
            return sees(next((q for places, q in groups if h in places), default), h, i, j, keys)
    raise AssertionError(p)


def moved_inside(window: range, keys: int) -> range:
    """Step by step until no end hangs out; all keys if the window is longer."""
    if len(window) >= keys:
        return range(keys)
    while window[0] < 0:
        window = range(window.start + 1, window.stop + 1)
    while window[-1] >= keys:
        window = range(window.start - 1, window.stop - 1)
    return window


def near(p: Neighborhood, i: int, j: int) -> bool:
    """Coordinate by coordinate, after the masks of NATTEN's reference kernels."""
    coordinates = list(itertools.product(*(range(n) for n in p.grid)))
    if not (0 <= i < len(coordinates) and j < len(coordinates)):
        return False
    axes = zip(coordinates[i], coordinates[j], p.grid, p.kernel, p.stride, p.dilation, p.causal, strict=True)
    for query, key, n, kernel, stride, dilation, causal in axes:
        if query % dilation != key % dilation:
            return False
        alike = [c for c in range(n) if c % dilation == query % dilation]
        query, key = alike.index(query), alike.index(key)
        left, right = kernel // 2, kernel // 2 + kernel % 2 - 1
        if causal:
            leader = min(query // stride * stride + stride - 1, len(alike) - 1)
            start, end = max(leader - left - right, 0), query + 1
        elif p.edge == "clip" or kernel > len(alike):
            group = query // stride * stride
            moved = group + stride // 2 - left
            start, end = (moved, moved + kernel) if p.edge == "clip" else (0, len(alike))
        else:
            leader = min(query // stride * stride + stride // 2, len(alike) - 1)
            start = max(leader - left, 0)
            if leader + right >= len(alike):
                start += len(alike) - right - leader - 1
            end = start + kernel
        if not start <= key < end:
            return False
    return True


def drawn(row: int, count: int, blocks: int | None, seed: int) -> set[int]:
    """One block of each of ``count`` parts, by the same hash in Python's own numbers."""
    if row < 0 or (blocks is not None and row >= blocks):
        return set()
    among = row + 1 if blocks is None else blocks
    found = set()
    for part in range(count):
        number = 1
        for value in (seed, part, row):
            number = pow((number * 48271 + value + 11) % (2**31 - 1), 5, 2**31 - 1)
        start, stop = part * among // count, (part + 1) * among // count
        found.add(start + number % max(1, stop - start))
    return found


def expected_mask(p: Pattern, heads: int, q_len: int, kv_len: int) -> torch.Tensor:
    shift = kv_len - q_len
    rows = [[[sees(p, h, i + shift, j, kv_len) for j in range(kv_len)] for i in range(q_len)] for h in range(heads)]
    return torch.tensor(rows)


@settings(max_examples=150, deadline=None)
@given(PATTERNS, LENGTHS, LENGTHS, st.integers(4, 5))
def test_mask_density_and_cover_follow_the_definition(p: Pattern, q_len: int, kv_len: int, heads: int) -> None:
    mask = p.mask(q_len, kv_len, num_heads=heads)
    assert mask.dtype == torch.bool
    assert mask.shape == (heads if p.is_per_head else 1, q_len, kv_len)
    expected = expected_mask(p, heads, q_len, kv_len)
    assert torch.equal(mask.expand(heads, -1, -1), expected)
    assert p.density(q_len, kv_len, num_heads=heads) == pytest.approx(expected.double().mean().item())
    assert p.covers(q_len, kv_len, num_heads=heads) == bool(expected.all())
    if p.is_causal:
        later = torch.arange(kv_len) > torch.arange(q_len)[:, None] + kv_len - q_len
        assert not (mask & later).any()


@settings(max_examples=150, deadline=None)
@given(PATTERNS)
def test_notation_reads_back(p: Pattern) -> None:
    assert parse(str(p)) == p
    assert parse(p.to_json()) == p
    assert hash(parse(repr(p))) == hash(p)


@settings(max_examples=100, deadline=None)
@given(PATTERNS, st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
def test_for_heads_takes_rows_of_the_mask(p: Pattern, places: list[int]) -> None:
    whole = p.mask(5, 6, num_heads=4).expand(4, -1, -1)
    part = p.for_heads(places).mask(5, 6, num_heads=len(places)).expand(len(places), -1, -1)
    assert torch.equal(part, whole[places])


def test_last_query_is_at_the_last_key() -> None:
    assert Window(1, 0).mask(2, 4)[0].tolist() == [[False, True, True, False], [False, False, True, True]]
    assert Causal().mask(1, 3).all()


def test_window_is_symmetric_unless_told() -> None:
    assert Window(3) == Window(3, 3)
    assert str(Window(3, 0)) == "Window(left=3, right=0)"


@pytest.mark.parametrize(
    ("pattern", "is_causal"),
    [
        (Causal(), True),
        (Window(3, 0), True),
        (Window(3), False),
        (Dilated(3, 0, 2), True),
        (Dilated(3, 1, 2), False),
        (Causal() & Full(), True),
        (Causal() & Sinks(2), True),
        (Causal() | Sinks(2), False),
        (Causal() | Window(2, 0), True),
        (PerHead({0: Causal()}, default=Window(1, 0)), True),
        (PerHead({0: Causal()}), False),
        (~Causal(), False),
        (Full(), False),
    ],
)
def test_causality_is_structural(pattern: Pattern, is_causal: bool) -> None:
    assert pattern.is_causal is is_causal


def test_joins_are_flat_and_simple() -> None:
    a, b, c = Causal(), Sinks(2), Strided(3)
    assert (a & b) & c == a & (b & c) == And((a, b, c))
    assert (a | b) | c == Or((a, b, c))
    assert Full() & a == a & Full() == a & a == ~~a == a
    assert Full() | a == Full()
    assert str(Causal() & (Window(255, 0) | Sinks(4))) == "Causal() & (Window(left=255, right=0) | Sinks(4))"
    assert str(~(a | b)) == "~(Causal() | Sinks(2))"
    with pytest.raises(TypeError):
        a & 3  # type: ignore[operator]


def test_positional_means_that_positions_are_compared() -> None:
    assert not (Sinks(3) & ~Full()).is_positional
    assert not PerHead({0: Sinks(3)}).is_positional
    assert (Sinks(3) | Causal()).is_positional
    assert Global((1,)).is_positional


def test_per_head_normal_form() -> None:
    assert PerHead({0: Causal(), 2: Causal()}) == PerHead({(2, 0): Causal()})
    assert str(PerHead({(2, 0): Causal(), 1: Full()})) == "PerHead({(0, 2): Causal(), 1: Full()})"
    p = PerHead({1: Causal()})
    assert p.is_per_head
    assert p.named_heads == 2
    assert p.mask(2, 2).shape == (2, 2, 2)
    assert p.for_heads([1]) == Causal()
    assert p.for_heads([0, 2]) == Full()
    assert not PerHead({0: Full()}, default=Causal()).covers(3, 3)
    assert PerHead({0: Full()}, default=Causal()).covers(3, 3, num_heads=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Window(-1)", "Window: invalid value left=-1: expected an integer from 0 to 2147483647"),
        ("Window(1, right=-2)", "Window: invalid value right=-2: expected an integer from 0 to 2147483647"),
        ("Window(True)", "Window: invalid value left=True"),
        ("Window(10**9)", "'10 ** 9' cannot be read"),
        ("Dilated(1, 1, 0)", "Dilated: invalid value dilation=0: expected an integer from 1 to"),
        ("Strided(0)", "Strided: invalid value stride=0"),
        ("Blocks(4, halo=-1)", "Blocks: invalid value halo=-1"),
        ("Sinks('2')", "Sinks: invalid value n='2'"),
        ("Global('12')", "Global: invalid value positions='12': expected a sequence of integers"),
        ("Global([1, -1])", "Global: invalid value positions=-1"),
        (
            "Windw(3)",
            "unknown pattern 'Windw'; available: Full, Causal, Window, Span, Dilated, Keys, Sinks, Global, Strided, Periodic, "
            "Blocks, Neighborhood, Prefix, Segments, RandomBlocks, BlockLayout, PerHead",
        ),
        ("Windw(3)", "did you mean Window?"),
        ("Window(3, ahead=1)", "Window: got an unexpected keyword argument 'ahead'\n  hint: Window takes left, right"),
        ("Window()", "Window: missing a required argument: 'left'"),
        ("Window(", "cannot read 'Window(': '(' was never closed"),
        ("3", "'3' is not a pattern"),
        ("Causal() & 3", "'3' cannot be combined with &, | or ~"),
        ("Neighborhood(4, -1)", "Neighborhood: invalid value kernel=-1: expected an integer from 1 to"),
        ("Neighborhood((4, 0), 1)", "Neighborhood: invalid value grid=0: expected an integer from 1 to"),
        ("Neighborhood((2, 2, 2, 2), 1)", "invalid value grid=(2, 2, 2, 2): expected one, two or three sizes"),
        ("Neighborhood((4, 4), (3, 3, 3))", "invalid value kernel=(3, 3, 3): expected one integer or 2 of them"),
        ("Neighborhood(4, 3, stride=4)", "stride=4 is larger than kernel=3\n  hint: some queries would not see"),
        ("Neighborhood(4, 3, causal=1)", "Neighborhood: invalid value causal=1: expected True or False, or 1 of them"),
        ("Neighborhood(4, 3, edge='wrap')", "invalid value edge='wrap': expected one of 'shift', 'clip'"),
        ("Blocks(4, edge='pad')", "Blocks: invalid value edge='pad': expected one of 'clip', 'shift'"),
        ("Blocks(4, shift=4)", "Blocks: invalid value shift=4: expected a shift below size=4"),
        ("Periodic(4, 3, 2)", "Periodic: start=3 and count=2 exceed period=4"),
        ("Prefix(1, 2)", "Prefix: invalid value rest=2: expected a pattern"),
        ("Prefix(-1, Full())", "Prefix: invalid value n=-1"),
        ("Segments([])", "Segments: invalid value ids=(): expected one segment id per token"),
        ("Segments([0, -1])", "Segments: invalid value ids=-1: expected an integer from 0"),
        ("Segments([(0, 0)])", "Segments: invalid value ids=0: expected an integer from 1"),
        ("Segments([0], pairs=[0])", "invalid value pairs=(0,): expected pairs of a query segment and a key segment"),
        ("Segments([0], pairs=0)", "invalid value pairs=0: expected pairs of a query segment and a key segment"),
        ("RandomBlocks(0, 1)", "RandomBlocks: invalid value size=0"),
        ("RandomBlocks(1, 1, blocks=0)", "RandomBlocks: invalid value blocks=0"),
        ("BlockLayout([], 4)", "BlockLayout: invalid value table=(): expected a square table of 0s and 1s"),
        (
            "BlockLayout([[1, 0]], 4)",
            "row 0 of table has 2 columns, but the table has 1 rows; the table must be square",
        ),
        ("BlockLayout([[2]], 4)", "BlockLayout: row 0 of table: invalid value (2,): expected a row of 0s and 1s"),
        ("BlockLayout(['0', '1-2'], 4)", "row 1 of table names column 2, but the table has only 2 columns"),
        ("BlockLayout(['0;1'], 4)", "row 0 of table: invalid value '0;1': expected columns such as \"0-3, 7\""),
        ("Causal() + Full()", "'Causal() + Full()' cannot be read"),
        ("(lambda: 1)()", "is not a name"),
        ("Window(**{'left': 1})", "** is not supported"),
        ("PerHead({**{}})", "a mapping key must be a number, a string or a tuple"),
        ("PerHead({(0, 1): Causal(), 1: Full()})", "PerHead: duplicate head 1"),
        ("PerHead({0: 1})", "PerHead: invalid value {0: 1}: expected a mapping from heads to patterns"),
        ("__import__('os')", "unknown pattern '__import__'"),
        ("Causal().mask(1, 1)", "'Causal()' is not a name"),
        ("~" * 100_000 + "Causal()", "cannot read"),
        (" " * 2_000_000, "text too long: 2000000 characters"),
    ],
)
def test_bad_text_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert message in str(caught.value)


def test_too_few_heads() -> None:
    with pytest.raises(PolicyError, match="names head 3, but there are only 2 heads"):
        PerHead({3: Causal()}).mask(2, 2, num_heads=2)


def test_a_name_alone_is_a_call() -> None:
    assert parse("Causal & ~Sinks(1)") == Causal() & ~Sinks(1)


def test_memory_of_density_is_bounded() -> None:
    assert Causal().density(3000, 3000) == pytest.approx(3001 / 6000)


def symbolic(mode: FakeTensorMode, shape: tuple[int, ...], dynamic: tuple[int, ...]) -> torch.Tensor:
    sizes = [DimDynamic.DYNAMIC if axis in dynamic else DimDynamic.STATIC for axis in range(len(shape))]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(torch.randn(shape), symbolic_context=context)


@settings(max_examples=15, deadline=None)
@given(PATTERNS)
def test_mask_traces_with_symbolic_lengths(p: Pattern) -> None:
    def mask(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        p.covers(4, 4, num_heads=4)  # must neither fail under tracing nor leave operators behind
        return p.mask(q.shape[0], k.shape[0], num_heads=4, device=q.device)

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    inputs = symbolic(mode, (5,), (0,)), symbolic(mode, (7,), (0,))
    with mode:
        graph = make_fx(mask, pre_dispatch=True)(*inputs)
    assert not env.guards
    assert not [n for n in graph.graph.nodes if n.op == "get_attr" or "sum" in str(n.target)]
    for q_len, kv_len in ((5, 7), (3, 3), (9, 4)):
        assert torch.equal(graph(torch.zeros(q_len), torch.zeros(kv_len)), p.mask(q_len, kv_len, num_heads=4))


@given(PATTERNS, st.integers(1, 70), st.integers(1, 70), st.sampled_from([(4, 8), (16, 16), (7, 5), (64, 64)]))
def test_layout_holds_exactly_the_visible_pairs(p: Pattern, q_len: int, kv_len: int, blocks: tuple[int, int]) -> None:
    block_q, block_kv = blocks
    for head in range(max(1, p.named_heads)):
        seen = p.for_head(head)
        found = seen.layout(q_len, kv_len, block_q, block_kv)
        dense = torch.zeros(found.num_rows * block_q, found.num_cols * block_kv, dtype=torch.bool)
        for row, col, tile in zip(found.rows, found.cols, found.tile, strict=True):
            pairs = dense[row * block_q : (row + 1) * block_q, col * block_kv : (col + 1) * block_kv]
            pairs[:] = True if tile < 0 else torch.from_numpy(found.tiles[tile].copy())
            assert pairs[: q_len - row * block_q, : kv_len - col * block_kv].any(), "an empty block is not kept"
        assert torch.equal(dense[:q_len, :kv_len], seen.mask(q_len, kv_len)[0])


def test_layout_of_a_long_sequence_costs_only_what_it_keeps() -> None:
    window = Causal() & (Window(255, 0) | Sinks(4))
    found = window.layout(1 << 17, 1 << 17)
    assert len(found.cols) == pytest.approx(6 * 2048, rel=0.01)
    assert len(found.tiles) == 4, "tiles that look the same are kept once"
    assert window.density(1 << 17, 1 << 17) == pytest.approx(260 / (1 << 17), rel=0.01)


def test_block_lists_are_short() -> None:
    table = torch.ones(64, 64).tril()
    text = str(BlockLayout(table, 128))
    assert text.startswith("BlockLayout(table=('0', '0-1', '0-2', '0-3', ")
    assert len(text) < 600
    assert parse(text) == BlockLayout(table.bool(), 128)
    heads = BlockLayout.per_head(torch.stack([table, table.T]), 128)
    assert heads == PerHead({0: BlockLayout(table, 128), 1: BlockLayout(table.T, 128)})
    assert str(Segments([0] * 1000 + [3] + [0] * 5)) == "Segments(((0, 1000), 3, (0, 5)))"
    assert Segments(torch.tensor([1, 1, 0])) == Segments([(1, 2), 0])


def test_neighborhoods_print_what_is_unusual() -> None:
    assert str(Neighborhood((4, 4), (3, 3))) == "Neighborhood(grid=(4, 4), kernel=3)"
    assert str(Neighborhood((4, 5), (3, 2), 2, 1, (True, False), "clip")) == (
        "Neighborhood(grid=(4, 5), kernel=(3, 2), stride=2, causal=(True, False), edge='clip')"
    )
    assert str(Neighborhood(9, 3, dilation=2, causal=True)) == "Neighborhood(grid=9, kernel=3, dilation=2, causal=True)"


def test_random_blocks_do_not_change_as_the_sequence_grows() -> None:
    drawn_blocks = RandomBlocks(4, 2)
    assert torch.equal(drawn_blocks.mask(60, 60)[0, :40, :40], drawn_blocks.mask(40, 40)[0])
    assert not torch.equal(drawn_blocks.mask(60, 60), RandomBlocks(4, 2, seed=1).mask(60, 60))
    of_all = RandomBlocks(4, 3, blocks=15).layout(60, 60, 4, 4)
    assert set(of_all.row_ptr.tolist()) == set(range(0, 46, 3)), "three different blocks for every block of queries"
    spread = torch.bincount(torch.from_numpy(RandomBlocks(1, 4, blocks=512).layout(512, 512, 1, 1).cols.copy()).long())
    assert spread.max() <= 16, "no key block is drawn far more often than others"


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        (Neighborhood((64, 64), 13), 4096),
        (Neighborhood((32, 64), (5, 9), stride=(2, 4), dilation=(2, 1), edge="clip"), 2048),
        (Neighborhood((8, 16, 16), (3, 5, 5), causal=(True, False, False)), 2048),
        (Neighborhood(1 << 14, 7, dilation=512), 1 << 14),
        (Prefix(1, Neighborhood((64, 64), 7)), 4097),
        (Blocks(100, 70, edge="shift"), 8192),
        (Segments([(n % 7, 100 + n) for n in range(20)]), 2190),
        (Segments([(n, 128) for n in range(16)], [(n, n // 2) for n in range(16)]), 2048),
        (RandomBlocks(128, 2) & Causal(), 4096),
        (BlockLayout(torch.eye(32), 128), 4096),
        (Dilated(4, 4, 700), 8192),
        (Strided(1024), 8192),
        (Causal() & (Window(255, 0) | Sinks(4)), 8192),
    ],
)
def test_layout_looks_at_little_more_than_it_keeps(
    pattern: Pattern, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = 0
    whole = layout_module._looked_at

    def counted(p: Pattern, ranges: Any, *sizes: int) -> Any:
        nonlocal looked_at
        looked_at += int((ranges[:, 2] - ranges[:, 1]).sum())
        return whole(p, ranges, *sizes)

    monkeypatch.setattr(layout_module, "_looked_at", counted)
    layout_module.layout.cache_clear()
    found = pattern.layout(length, length)
    assert looked_at <= 1.2 * len(found.cols) + 20
    assert pattern.density(length, length) <= found.visits < 1


@settings(deadline=None)
@given(PATTERNS, LENGTHS, LENGTHS)
def test_blind_queries_are_counted(p: Pattern, q_len: int, kv_len: int) -> None:
    mask = p.mask(q_len, kv_len, num_heads=4)
    assert p.blind(q_len, kv_len, num_heads=4) == tuple((~mask.any(2)).sum(1).tolist())


def test_neighborhoods_of_known_kind() -> None:
    """Stride 1 is neighbourhood attention, stride = kernel is blocked attention; blocks with a halo clip at the edge."""
    assert torch.equal(Neighborhood(12, 3, stride=3).mask(12, 12), Blocks(3).mask(12, 12))
    for size, halo, length in ((4, 2, 18), (3, 1, 11), (5, 0, 12)):
        haloed = Neighborhood(length, size + 2 * halo, stride=size, edge="clip")
        assert torch.equal(haloed.mask(length, length), Blocks(size, halo).mask(length, length))
        shifted = Blocks(size, halo, edge="shift").mask(length, length)
        assert torch.equal(Neighborhood(length, size + 2 * halo, stride=size).mask(length, length), shifted)
    assert torch.equal(Neighborhood(9, 4, causal=True).mask(9, 9), Window(3, 0).mask(9, 9))
    assert torch.equal(Neighborhood(9, 5, edge="clip").mask(9, 9), Window(2).mask(9, 9))
    assert Neighborhood(9, 5).mask(9, 9).sum(2).eq(5).all(), "the window is moved inside, not cut"
    assert Neighborhood((5, 6), (5, 6)).covers(30, 30)
    assert Neighborhood((4, 5), 3, causal=True).is_causal
    assert not Neighborhood((4, 5), 3, causal=(True, False)).is_causal
