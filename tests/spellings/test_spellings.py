"""Spellings of the grammar in ``models`` that must be found and read off exactly.  Random ones are in ``test_fuzz``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from models import LENGTH, Attention, Spelling, inputs
from must_match import MUST_MATCH

import attnopt
from attnopt.passes import GroupedQuery, PruneHeads, ScaleHeads


# ---------------------------------------------------------------- helpers
@dataclass(frozen=True)
class Case:
    """A spelling's model with its inputs."""

    s: Spelling
    model: Attention
    given: dict[str, Any]

    @classmethod
    def of(cls, s: Spelling, **options: Any) -> Case:
        return cls(s, Attention(s, **options), inputs(s))

    def own(self) -> list[torch.Tensor]:
        return oracle.run(self.model, (), self.given)

    def optimized(self, policy: Any) -> attnopt.OptimizedModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", attnopt.AttnoptWarning)
            return attnopt.optimize(self.model, policy, (), self.given)


def check(case: Case, policy: Any, gains: dict[int, float]) -> None:
    """Rewritten as the oracle says."""
    fast = case.optimized(policy)
    (entry,) = fast.report.sites
    assert entry.status == "rewritten"
    assert not entry.refusals
    oracle.assert_same(oracle.run(fast, (), case.given), oracle.run(case.model.with_gains(gains), (), case.given))


def check_spec(case: Case, site: attnopt.Site) -> None:
    s = case.s
    assert site.num_heads == s.heads
    assert site.num_kv_heads == s.kv_heads
    assert site.spec.kv_of_head == s.kv_of_head
    assert (site.head_dim, site.value_dim) == (s.head_dim, s.value_dim)
    assert site.is_cross == s.cross
    assert site.spec.has_sinks == s.sinks
    assert site.spec.softcap == pytest.approx(s.softcap) if s.softcap else site.spec.softcap is None
    expected = case.model.expected_projections()
    for role, want in expected.items():
        found = site.projections[role]
        if found.rows is None:
            assert found.why
            continue
        assert {"weight": found.weight, "transposed": found.transposed, "rows": found.rows} == {
            k: want[k] for k in ("weight", "transposed", "rows")
        }, role
        assert found.bias in (None, want["bias"])


@pytest.mark.parametrize("core", ["matmul", "sdpa", "bmm"])
def test_a_single_head_is_no_batch(core: str) -> None:
    """Scores [B, 1, L, S]: the first head is not the first sequence of the batch."""
    case = Case.of(Spelling(heads=1, kv_heads=1, core=core))
    check(case, ScaleHeads({0: 2.0}), {0: 2.0})
    for policy in (PruneHeads(heads=[0]), PruneHeads(heads=[1]), ScaleHeads({1: 2.0})):
        fast = case.optimized(policy)
        assert fast.report.sites[0].status == "refused"
        oracle.assert_same(oracle.run(fast, (), case.given), case.own())


@pytest.mark.parametrize("core", ["bmm", "baddbmm"])
def test_heads_behind_a_norm_across_them(core: str) -> None:
    """Scores [B*H, L, S], and queries whose heads a norm hides: the values still tell them apart."""
    case = Case.of(Spelling(core=core, norm="across"))
    check(case, ScaleHeads({0: 2.0}), {0: 2.0})
    check(case, PruneHeads(heads=[1]), {1: 0.0})


# ---------------------------------------------------------------- read-off of spellings that must match


def described(s: Spelling) -> str:
    plain = Spelling()
    return ",".join(f"{k}={v}" for k, v in vars(s).items() if getattr(plain, k) != v) or "plain"


@pytest.mark.parametrize(("s", "want"), MUST_MATCH, ids=[described(s) for s, _ in MUST_MATCH])
def test_spelling_must_match(s: Spelling, want: dict[str, Any]) -> None:
    assert s == s.repaired()
    case = Case.of(s)
    found = attnopt.inspect(case.model, (), case.given)
    assert [site.name for site in found.sites] == [""], [str(n.refusal) for n in found.near_misses]
    (site,) = found.sites
    check_spec(case, site)
    for name, value in want.items():
        got = getattr(site.spec, name)
        assert (str(got) if name in ("pattern", "seen_as") else got) == (
            pytest.approx(value) if isinstance(value, float) else value
        ), name
    if s.op != "einsum" and s.norm != "across":  # where rows cannot be told, ``why`` is enough
        expected = case.model.expected_projections()
        read = {
            role: {"weight": p.weight, "bias": p.bias, "transposed": p.transposed, "rows": p.rows}
            for role, p in site.projections.items()
        }
        if s.op == "parameter":  # the bias may be added by an operator of its own
            for role in expected:
                assert read[role].pop("bias") in (None, expected[role].pop("bias"))
        assert read == expected


