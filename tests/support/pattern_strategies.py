"""Random patterns."""

from __future__ import annotations

from hypothesis import strategies as st

from attnopt.patterns import (
    BlockLayout,
    Blocks,
    Causal,
    Dilated,
    Full,
    Global,
    Keys,
    Neighborhood,
    Periodic,
    RandomBlocks,
    Segments,
    Sinks,
    Span,
    Strided,
    Window,
)

SMALL = st.integers(0, 6)


@st.composite
def neighborhoods(draw: st.DrawFn) -> Neighborhood:
    grid = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    kernel = [draw(st.integers(1, 5)) for _ in grid]
    stride = [draw(st.integers(1, k)) for k in kernel]
    dilation = [draw(st.integers(1, 3)) for _ in grid]
    causal = [draw(st.booleans()) for _ in grid]
    return Neighborhood(grid, kernel, stride, dilation, causal, draw(st.sampled_from(["shift", "clip"])))


def block_layouts(count: int) -> st.SearchStrategy[BlockLayout]:
    table = st.lists(st.lists(st.integers(0, 1), min_size=count, max_size=count), min_size=count, max_size=count)
    return st.builds(BlockLayout, table, st.integers(1, 4))


PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=6)


LEAVES = st.one_of(
    st.just(Full()),
    st.just(Causal()),
    st.builds(Window, SMALL, st.none() | SMALL),
    st.builds(Span, SMALL, SMALL, st.sampled_from([0.125, 0.4, 1.0]), st.sampled_from([0.0, 0.334])),
    st.builds(Dilated, SMALL, SMALL, st.integers(1, 3)),
    st.builds(Sinks, st.integers(0, 12)),
    st.builds(Keys, st.sets(st.integers(0, 30), max_size=6)),
    st.builds(Global, st.lists(st.integers(0, 12), max_size=4).map(tuple)),
    st.builds(Strided, st.integers(1, 4)),
    st.builds(Blocks, st.integers(1, 4), st.integers(0, 2)),
    st.builds(Blocks, st.just(4), st.integers(0, 6), st.integers(0, 3), st.sampled_from(["clip", "shift"])),
    st.builds(Periodic, st.just(5), st.integers(0, 2), st.integers(0, 3)),
    neighborhoods(),
    st.builds(Segments, st.lists(st.integers(0, 3), min_size=1, max_size=9), st.none() | PAIRS),
    st.builds(RandomBlocks, st.integers(1, 3), SMALL, st.none() | st.integers(1, 5), SMALL),
    st.integers(1, 4).flatmap(block_layouts),
)
