"""Random policies."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from attnopt import Choice, FirstOf, Input, where
from attnopt.compiler.policy import Policy
from attnopt.compiler.where import Where
from attnopt.passes import (
    AddValues,
    DynamicSparse,
    EvictKeys,
    ExtendKeys,
    Fuse,
    GroupedQuery,
    HeadPatch,
    LocalWindow,
    MixMap,
    PoolKeys,
    PruneHeads,
    QueryRows,
    Refit,
    RouteHeads,
    ScaleHeads,
    SegmentGain,
    SoftPAG,
    Sparse,
    Steer,
    Transplant,
)
from attnopt.patterns import (
    BlockLayout,
    Blocks,
    Causal,
    Dilated,
    Full,
    Global,
    Neighborhood,
    PerHead,
    Periodic,
    Prefix,
    RandomBlocks,
    Segments,
    Sinks,
    Strided,
    Window,
)

PATTERNS = [
    Segments([0, 0, 1], pairs=[(0, 1)]), Neighborhood((3, 4), 3, edge="clip"), BlockLayout(["0-1", "1"], 4), Global([5, 2]),
    Prefix(1, Strided(3)), RandomBlocks(4, 2, seed=7), Blocks(8, 1) | Dilated(2, 2, 3), Periodic(4, 1), Full(),
    Blocks(4, 3, shift=1, edge="shift") & Causal(),
]  # fmt: skip


PASSES = st.one_of(
    st.sampled_from([Fuse(), Refit()]),
    st.builds(
        LocalWindow,
        st.integers(0, 9),
        st.none() | st.integers(0, 9),
        heads=st.none() | st.lists(st.integers(0, 9)),
        share=st.sampled_from([0.0, 0.125, 1.0]),
    ),
    st.sampled_from(
        [
            Sparse(Causal() & ~Window(3, 0)),
            Sparse(Blocks(8, 3), zero_pad=True),
            Sparse(PerHead({(0, 1): Sinks(2), 3: Causal()}, Window(2))),
        ]
    ),
    st.builds(lambda heads: PruneHeads(heads=heads), st.lists(st.integers(0, 9))),
    st.sampled_from([PruneHeads(0.25), PruneHeads(0.5, importance=[1, 2.5])]),
    st.builds(
        RouteHeads, st.sets(st.integers(0, 9), max_size=3) | st.integers(0, 3), st.integers(1, 3), st.just("linear")
    ),
    st.builds(SegmentGain, st.sets(st.integers(0, 9), min_size=1), st.floats(0, 1e6)),
    st.builds(SoftPAG, st.none() | st.lists(st.integers(0, 9)), st.floats(0, 1)),
    st.builds(
        lambda scores, keep, dense, heads: DynamicSparse(scores, keep, dense=dense, local_heads=heads),
        st.sampled_from(
            [
                "pooled",
                "kmeans",
                "low-rank(rank=2, queries=4)",
                "low-rank(0.5, keys=8)",
                "routing(4)",
                "routing(balanced=False)",
            ]
        ),
        st.floats(0.1, 1),
        st.integers(0, 2),
        st.lists(st.integers(0, 9), max_size=3),
    ),
    st.sampled_from(
        [HeadPatch([2, 1], "mean"), HeadPatch([0], torch.arange(3.0)[None]), PruneHeads(0.1, whole_layers=True)]
    ),
    st.builds(
        lambda heads, rows, tokens: (
            Steer(torch.arange(2.0 * rows).reshape(rows, 2) if rows else [0.5, 2], heads, tokens)
            if heads is None
            else Steer(torch.ones(len(heads), 2).bfloat16(), heads, tokens)
        ),
        st.none() | st.lists(st.integers(0, 9), min_size=1, unique=True),
        st.integers(0, 3),
        st.none() | st.lists(st.integers(-9, 9)) | st.just(range(2, 5)),
    ),
    st.sampled_from([Steer(Input("delta"), [1]), HeadPatch([0, 2], Input("values")), MixMap(Input("map"), 0.5)]),
    st.sampled_from([ScaleHeads(Input("gains")), Sparse(Segments(Input("ids"), ((0, 1),), keys=Input("words")))]),
    st.builds(
        lambda q, k, heads, tokens: Transplant(q=q, k=k, heads=heads, tokens=tokens),
        st.sampled_from([Input("q"), "run", torch.ones(2, 3, 4).half()]),
        st.none() | st.just(Input("k")),
        st.none() | st.just([3, 1]),
        st.none() | st.lists(st.integers(-9, 9)) | st.just(range(2, 5)),
    ),
    st.sampled_from([Transplant(map=Input("map")), Transplant(map=torch.rand(1, 2, 3, 3), heads=[2, 0])]),
    st.builds(
        AddValues,
        st.none() | st.lists(st.integers(-9, 9)) | st.just(range(2, 5)),
        st.floats(-2, 2),
        st.none() | st.lists(st.integers(0, 9), min_size=1, unique=True),
        st.none() | st.floats(-1e6, 0),
    ),
    st.sampled_from(PATTERNS).map(Sparse),
    st.builds(lambda gate, heads: MixMap([[0.5, -1.0]], gate, heads), st.floats(0, 1), st.none() | st.just([2, 0])),
    st.sampled_from([MixMap(torch.arange(12.0).reshape(2, 2, 3), [0.5, 1.0]), MixMap(torch.ones(1, 1).half(), 0)]),
    st.builds(
        ExtendKeys,
        st.sampled_from([torch.arange(6.0).reshape(3, 2).bfloat16(), [[0.5, 2]], (), Input("reference")]),
        st.floats(0, 1e6),
        st.none() | st.just([2, 0]),
    ),
    st.sampled_from(
        [ExtendKeys([[1.0], [2.0]], mask=[True, False]), ExtendKeys(Input("reference"), mask=Input("seen"))]
    ),
    st.sampled_from([PoolKeys(4), PoolKeys((2, 3), (4, 6), heads=[1], prefix=1)]),
    st.builds(EvictKeys, st.sampled_from(["sinks", "h2o", "snapkv"]), st.integers(1, 99)),
    st.sampled_from([EvictKeys("sinks", 8, sinks=2), EvictKeys("snapkv", 8, recent=2, pool=5)]),
    st.builds(
        QueryRows,
        st.sampled_from(["norm", "received", "received(stride=3)"]),
        st.floats(0.1, 1) | st.integers(1, 9),
        st.integers(0, 2),
        st.none() | st.lists(st.integers(0, 9)),
    ),
    st.builds(GroupedQuery, st.integers(1, 9), st.sampled_from(["mean", "first"])),
    st.builds(
        ScaleHeads, st.lists(st.floats(-2, 2)) | st.dictionaries(st.integers(0, 9), st.floats(-2, 2), min_size=1)
    ),
)


STEPS = st.recursive(
    PASSES,
    lambda inner: st.builds(
        lambda kind, alternatives: kind(*alternatives),
        st.sampled_from([Choice, FirstOf]),
        st.lists(st.none() | inner | st.lists(inner, max_size=2), min_size=1, max_size=3),
    ),
    max_leaves=4,
)


BOUNDS = st.one_of(
    st.integers(-99, 99),
    st.floats(-1e9, 1e9),
    st.tuples(st.sampled_from([">", ">=", "<", "<="]), st.floats(-9, 9)).map(lambda pair: f"{pair[0]}{pair[1]!r}"),
    st.tuples(st.integers(-9, 0), st.floats(0, 9)),
)


STATISTICS = st.dictionaries(
    st.sampled_from(["distance", "sink_mass", "entropy", "weights", "ablation", "distance((3, 4), 1)", "qk-rank(0.5)"]),
    BOUNDS,
    max_size=2,
)


GLOBS = st.text(st.sampled_from("abc.*?#2"), max_size=8)


CONDITIONS = st.builds(
    lambda switches, sizes, layers, name, statistics, heads, count: _condition(
        where(**switches, **sizes, layers=layers, name=name, statistics=statistics), heads, count
    ),
    st.dictionaries(st.sampled_from(["causal", "is_cross", "bias", "window", "sinks"]), st.booleans(), max_size=2),
    st.dictionaries(
        st.sampled_from(["heads", "kv_heads", "head_dim", "value_dim", "queries", "keys"]), BOUNDS, max_size=2
    ),
    st.none()
    | st.integers(-9, 9)
    | st.lists(st.integers(-9, 9), max_size=3)
    | st.builds(slice, st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9), st.sampled_from([None, 2, -1])),
    st.none() | GLOBS | st.lists(st.text(max_size=4), min_size=1, max_size=2),
    STATISTICS,
    STATISTICS,
    st.none() | st.integers(0, 99),
)


def _condition(made: Where, heads: dict[str, Any], count: int | None) -> Where:
    made = made.heads(statistics=heads) if heads else made
    return made if count is None else made.expect(count)


KEYS = GLOBS | CONDITIONS.filter(lambda condition: not condition.of_heads)


POLICIES = st.dictionaries(KEYS, st.lists(STEPS, max_size=3), max_size=4).map(Policy.of)
