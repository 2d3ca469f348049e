"""Statistics of one attention against plain operations on the maps of an eager model."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from attention_only import COPY, Circuit, D, E, H, Layer, eager, random_circuit
from torch import Tensor, nn

import attnopt
from attnopt import head_importance, head_profile
from attnopt.errors import CalibrationError, PolicyError
from attnopt.statistics import (
    Distance,
    Entropy,
    KeyNorm,
    MassiveFeatures,
    MaxLogit,
    OvRank,
    QkRank,
    QueryNorm,
    SegmentMass,
    SinkMass,
)

pytestmark = pytest.mark.usefixtures("one_capture")
L = 12
LENGTHS = (12, 7, 9, 10)


def data() -> tuple[Circuit, Tensor, Tensor]:
    """A model, ids and which of them are no padding; the last sequences are padded on the right."""
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 10, (4, L), generator=g)
    return random_circuit(), ids, torch.arange(L) < torch.tensor(LENGTHS)[:, None]


def left(seen: Tensor) -> Tensor:
    return seen.flip(1)


@pytest.fixture(scope="module", params=["right", "left"])
def case(request: pytest.FixtureRequest) -> Any:
    model, ids, seen = data()
    seen = seen if request.param == "right" else left(seen)
    return model, ids, seen, eager(model, ids, seen)


def scored(case: Any, method: Any) -> list[Any]:
    model, ids, seen, _ = case
    found = head_importance(model, [(ids[:2], seen[:2]), (ids[2:], seen[2:])], method)
    assert list(found) == ["layers.0", "layers.1"]
    return list(found.values())


def rows(case: Any, layer: int) -> list[tuple[Tensor, list[int]]]:
    """For each sequence its map between the tokens that are no padding [H, N, N], and their places."""
    _, _, seen, (_, weights, _, _) = case
    found = []
    for p, real in zip(weights[layer], seen, strict=True):
        places = real.nonzero().flatten().tolist()
        found.append((p[:, places][:, :, places], places))
    return found


def test_entropy(case: Any) -> None:
    for layer, got in enumerate(scored(case, Entropy())):
        for h in range(H):
            each = []
            for p, _ in rows(case, layer):
                for i, row in enumerate(p[h].numpy()):
                    entropy = -sum(x * math.log(x) for x in row if x > 0)
                    each.append(1 - entropy / max(math.log(i + 1), 1e-9))
            assert got[h] == pytest.approx(np.mean(each), rel=1e-4)


class WithSinks(nn.Module):
    """One causal attention, in which a number of each head takes its share of the softmax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.sinks = nn.Parameter(torch.tensor([2.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        s = (q @ k.mT / 2).masked_fill(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -torch.inf)
        s = torch.cat([s, self.sinks[:, None, None].expand(len(x), -1, x.shape[1], 1)], -1)
        self.p = s.softmax(-1)[..., :-1]
        return self.o((self.p @ v).transpose(1, 2).flatten(2))


def test_entropy_is_of_keys_whatever_a_sink_takes() -> None:
    model, x = WithSinks().eval(), torch.randn(3, 5, 8)
    model(x)
    for h, got in enumerate(head_importance(model, [x], "entropy")[""]):
        each = []
        for sequence in model.p[:, h].detach().double().tolist():
            for i, row in enumerate(sequence):
                among_keys = [p / sum(row[: i + 1]) for p in row[: i + 1]]
                each.append(1 - sum(-p * math.log(p) for p in among_keys) / math.log(i + 1) if i else 1.0)
        assert got == pytest.approx(np.mean(each), rel=1e-5)


def test_distance_between_tokens_in_a_row(case: Any) -> None:
    near = scored(case, "locality")
    for layer, got in enumerate(scored(case, "distance")):
        for h in range(H):
            moment = total = 0.0
            for p, _ in rows(case, layer):
                for (i, j), x in np.ndenumerate(p[h].numpy()):
                    moment, total = moment + x * abs(i - j), total + x
            assert got[h] == pytest.approx(moment / total, rel=1e-4)
            assert near[layer][h] == -got[h]


def test_sink_mass_is_a_column(case: Any) -> None:
    for keys in (1, 3, None):
        for layer, got in enumerate(scored(case, SinkMass(keys))):
            for h in range(H):
                total = queries = 0.0
                for p, _ in rows(case, layer):
                    columns = p[h].sum(0)
                    total += float(columns.max() if keys is None else columns[:keys].sum())
                    queries += len(p[h])
                assert got[h] == pytest.approx(total / queries, rel=1e-4)


def test_the_profile_of_keys(case: Any) -> None:
    model, ids, seen, _ = case
    profile = head_profile(model, [(ids, seen)], "sink-mass")
    for layer, curves in enumerate(profile.values()):
        maps = [p for p, _ in rows(case, layer)]
        assert curves.at == tuple(range(L))
        for h in range(H):
            for j in range(L):
                have = [p[h] for p in maps if p.shape[1] > j]
                want = sum(float(p[:, j].sum()) for p in have) / sum(len(p) for p in have)
                assert curves.values[h][j] == pytest.approx(want, rel=1e-4, abs=1e-7)


def vectors(case: Any, layer: int, role: str) -> Tensor:
    """[H, tokens, D] of the tokens that are no padding."""
    model, ids, seen, _ = case
    taken: list[Tensor] = []
    handle = getattr(model.layers[layer], role).register_forward_hook(lambda _m, _a, out: taken.append(out))
    model(ids, seen)
    handle.remove()
    return taken[0][seen].double().unflatten(-1, (H, D)).transpose(0, 1)


def test_norms_and_massive_features(case: Any) -> None:
    for method, role in ((QueryNorm(), "q"), (KeyNorm(), "k")):
        for layer, got in enumerate(scored(case, method)):
            want = vectors(case, layer, role).norm(dim=-1).mean(1)
            assert got == pytest.approx(want.tolist(), rel=1e-4)
    for layer, got in enumerate(scored(case, MassiveFeatures("q", times=1.2))):
        norms = vectors(case, layer, "q").norm(dim=1)
        assert list(got) == (norms > 1.2 * norms.mean(1, keepdim=True)).sum(1).tolist()
        assert sum(got) > 0


def test_planted_massive_features() -> None:
    model, ids, seen = data()
    model.layers[1].k.weight[2 * D + 3] *= 100.0
    found = head_importance(model, [(ids, seen)], MassiveFeatures())
    assert found["layers.0"] == (0, 0, 0, 0)
    assert found["layers.1"] == (0, 0, 1, 0)
    curves = head_profile(model, [(ids, seen)], MassiveFeatures())["layers.1"]
    assert max(range(D), key=curves.values[2].__getitem__) == 3
    assert np.mean(curves.values[0]) == pytest.approx(1.0)


def test_the_largest_logit_is_one_that_counts(case: Any) -> None:
    for layer, got in enumerate(scored(case, MaxLogit())):
        _, _, seen, _ = case
        q, k = (vectors(case, layer, role) for role in "qk")
        owner = seen.nonzero()
        same = owner[:, None, 0] == owner[None, :, 0]
        visible = same & (owner[None, :, 1] <= owner[:, None, 1])
        for h in range(H):
            assert got[h] == pytest.approx(float((q[h] @ k[h].T)[visible].abs().max()), rel=1e-4)


def test_growth_since_another_model() -> None:
    model, ids, seen = data()
    before = head_importance(model, [(ids, seen)], "max-logit")
    model.layers[1].q.weight[:D] *= 3.0
    now = head_importance(model, [(ids, seen)], "max-logit")
    growth = now.since(before)
    assert growth["layers.1"][0] == pytest.approx(2 * before["layers.1"][0], rel=1e-4)
    assert growth["layers.1"][1:] == pytest.approx((0, 0, 0))
    assert growth.method == "change of max-logit"
    with pytest.raises(PolicyError, match="max-logit cannot be compared with key-norm"):
        now.since(head_importance(model, [(ids, seen)], "key-norm"))


# ---------------------------------------------------------------- segments
def test_mass_between_spans(case: Any) -> None:
    _, _, seen, (_, weights, _, _) = case
    for queries, keys in (((5, 9), (2, 6)), (None, (0, 4)), ((-6, None), (-12, -8))):
        for layer, got in enumerate(scored(case, SegmentMass(queries, keys))):
            inside = torch.zeros(L, dtype=torch.bool)
            inside[slice(*queries) if queries else slice(None)] = True
            has_keys = seen[:, slice(*keys)].any(1, keepdim=True)
            counted = (seen & inside & has_keys).nonzero()
            p = torch.stack([weights[layer][b, :, i] for b, i in counted.tolist()])
            assert got == pytest.approx(p[:, :, slice(*keys)].sum(-1).mean(0).tolist(), rel=1e-4, abs=1e-7)


def test_mass_between_segments_by_their_ids(case: Any) -> None:
    _, ids, seen, (_, weights, _, _) = case
    segments = ids % 3
    method = SegmentMass(2, 1, ids=[segments[:2], segments[2:]])
    for layer, got in enumerate(scored(case, method)):
        counted = (seen & (segments == 2)).nonzero().tolist()
        each = [weights[layer][b, :, i][:, segments[b] == 1].sum(-1) for b, i in counted]
        assert got == pytest.approx(torch.stack(each).mean(0).tolist(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SegmentMass((0, 4), (9, 20)), r"the keys \(9, 20\) lie outside of a sequence of 12"),
        (SegmentMass((11, -11), (0, 3)), r"the queries \(11, -11\) lie outside"),
        (SegmentMass((11, 12), (0, 3), ids=None), "no sequence has the queries"),
        (SegmentMass(7, 1, ids=[torch.zeros(3, L, dtype=torch.long)]), "no sequence has the queries of segment 7"),
        (SegmentMass(0, 1, ids=[[[0] * L] * 3]), "no sequence has the keys of segment 1"),
        (SegmentMass(0, 1, ids=[[[0, 1] + [2] * 10, [2] * L]] * 2), "ids of 2 batches for 1"),
        (SegmentMass(0, 1, ids=[[[0, 1], [0, 1]]]), "ids of 2 tokens for the 12 of sequence 0 in batch 0"),
        (SegmentMass(0, 1, ids=[[[0] * L]]), "ids of 0 tokens for the 12 of sequence 1 in batch 0"),
        (
            SegmentMass(0, 1, ids=[[[0] * L, [0] * L, [1] * L]]),
            "no sequence has both the queries of segment 0 and the keys",
        ),
    ],
)
def test_segments_that_do_not_exist(method: SegmentMass, message: str) -> None:
    model, ids, seen = data()
    with pytest.raises(CalibrationError, match=message) as caught:
        head_importance(model, [(ids[1:], seen[1:])], method)
    assert caught.value.site == "layers.0"
    assert caught.value.hint or "ids" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: SegmentMass((0, 3), (4, 4)), r"keys=\(4, 4\): expected a span"),
        (lambda: SegmentMass((0, 3), 2), "keys=2: expected a span of tokens such as"),
        (lambda: SegmentMass((0, 3), 2, ids=[torch.zeros(1, 3)]), r"queries=\(0, 3\): expected an integer"),
        (lambda: SegmentMass(0, 2, ids=torch.zeros(3)), r"expected ids \[batch, length\]"),
        (lambda: SegmentMass((True, 3), (0, 2)), r"queries=\(True, 3\)"),
        (lambda: Distance(grid=0), "grid=0"),
        (lambda: Distance(prefix=-1), "prefix=-1"),
        (lambda: Distance(metric="taxi"), "metric='taxi'"),
        (lambda: SinkMass(0), "keys=0"),
        (lambda: MassiveFeatures("v"), "of='v'"),
        (lambda: MassiveFeatures(times=0.5), "times=0.5"),
        (lambda: QkRank(0), "explained=0"),
        (lambda: OvRank(1.5), "explained=1.5"),
    ],
)
def test_options_are_checked(given: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        given()


# ---------------------------------------------------------------- grids
class Grid(nn.Module):
    """An attention of one layer without a mask, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        g = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.layer.q, self.layer.k, self.layer.v))
        out: Tensor = self.layer.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out

    def map(self, x: Tensor) -> Tensor:
        q, k = (f(x).double().unflatten(-1, (H, D)).transpose(1, 2) for f in (self.layer.q, self.layer.k))
        return (q @ k.mT).softmax(-1)


@pytest.mark.parametrize(("grid", "prefix"), [((6,), 0), ((2, 3), 1), ((3, 2), 2), ((2, 3, 2), 5), (None, 1)])
@pytest.mark.parametrize("metric", ["euclidean", "chebyshev"])
def test_distance_on_a_grid_with_class_and_register_tokens(grid: Any, prefix: int, metric: str) -> None:
    model, sides = Grid().eval(), grid or (6,)
    x = torch.randn(2, prefix + math.prod(sides), E, generator=torch.Generator().manual_seed(2))
    method = Distance(grid, prefix, metric)
    (got,) = head_importance(model, [x], method).values()
    (curves,) = head_profile(model, [x], method).values()
    maps = model.map(x)[:, :, prefix:, prefix:]
    for h in range(H):
        moment = total = 0.0
        at: dict[int, float] = {}
        for (b, i, j), p in np.ndenumerate(maps[:, h].detach().numpy()):
            apart = [abs(a - c) for a, c in zip(np.unravel_index(i, sides), np.unravel_index(j, sides), strict=True)]
            d = math.hypot(*apart) if metric == "euclidean" else max(apart)
            moment, total = moment + p * d, total + p
            at[math.floor(d + 0.5)] = at.get(math.floor(d + 0.5), 0.0) + p
            assert b < 2
        assert got[h] == pytest.approx(moment / total, rel=1e-5)
        assert curves.at == tuple(range(max(at) + 1))
        want = [at.get(n, 0.0) / total for n in range(max(at) + 1)]
        assert curves.values[h] == pytest.approx(want, rel=1e-5, abs=1e-9)
    assert curves.axis == "distance in tokens"


def test_a_class_token_that_takes_all_does_not_make_a_head_local() -> None:
    """Queries look at the class token and at the most distant patch alone."""
    model = Grid().eval()
    for p in model.parameters():
        p.data.zero_()
    model.layer.q.weight.data[:5, :5] = 40 * torch.eye(5).flip(0)  # query i looks for the feature of token 4 - i
    model.layer.k.weight.data[:5, :5] = torch.eye(5)
    model.layer.q.weight.data[5, 6] = 40.0
    model.layer.k.weight.data[5, 5] = 1.0
    x = torch.zeros(1, 6, E)
    x[0, 1:, :5] = torch.eye(5)
    x[0, :, 6] = 1.0
    x[0, 0, 5] = 1.05  # the class token, a little more attractive than the patch
    got = head_importance(model, [x], Distance((5,), prefix=1))[""][0]
    assert model.map(x)[0, 0, 1:, 0].min() > 0.8
    assert got == pytest.approx((4 + 2 + 0 + 2 + 4) / 5, rel=1e-3)


def test_a_grid_that_does_not_fit() -> None:
    model, x = Grid().eval(), torch.randn(2, 10, E)
    with pytest.raises(CalibrationError, match=r"expected 1 \+ 2 x 3 tokens, found 10 tokens") as caught:
        head_importance(model, [x], Distance((2, 3), prefix=1))
    assert caught.value.hint == "score the other sites alone, with sites="
    with pytest.raises(CalibrationError, match=r"its 7 tokens are not the 0 \+ 10 of distance\(grid=\(10,\)\)"):
        head_importance(model, [x, x[:, :7]], Distance((10,)))
    with pytest.raises(CalibrationError, match="its 10 tokens are not the 10"):
        head_importance(model, [x], Distance(prefix=10))


def test_distance_needs_one_sequence() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            found: Tensor = self.attention(x, y, y, need_weights=False)[0]
            return found

    model, args = Cross().eval(), (torch.randn(2, 5, 16), torch.randn(2, 9, 16))
    with pytest.raises(CalibrationError, match=r"distance does not apply \[needs-self-attention\]"):
        head_importance(model, [args], "distance")
    with pytest.warns(attnopt.AttnoptWarning, match="the policy changes nothing"):
        fast = attnopt.optimize(
            model, attnopt.passes.PruneHeads(0.25, importance="locality"), args, calibration=[args] * 4
        )
    assert "needs-self-attention" in str(fast.report)
    (mass,) = head_importance(model, [args], SegmentMass(None, (0, 4))).values()
    assert all(0 < m < 1 for m in mass)


# ---------------------------------------------------------------- ranks
def test_ranks_are_those_of_products_over_all_tokens(case: Any) -> None:
    model, _, seen, _ = case
    ends = np.cumsum(seen.sum(1).numpy())[:-1]
    qk, ov = scored(case, QkRank(0.9)), scored(case, OvRank(0.9))
    for layer in range(2):
        q, k, v = (vectors(case, layer, role).numpy() for role in "qkv")
        out = model.layers[layer].o.weight.double().unflatten(1, (H, D)).numpy()
        for h in range(H):
            centred = np.concatenate([x - x.mean(0) for x in np.split(k[h], ends)])
            for got, product in ((qk, q[h] @ centred.T), (ov, v[h] @ out[:, h].T)):
                squares = np.linalg.svd(product, compute_uv=False) ** 2
                want = 1 + np.searchsorted(np.cumsum(squares), 0.9 * squares.sum())
                assert got[layer][h] == want


def test_planted_ranks() -> None:
    model, _, _ = data()
    g = torch.Generator().manual_seed(0)
    layer = model.layers[0]
    for h, r in ((0, 1), (2, 3)):
        block = slice(h * D, h * D + D)
        layer.q.weight[block] = torch.randn(D, r, generator=g) @ torch.randn(r, E, generator=g)
        layer.o.weight[:, block] = torch.randn(E, r, generator=g) @ torch.randn(r, D, generator=g)
    layer.k.weight[D : 2 * D] = 0.0  # head 1 has constant keys
    many = [torch.randint(0, 10, (16, L), generator=g)]
    for method, wanted in ((QkRank(1.0), {0: 1.0, 1: 0.0, 2: 3.0}), (OvRank(1.0), {0: 1.0, 2: 3.0})):
        got = head_importance(model, many, method)["layers.0"]
        assert {h: got[h] for h in wanted} == wanted
        curves = head_profile(model, many, method)["layers.0"]
        assert curves.at == tuple(range(1, D + 1))
        assert curves.values[0] == pytest.approx([1.0] * D)
        assert curves.values[2][2] == pytest.approx(1.0)
        assert curves.values[2][1] < 0.9999


def test_ov_rank_needs_an_output_projection() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (2, 8)).transpose(1, 2)
            out: Tensor = (q @ q.mT).softmax(-1) @ q
            return out

    with pytest.raises(CalibrationError, match="the output projection of its heads is unknown"):
        head_importance(Bare(), [torch.randn(2, 5, 16)], "ov-rank")
    assert head_importance(Bare(), [torch.randn(2, 5, 16)], "qk-rank")[""][0] > 0


# ---------------------------------------------------------------- all of them
NAMES = [
    "entropy",
    "distance",
    "locality",
    "sink-mass",
    "massive-features",
    "max-logit",
    "query-norm",
    "key-norm",
    "qk-rank",
]


@pytest.mark.parametrize("name", NAMES)
def test_without_calibration_a_site_has_none(name: str) -> None:
    from attnopt.fit.importance_methods import importance, scored

    model, ids, seen = data()
    site = attnopt.inspect(model, (ids, seen)).sites[0]
    with pytest.raises(CalibrationError, match=r"layers\.0: there is no calibration data for it"):
        scored(importance("test", "method", name), site)


def test_one_head_is_scored_like_many() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
            return out

    torch.manual_seed(0)
    model, x = One().eval(), torch.randn(2, 6, 8)
    p = (model.q(x) @ model.k(x).mT / 8**0.5).softmax(-1).detach().double()
    apart = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    (got,) = head_importance(model, [x], "distance").values()
    assert got == pytest.approx([float((p * apart).sum() / p.sum())], rel=1e-5)
    (got,) = head_importance(model, [x], SinkMass(None)).values()
    assert got == pytest.approx([float(p.mean(1).amax(1).mean())], rel=1e-5)
    for name in NAMES:
        assert all(len(s) == 1 for s in head_importance(model, [x], name).values())


def test_statistics_in_half_precision() -> None:
    model, ids, seen = data()
    want = head_importance(model, [(ids, seen)], "sink-mass")
    got = head_importance(copy.deepcopy(model).bfloat16(), [(ids, seen)], "sink-mass")
    for site in want:
        assert got[site] == pytest.approx(want[site], abs=0.05)
    assert COPY.stop == E
