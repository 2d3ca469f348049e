"""Latent keys and values: what is promised of the numbers, on models whose latents are known."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from models import LENGTH, Attention, Spelling, inputs
from torch import Tensor, nn
from variants import mostly_slow

import attnopt
from attnopt.errors import PolicyError
from attnopt.fit.absorbable_maps import as_real
from attnopt.fit.latents import Energies, latent_edits
from attnopt.ir.interfaces import Rewrite
from attnopt.ir.site import Site
from attnopt.passes import GroupedQuery, LatentKv, LocalWindow, PruneHeads, Steer
from attnopt.passes.latent_kv import WEIGHTS

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning"),  # a refusal leaves a policy without effect
]
SHOWN = [
    Spelling(),
    Spelling(core="sdpa", mask=("causal",), rope="half", bias=False),
    Spelling(heads=6, kv_heads=3, width=11, head_dim=4, value_dim=6, core="grouped", op="parameter"),
    Spelling(packing="fused", op="addmm", unpack="split", rope="interleaved", mask=("causal", "padding")),
    Spelling(heads=4, kv_heads=2, packing="per-group", core="einsum"),
    Spelling(op="conv1d", packing="kv", core="bmm"),
    Spelling(cross=True, packing="kv", head_dim=2),
    Spelling(kv_heads=1, core="grouped", rope="half", mask=("causal",), head_dim=8, width=11),
    Spelling(kv_heads=1, core="grouped", rope="interleaved", mask=("causal",), head_dim=8, bias=False),
    Spelling(kv_heads=1, core="grouped", rope="chunks", head_dim=8),
]
RANK = 5


def stored(model: Attention) -> list[tuple[Tensor, Tensor, bool]]:
    """Weight, row indices and whether they are columns, of keys and of values."""
    known, found = model.expected_projections(), []
    for role in "kv":
        p = known[role]
        rows = torch.tensor([r for head in p["rows"] for r in head])
        found.append((model.get_parameter(p["weight"]).data, rows, bool(p["transposed"])))
    return found


def stacked(model: Attention) -> Tensor:
    """[keys and values, in]"""
    return torch.cat([(w[:, rows].T if by_column else w[rows].flatten(1)) for w, rows, by_column in stored(model)])


def put(model: Attention, rows_now: Tensor) -> None:
    at = 0
    for weight, rows, by_column in stored(model):
        new = rows_now[at : at + len(rows)]
        if by_column:
            weight[:, rows] = new.T
        else:
            weight[rows] = new.view_as(weight[rows])
        at += len(rows)


def of_rank(s: Spelling, rank: int) -> Attention:
    """Whose keys and values together have this rank."""
    model = Attention(s)
    u, size, vh = torch.linalg.svd(stacked(model))
    put(model, (u[:, :rank] * size[:rank]) @ vh[:rank])
    return model


def data(s: Spelling, count: int = 3, length: int = LENGTH) -> list[dict[str, Tensor]]:
    made = []
    for i in range(count):
        given, random = inputs(s, length, batch=4), torch.Generator().manual_seed(i)
        for name in {"x", "memory"} & given.keys():
            given[name] = torch.randn(given[name].shape, generator=random)
        made.append(given)
    return made


def optimized(model: nn.Module, policy: Any, batches: list[Any], **options: Any) -> attnopt.OptimizedModel:
    return attnopt.optimize(model, policy, (), batches[0], calibration=batches, **options)


def rewritten(fast: attnopt.OptimizedModel) -> Site:
    """With the weights that it has now, in a form in which they can be read."""
    (status,) = [site.status for site in fast.report.sites]
    assert status == "rewritten", fast.report
    (site,) = attnopt.inspect(fast.graph_module, *fast.origin.inputs).sites
    return site


def rank_of(site: Site) -> int:
    weights = [site.head_weight(role, h) for role in "kv" for h in site.spec.kv_heads]
    assert all(w is not None for w in weights)
    return int(torch.linalg.matrix_rank(torch.cat(weights).double(), rtol=1e-5))  # type: ignore[arg-type]


@pytest.mark.parametrize("s", mostly_slow(SHOWN, SHOWN[1]), ids=str)
def test_law_latents_that_suffice_change_nothing(s: Spelling) -> None:
    model, batches = of_rank(s, RANK), data(s)
    fast = optimized(model, LatentKv(RANK, compensate="none"), batches)
    assert rank_of(rewritten(fast)) == RANK
    for given in data(s, 5)[3:]:
        oracle.assert_same(oracle.run(fast, (), given), oracle.run(model, (), given))


@pytest.mark.parametrize("s", mostly_slow(SHOWN, SHOWN[1]), ids=str)
def test_law_fewer_are_what_is_asked_for(s: Spelling) -> None:
    model, batches = of_rank(s, RANK + 2), data(s)
    fast = optimized(model, LatentKv(RANK, compensate="none"), batches)
    assert rank_of(rewritten(fast)) == RANK
    oracle.assert_differs(oracle.run(fast, (), batches[0]), oracle.run(model, (), batches[0]))


@pytest.mark.parametrize("s", mostly_slow(SHOWN[:3], SHOWN[1]), ids=str)
def test_law_as_many_as_there_can_be_change_nothing(s: Spelling) -> None:
    model, batches = Attention(s), data(s)
    most = min(s.width, s.kv_heads * (s.head_dim + s.value_dim))
    fast = optimized(model, LatentKv(most), batches)
    torch.testing.assert_close(stacked(model), torch.cat(_weights(rewritten(fast))), atol=0, rtol=0)
    assert rank_of(rewritten(optimized(model, LatentKv(most - 1), batches))) == most - 1


def test_biases_keep_the_means() -> None:
    s = Spelling(core="sdpa", mask=("causal",))
    model, batches = Attention(s), data(s)
    for given in batches:
        given["x"] += 2 * torch.arange(s.width)
    x = torch.cat([given["x"] for given in batches]).flatten(0, 1)
    site = rewritten(optimized(model, LatentKv(2, compensate="none"), batches))
    biases = torch.cat([b for role in "kv" for h in range(4) if (b := site.head_bias(role, h)) is not None])
    got = x @ torch.cat(_weights(site)).T + biases
    want = torch.cat([model.k_proj(x), model.v_proj(x)], 1).detach()
    torch.testing.assert_close(got.mean(0), want.mean(0), atol=1e-3, rtol=1e-4)
    assert float((got - want).abs().max()) > 0.1


def _weights(site: Site) -> list[Tensor]:
    return [w for role in "kv" for h in site.spec.kv_heads if (w := site.head_weight(role, h)) is not None]


@pytest.mark.slow
@pytest.mark.parametrize("rope", ["", "half"])
def test_what_nothing_reads_is_left_out_first(rope: str) -> None:
    """Queries without half of their features, and half of the values' columns of the output projection: a quarter of keys and
    values, of each head, is enough."""
    s = Spelling(heads=2, kv_heads=2, width=16, head_dim=4, value_dim=4, rope=rope, core="sdpa", mask=("causal",))
    model = Attention(s)
    for head in range(2):
        unread = torch.tensor([0, 2] if rope else [1, 2]) + 4 * head  # a pair that is rotated together
        model.q_proj.weight.data[unread] = 0
        model.q_proj.bias.data[unread] = 0
        model.w_out.data[:, 4 * head : 4 * head + 2] = 0
    batches = data(s, 6)
    fast = optimized(model, LatentKv(8, compensate="none"), batches)
    got, want = oracle.run(fast, (), batches[0]), oracle.run(model, (), batches[0])
    assert float((got[0] - want[0]).abs().max() / want[0].abs().max()) < 2e-3
    fewer = oracle.run(optimized(model, LatentKv(7, compensate="none"), batches), (), batches[0])
    assert float((fewer[0] - want[0]).abs().max() / want[0].abs().max()) > 2e-2


def test_queries_are_turned_to_the_places_of_their_keys() -> None:
    """Against the rotations themselves, at each distance."""
    s = Spelling(heads=4, kv_heads=2, core="sdpa", rope="half", mask=("causal",), share="repeat_interleave")
    batches, found = data(s), list[tuple[Site, Any]]()

    class Spy(LatentKv):
        def rewrite(self, site: Site) -> Any:
            found.append((site, Energies().of(site)))
            return super().rewrite(site)

    optimized(Attention(s), Spy(RANK), batches)
    site, energies = found[0]
    assert site.activations is not None
    L, D = batches[0]["x"].shape[1], s.head_dim
    angle = torch.arange(L, dtype=torch.float64)[:, None] * 10.0 ** (-torch.arange(D // 2) / (D // 2))
    pairs = tuple((i, i + D // 2) for i in range(D // 2))

    def turned(x: Tensor, by: Tensor) -> Tensor:
        return x @ as_real(pairs, torch.polar(torch.ones_like(by), by), D)

    distances = sorted({0, *(round((L - 1) ** (n / 13)) for n in range(14))})
    wanted = torch.zeros(2, D, D, dtype=torch.float64)
    for o in site.activations.batches:
        for at in range(L):
            for d in distances:
                place = angle[at] - angle[d]  # of the key, before the first token where it is negative
                q = turned(o.q[:, :, at].double(), -place).unflatten(1, (2, 2))
                wanted += torch.einsum("bghi,bghj->gij", q, q) / len(distances)
    for g in range(2):
        block = energies.keys[0][g * D : (g + 1) * D, g * D : (g + 1) * D]
        torch.testing.assert_close(block @ block.T, wanted[g], atol=1e-4 * float(wanted.max()), rtol=1e-4)


@pytest.mark.slow
def test_held_out_tokens_choose_how_much_keys_count() -> None:
    s = Spelling(heads=4, kv_heads=4, width=16, core="sdpa", mask=("causal",))
    batches, errors, tried = data(s, 8, 20), {}, []

    class One(LatentKv):
        weight = 1.0

        def rewrite(self, site: Site) -> Any:
            tried.append(self.weight)
            return Rewrite(site.spec, latent_edits(site, self.rank, self.weight))

    new, model = data(s, 12, 20)[8:], Attention(s)
    for weight in WEIGHTS:
        One.weight = weight
        errors[weight] = _error(optimized(model, One(6), batches), model, new)
    chosen = _error(optimized(model, LatentKv(6, compensate="none"), batches), model, new)
    assert tried == [*WEIGHTS]
    assert len(set(errors.values())) == 3
    assert chosen <= sorted(errors.values())[1] + 1e-9
    plain, fitted = (optimized(model, LatentKv(6, how), batches) for how in ("none", None))
    assert _error(fitted, model, batches) < _error(plain, model, batches)


def _error(fast: nn.Module, model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    return sum(float((oracle.run(fast, (), b)[0] - oracle.run(model, (), b)[0]).square().sum()) for b in batches)


@pytest.mark.parametrize(
    "first", [[PruneHeads(heads=[1])], [GroupedQuery(2, merge="mean")], [LocalWindow(2, 0)]], ids=str
)
@pytest.mark.slow
def test_it_composes(first: Any) -> None:
    s = Spelling(core="sdpa", mask=("causal",), width=16)
    batches = data(s)
    for policy in ([*first, LatentKv(RANK)], [LatentKv(RANK), *first])[
        : 1 if isinstance(first[0], GroupedQuery) else 2
    ]:
        fast = optimized(Attention(s), policy, batches, strict=True)
        assert rank_of(rewritten(fast)) <= RANK


# ---------------------------------------------------------------- what is refused
class TwoInputs(nn.Module):
    """Keys of one tensor and values of another, of the same tokens."""

    def __init__(self, rotated: bool) -> None:
        super().__init__()
        self.rotated = rotated
        self.q, self.k, self.v, self.o, self.other = (nn.Linear(16, 16) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(x).tanh()
        q, k, v = (p(t).unflatten(-1, (2, 8)).transpose(1, 2) for p, t in ((self.q, x), (self.k, x), (self.v, y)))
        if self.rotated:
            angle = torch.arange(x.shape[1])[:, None] / 100 ** (torch.arange(4) / 4)
            q, k = (
                torch.cat([t[..., :4] * angle.cos() - t[..., 4:] * angle.sin(),
                           t[..., 4:] * angle.cos() + t[..., :4] * angle.sin()], -1)
                for t in (q, k)
            )  # fmt: skip
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rotated", [False, True])
def test_keys_and_values_of_two_tensors_have_no_latents(rotated: bool) -> None:
    batches = [(torch.randn(4, 12, 16),) for _ in range(2)]
    fast = attnopt.optimize(TwoInputs(rotated).eval(), LatentKv(RANK), batches[0], calibration=batches)
    assert fast.report.sites[0].refusals["latent-kv"].code == "several-sources"


def test_other_refusals() -> None:
    def code(s: Spelling, policy: Any, calibrated: bool = True) -> str:
        batches = data(s)
        made = attnopt.optimize(Attention(s), policy, (), batches[0], calibration=batches if calibrated else None)
        return made.report.sites[0].refusals["latent-kv"].code

    assert code(Spelling(), LatentKv(RANK), calibrated=False) == "needs-calibration"
    assert code(Spelling(norm="rms"), LatentKv(RANK)) == "features-are-not-linear"
    assert code(Spelling(norm="across"), LatentKv(RANK)) == "unknown-projection"
    assert code(Spelling(), [Steer(torch.ones(4), [1]), LatentKv(RANK)]) == "already-edited"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LatentKv(0), "latent-kv: invalid value rank=0"),
        (lambda: LatentKv(4, compensate="bias"), "latent-kv: invalid value compensate='bias'"),
        (lambda: LatentKv(4, compensate="all"), "all"),
    ],
)
def test_bad_options(make: Any, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        make()
