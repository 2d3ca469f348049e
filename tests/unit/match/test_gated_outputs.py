"""Factors by token and head between an attention and its output projection, as in gated attention and mixtures of heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from variants import mostly_slow

import attnopt
from attnopt.passes import (
    AddValues,
    GroupedQuery,
    HeadPatch,
    LocalWindow,
    PoolKeys,
    PruneHeads,
    RouteHeads,
    ScaleHeads,
    SegmentGain,
    Steer,
)

pytestmark = pytest.mark.usefixtures("one_capture")

E, H, D = 24, 4, 6
Edit = Callable[[Tensor], Tensor]


class Gated(nn.Module):
    """``edit`` changes head outputs [B, H, L, D] before their factors."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.q, self.k, self.v, self.out = (nn.Linear(E, H * D) for _ in range(4))
        self.gate = nn.Linear(E, H * D if spelling in ("features", "packed") else H)
        self.kinds = nn.Linear(E, 2)
        self.both = nn.Linear(E, 2 * H * D)
        self.edit: Edit | None = None

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        if self.spelling == "packed":  # Qwen3-Next: queries and gates of a head side by side
            q, features = self.both(x).view(B, L, H, 2 * D).chunk(2, -1)
            q = q.transpose(1, 2)
        else:
            q = self.q(x).view(B, L, H, D).transpose(1, 2)
        k, v = (f(x).view(B, L, H, D).transpose(1, 2) for f in (self.k, self.v))
        o = (q @ k.mT / D**0.5).softmax(-1) @ v
        if self.edit is not None:
            o = self.edit(o)
        if self.spelling == "packed":
            return self.out(o.transpose(1, 2).flatten(2) * features.flatten(2).sigmoid())
        gate = self.gate(x)
        if self.spelling == "tokens first":
            o = o.transpose(1, 2) * gate.sigmoid().unsqueeze(-1)
            return self.out(o.reshape(B, L, -1))
        if self.spelling == "heads first":
            o = o * gate.sigmoid().transpose(1, 2)[..., None]
            return self.out(o.transpose(1, 2).reshape(B, L, -1))
        if self.spelling == "features":
            return self.out(o.transpose(1, 2).flatten(2) * gate.sigmoid())
        return self.out(torch.einsum("bhld,blh->blhd", o, self.of_mixture(gate, x)).flatten(2))

    def of_mixture(self, scores: Tensor, x: Tensor) -> Tensor:
        """MoH: one shared head, and the two best of the three others."""
        shared, routed = scores[..., :1].softmax(-1), scores[..., 1:].softmax(-1)
        chosen = torch.zeros_like(routed).scatter(-1, routed.topk(2, -1).indices, 1.0)
        routed = routed * chosen
        routed = 2 * routed / routed.sum(-1, keepdim=True)
        alpha = 2 * self.kinds(x).softmax(-1)
        return torch.cat([alpha[..., :1] * shared, alpha[..., 1:] * routed], -1)


SPELLINGS = ["tokens first", "heads first", "features", "packed", "mixture"]


def made(spelling: str) -> tuple[Gated, Tensor]:
    torch.manual_seed(0)
    return Gated(spelling).eval(), torch.randn(2, 9, E)


def edited(model: Gated, x: Tensor, edit: Edit) -> Tensor:
    model.edit = edit
    try:
        with torch.no_grad():
            result: Tensor = model(x)
    finally:
        model.edit = None
    return result


def times(*factors: float) -> Edit:
    return lambda o: o * torch.tensor(factors)[:, None, None]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_found_with_its_factor(spelling: str, tmp_path: Path) -> None:
    model, x = made(spelling)
    fast = attnopt.optimize(model, args=(x,), dynamic_shapes="auto")
    (site,) = fast.sites
    assert (site.status, site.num_heads, site.head_dim) == ("rewritten", H, D)
    assert site.projections["out"].rows == tuple(tuple(range(h * D, (h + 1) * D)) for h in range(H))
    assert not site.projections["out"].direct
    for shape in ((2, 9), (3, 5)):
        given = torch.randn(*shape, E)
        torch.testing.assert_close(fast(given), model(given), atol=1e-5, rtol=1e-5)
    fast.export_onnx(tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x), atol=1e-4, rtol=1e-4)


SHIFT = torch.arange(float(D)) / 10
PASSES = {
    "prune": (PruneHeads(heads=[1, 2]), times(1, 0, 0, 1)),
    "scale": (ScaleHeads({0: 0.5, 3: 2.0}), times(0.5, 1, 1, 2)),
    "patch": (HeadPatch([2], SHIFT[None]), lambda o: torch.cat([o[:, :2], SHIFT.expand_as(o[:, 2:3]), o[:, 3:]], 1)),
    "steer": (Steer(SHIFT, heads=[1]), lambda o: torch.cat([o[:, :1], o[:, 1:2] + SHIFT, o[:, 2:]], 1)),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_passes_change_what_the_factor_multiplies(spelling: str, name: str) -> None:
    policy, edit = PASSES[name]
    model, x = made(spelling)
    want = edited(model, x, edit)
    fast = attnopt.optimize(model, policy, (x,))
    assert fast.report.sites[0].status == "rewritten", fast.report
    torch.testing.assert_close(fast(x), want, atol=1e-5, rtol=1e-5)
    assert float((want - model(x).detach()).abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")
@pytest.mark.parametrize("spelling", mostly_slow(SPELLINGS, "packed"))
def test_passes_equal_the_reference_or_are_refused(spelling: str) -> None:
    model, x = made(spelling)
    data = [torch.randn(2, 9, E) for _ in range(8)]
    policies = [
        LocalWindow(2),
        PoolKeys(3, heads=[0]),
        SegmentGain([1], 0.5),
        AddValues([2], alpha=0.3),
        RouteHeads([0], routed=2),
        RouteHeads([0], routed=2, router="linear"),
        GroupedQuery(kv_heads=2),
        GroupedQuery(kv_heads=2, compensate="least-squares"),
        PruneHeads(fraction=0.5, importance="output-norm"),
        PruneHeads(fraction=0.5, compensate="least-squares"),
    ]
    for policy in policies:
        fast = attnopt.optimize(model, policy, (x,), calibration=data)
        plain = attnopt.optimize(model, policy, (x,), calibration=data, backend="reference")
        assert fast.report.sites[0].status == plain.report.sites[0].status
        torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-5)
        if fast.report.sites[0].status == "refused":
            torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_reads_the_output_projection_is_refused(spelling: str) -> None:
    """Head outputs reach it times a factor, so that it says nothing about them alone."""
    model, x = made(spelling)
    data = [torch.randn(2, 9, E) for _ in range(8)]
    for policy in (
        RouteHeads([0], routed=2, router="linear"),
        PruneHeads(fraction=0.5, compensate="least-squares"),
        PruneHeads(fraction=0.5, importance="output-norm"),
    ):
        (site,) = attnopt.optimize(model, policy, (x,), calibration=data).report.sites
        assert "the head outputs are scaled before it" in "".join(map(str, site.refusals.values())), policy
