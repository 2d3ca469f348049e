"""What is not plain attention is never raised as such, and comes out of ``optimize`` with the model's own numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import decoys
import oracle
import pytest
import torch
from decoys import NEVER, E, H, L
from torch import nn

import attnopt
from attnopt.passes import LocalWindow, PruneHeads, ScaleHeads

pytestmark = pytest.mark.usefixtures("one_capture")

VARIANTS: list[tuple[str, Callable[[], nn.Module]]] = [
    *((kind.__name__, kind) for kind in NEVER),
    ("Routing, best two", partial(decoys.Routing, top=2)),
    ("MappedElsewhere, of scores", partial(decoys.MappedElsewhere, after=False)),
    ("MappedElsewhere, of weights", partial(decoys.MappedElsewhere, after=True)),
]
POLICIES: dict[str, Any] = {
    "fuse": "fuse", "window": LocalWindow(1), "prune": PruneHeads(heads=[0]), "scale": ScaleHeads({0: 3.0}),
}  # fmt: skip


def optimized(model: nn.Module, policy: Any, x: torch.Tensor) -> attnopt.OptimizedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        return attnopt.optimize(model, policy, (x,))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, L, E, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("make", [m for _, m in VARIANTS], ids=[n for n, _ in VARIANTS])
def test_decoy_is_not_raised(make: Callable[[], nn.Module], x: torch.Tensor) -> None:
    model = make().eval()
    own = oracle.run(model, (x,))
    for name, policy in POLICIES.items():
        fast = optimized(model, policy, x)
        oracle.assert_same(oracle.run(fast, (x,)), own, name)
        assert not fast.sites, f"raised as {fast.sites[0].spec}"
    assert not attnopt.inspect(model, (x,)).sites


def test_loud_when_nothing_is_found(x: torch.Tensor) -> None:
    with pytest.warns(attnopt.AttnoptWarning, match="no attention was found"):
        attnopt.optimize(decoys.NonLocal().eval(), "fuse", (x,))


@pytest.mark.parametrize("after", [False, True], ids=["scores", "weights"])
@pytest.mark.parametrize(
    "policy", [p for n, p in POLICIES.items() if n != "fuse"], ids=[n for n in POLICIES if n != "fuse"]
)
def test_scores_that_are_returned_stay(after: bool, policy: Any, x: torch.Tensor) -> None:
    model = decoys.ScoresReturned(after).eval()
    fast = optimized(model, policy, x)
    oracle.assert_same(oracle.run(fast, (x,)), oracle.run(model, (x,)), limit=0.0)
    assert [s.num_heads for s in fast.sites] == [H]
    (entry,) = fast.report.sites
    assert entry.status == "refused"
    assert {r.code for r in entry.refusals.values()} == {"escapes"}


def test_heads_that_attend_to_each_other(x: torch.Tensor) -> None:
    """Attention over another axis than tokens may be seen, if its meaning is kept; windows over tokens make no sense."""
    model = decoys.OverHeads().eval()
    own = oracle.run(model, (x,))
    fast = optimized(model, "fuse", x)
    oracle.assert_same(oracle.run(fast, (x,)), own)
    fast = optimized(model, PruneHeads(heads=[0]), x)
    assert not fast.sites or fast.report.sites[0].status == "refused" or fast.sites[0].num_heads != H


def test_softmax_with_one_more_in_the_sum(x: torch.Tensor) -> None:
    """exp / (1 + sum of exp) is a sink of logit 0."""
    model = decoys.SoftmaxPlusOne().eval()
    fast = optimized(model, "fuse", x)
    oracle.assert_same(oracle.run(fast, (x,)), oracle.run(model, (x,)))
    assert [site.spec.has_sinks for site in fast.sites] == [True]


@pytest.mark.parametrize("kind", [decoys.OverQueries, decoys.Transposed])
def test_a_softmax_over_queries_is_told_from_one_over_keys(kind: type[nn.Module], x: torch.Tensor) -> None:
    model = kind().eval()
    fast = optimized(model, "fuse", x)
    oracle.assert_same(oracle.run(fast, (x,)), oracle.run(model, (x,)))
    assert [site.spec.sends for site in fast.sites] == [True]
    assert not fast.report.near_misses


@pytest.mark.parametrize("kind", [decoys.KernelAttention])
def test_no_softmax_is_told_from_one(kind: type[nn.Module], x: torch.Tensor) -> None:
    """An attention of its own kind, and no softmax is written in the place of none."""
    model = kind().eval()
    own = oracle.run(model, (x,))
    fast = optimized(model, "fuse", x)
    oracle.assert_same(oracle.run(fast, (x,)), own)
    assert [site.spec.linear is None for site in fast.sites] == [False]
    assert not fast.report.near_misses


def test_a_decoy_beside_attention_is_left_alone(x: torch.Tensor) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real, self.decoy = decoys.ScoresReturned(), decoys.TopK()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decoy(x + self.real(x)[0])

    model = Both().eval()
    fast = optimized(model, PruneHeads(heads=[1]), x)
    assert [s.name for s in fast.sites] == ["real"]
    assert fast.report.sites[0].status == "rewritten"
    assert any(miss.name.startswith("decoy") for miss in fast.report.near_misses)
    with oracle.edited({0: oracle.Edit(gains=(1.0, 0.0, 1.0))}):
        want = oracle.run(model, (x,))
    oracle.assert_same(oracle.run(fast, (x,)), want)