def test_returned_weights_are_seen_and_refused() -> None:
    case = Case.of(Spelling(returns="weights"))
    fast = case.optimized(PruneHeads(heads=[0]))
    (entry,) = fast.report.sites
    assert entry.status == "refused"
    assert entry.refusals["prune-heads"].code == "escapes"
    oracle.assert_same(oracle.run(fast, (), case.given), case.own(), "returned weights", limit=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("s", [Spelling(rope="interleaved"), Spelling(norm="l2")], ids=described)
def test_merged_heads_that_are_read_twice(s: Spelling) -> None:
    """A rotation and a norm read the same features twice: new weights have to arrive on both ways."""
    case = Case.of(s, equal={1: 0, 3: 2})
    fast = case.optimized(GroupedQuery(kv_heads=2, merge="mean"))
    assert fast.report.sites[0].status == "rewritten"
    oracle.assert_same(oracle.run(fast, (), case.given), case.own())
    case.optimized(ScaleHeads({0: 2.0}))
    other = Case.of(s)
    assert other.optimized(GroupedQuery(kv_heads=2, merge="mean")).report.sites[0].status == "rewritten"


class MisdividedByNeighbour(Attention):
    """The product of each query is divided by the sum of the query after it."""

    def _weighted(self, scores: torch.Tensor, padding: Any, product: Any, finish: Any = None, late: Any = None) -> Any:
        e = scores.exp()
        return (product(e) / e.sum(-1, keepdim=True).roll(1, -2)).transpose(1, 2), None


class DividedByOtherAxis(Attention):
    """With as many heads as queries: the sum's heads meet the product's queries."""

    def _weighted(self, scores: torch.Tensor, padding: Any, product: Any, finish: Any = None, late: Any = None) -> Any:
        e = scores.exp()
        return (product(e) / e.sum(-1, keepdim=True).transpose(1, 2)).transpose(1, 2), None


@pytest.mark.parametrize("kind", [MisdividedByNeighbour, DividedByOtherAxis])
def test_another_late_sum_is_no_softmax(kind: type[Attention]) -> None:
    s = Spelling()
    given = inputs(s, length=4)
    model = kind(s)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        fast = attnopt.optimize(model, "fuse", (), given)
    assert not fast.sites
    oracle.assert_same(oracle.run(fast, (), given), oracle.run(model, (), given), limit=0.0)


class Wiped(Attention):
    """Capped scores are multiplied by what ``wipe`` gives, before a causal floor is added."""

    def __init__(self, s: Spelling, wipe: torch.Tensor) -> None:
        super().__init__(s)
        self.register_buffer("wipe", wipe)

    def _masked(self, scores: torch.Tensor, padding: Any, given: Any) -> torch.Tensor:
        return scores * self.wipe + (1 - torch.ones(LENGTH, LENGTH).tril()) * -1e4


@pytest.mark.parametrize(
    ("wipe", "is_mask"),
    [
        (torch.ones(LENGTH, LENGTH).tril(), True),
        (torch.ones(LENGTH, LENGTH).tril(-1), False),  # wipes the diagonal, which the floor leaves visible
        (torch.ones(LENGTH, LENGTH).tril() / 2, False),
        (torch.linspace(0.5, 1.5, LENGTH), False),
    ],
    ids=["mask", "too much", "halves", "a factor of keys"],
)
def test_a_factor_of_capped_scores_is_a_mask_or_nothing(wipe: torch.Tensor, is_mask: bool) -> None:
    s = Spelling(softcap=2.0)
    model, given = Wiped(s, wipe), inputs(s)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        fast = attnopt.optimize(model, PruneHeads(heads=[1]), (), given)
    assert len(fast.sites) == is_mask
    want = model.with_gains({1: 0.0}) if is_mask else model
    oracle.assert_same(oracle.run(fast, (), given), oracle.run(want, (), given))
    if not is_mask:
        assert [miss.refusal.code for miss in fast.report.near_misses] == ["scores-multiplied"]
