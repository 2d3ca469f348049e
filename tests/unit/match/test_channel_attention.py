"""Attention between channels (XCiT, DaViT, EdgeNeXt): queries and keys are features of the projections, which tokens describe."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracle import assert_same, run
from torch import Tensor, nn
from torch.nn import functional as F
from travelling import assert_travels

import attnopt
from attnopt.errors import CalibrationError, PolicyError
from attnopt.passes import GroupedQuery, HeadPatch, LocalWindow, PruneHeads, ScaleHeads, Sparse
from attnopt.patterns import Causal

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning"),
]
B, N, H, C = 2, 7, 3, 4
WIDTH = H * C


class Channels(nn.Module):
    """[B, N, WIDTH] -> [B, N, WIDTH]; subclasses say how it is written.  Queries, keys and values are those of the meaning."""

    heads = H

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.temperature = nn.Parameter(torch.rand(H, 1, 1) + 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.mixed(*(f(x) for f in (self.q, self.k, self.v))))
        return made

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class CrossCovariance(Channels):
    """As XCiT writes it: of unit length along the tokens."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (H, C)).permute(0, 2, 3, 1) for t in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return (weights @ v).permute(0, 3, 1, 2).flatten(2)


class Transposed(Channels):
    """As DaViT writes it: heads of tokens, transposed at the products."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (H, C)).transpose(1, 2) for t in (q, k, v))
        weights = ((q * C**-0.5).transpose(-1, -2) @ k).softmax(-1)
        return (weights @ v.transpose(-1, -2)).transpose(-1, -2).transpose(1, 2).flatten(2)


class Einsum(Channels):
    """Heads stay last, exponentials are divided by hand."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (H, C)) for t in (q, k, v))
        scores = torch.einsum("bnhi,bnhj->bhij", q, k) / 4 + self.temperature
        powers = (scores - scores.amax(-1, keepdim=True)).exp()
        return torch.einsum("bhij,bnhj->bnhi", powers / powers.sum(-1, keepdim=True), v).flatten(2)


class Fused(Channels):
    """torch's fused attention of transposed operands."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).unflatten(1, (H, C)) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=0.5).flatten(1, 2).transpose(1, 2)


class Folded(Channels):
    """Heads in the batch, keys before queries, a normaliser over the first axis of the map."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).reshape(len(t) * H, C, t.shape[1]) for t in (q, k, v))
        weights = torch.bmm(k, q.transpose(1, 2)).mul(0.3).softmax(1)
        return torch.bmm(weights.transpose(1, 2), v).reshape(-1, WIDTH, v.shape[2]).transpose(1, 2)


class OneHead(Channels):
    """All channels in one head."""

    heads = 1

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q.mT @ k * 0.2).softmax(-1)
        return (weights @ v.mT).mT


class FewerKeys(Channels):
    """Half as many channels of keys and values in each head as of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (nn.Linear(WIDTH, H * 2) for _ in range(2))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.unflatten(-1, (H, C)).permute(0, 2, 3, 1)
        k, v = (t.unflatten(-1, (H, 2)).permute(0, 2, 3, 1) for t in (k, v))
        return ((q @ k.mT * 0.3).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2)


class OneKeyHead(Channels):
    """All heads share the channels of one head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (nn.Linear(WIDTH, C) for _ in range(2))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.unflatten(-1, (H, C)).permute(0, 2, 3, 1)
        k, v = k.mT.unsqueeze(1), v.mT.unsqueeze(1)
        return ((q @ k.mT * 0.3).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2)


SPELLINGS = (CrossCovariance, Transposed, Einsum, Fused, Folded, OneHead, FewerKeys, OneKeyHead)
each = pytest.mark.parametrize("kind", SPELLINGS, ids=lambda kind: kind.__name__)


def made(kind: type[nn.Module]) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return zoo.loud(kind()), torch.randn(B, N, WIDTH)


def rows_of(heads: int) -> tuple[tuple[int, ...], ...]:
    size = WIDTH // heads
    return tuple(tuple(range(h * size, (h + 1) * size)) for h in range(heads))


@each
def test_read_and_equal_at_other_sizes(kind: type[Channels]) -> None:
    model, x = made(kind)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes="auto")
    (site,) = fast.sites
    assert site.spec.between_channels
    assert not site.is_cross
    assert (site.num_heads, site.q_len) == (kind.heads, WIDTH // kind.heads)
    assert site.projections["q"].rows == site.projections["out"].rows == rows_of(kind.heads)
    assert "between channels" in str(attnopt.inspect(model, (x,)))
    for batch, tokens in ((B, N), (1, 12), (3, 2)):
        other = torch.randn(batch, tokens, WIDTH)
        assert_same(run(fast, (other,)), run(model, (other,)))


@each
def test_gains_and_pruned_heads(kind: type[Channels]) -> None:
    model, x = made(kind)
    gains = (0.5, 0.0, -2.0)[: kind.heads]
    meant = copy.deepcopy(model)
    with torch.no_grad():
        for rows, gain in zip(rows_of(kind.heads), gains, strict=True):
            meant.out.weight[:, list(rows)] *= gain
    assert_same(run(attnopt.optimize(model, ScaleHeads(gains), (x,)), (x,)), run(meant, (x,)))
    if kind.heads == 1:
        return
    pruned = attnopt.optimize(model, PruneHeads(heads=[1]), (x,))
    meant = copy.deepcopy(model)
    with torch.no_grad():
        meant.out.weight[:, C : 2 * C] = 0
    assert_same(run(pruned, (x,)), run(meant, (x,)))
    assert (WIDTH, WIDTH - C) in {tuple(p.shape) for p in pruned.parameters()}
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, pruned))
    assert after <= before - 2 * C * WIDTH - C


@pytest.mark.usefixtures("one_torchlib")
def test_saved_and_in_onnx_at_other_sizes(tmp_path: Path) -> None:
    model, x = made(CrossCovariance)
    fast = attnopt.optimize(model, ScaleHeads([0.5, 1.0, 2.0]), (x,), dynamic_shapes="auto")
    assert_travels(fast, tmp_path, [torch.randn(B, N, WIDTH), torch.randn(1, 12, WIDTH)])


def test_what_needs_tokens_is_refused() -> None:
    model, x = made(Transposed)
    for policy in (LocalWindow(1), Sparse(Causal()), GroupedQuery(kv_heads=1), HeadPatch([0])):
        fast = attnopt.optimize(model, policy, (x,))
        (entry,) = fast.report.sites
        (refusal,) = entry.refusals.values()
        assert (entry.status, refusal.code) == ("refused", "between-channels")
        assert_same(run(fast, (x,)), run(model, (x,)))
    by_weights = attnopt.optimize(model, PruneHeads(fraction=0.4), (x,), calibration=[x])
    assert by_weights.report.sites[0].refusals["prune-heads"].code == "between-channels"
    given = attnopt.optimize(model, PruneHeads(fraction=0.4, importance=[3.0, 1.0, 2.0]), (x,), calibration=[x])
    assert given.sites[0].spec.heads == (0, 2)
    whole = attnopt.optimize(model, PruneHeads(heads=[0, 1, 2], whole_layers=True), (x,))
    assert whole.report.sites[0].refusals["prune-heads"].code == "between-channels"


def test_studies_of_tokens_leave_it_out() -> None:
    model, x = made(Transposed)
    with pytest.raises(PolicyError, match="attends between channels"):
        attnopt.collect(model, [x], "weights")
    with pytest.raises(PolicyError, match="attends between channels"):
        attnopt.expose(model, {"*": "outputs"}, (x,))
    with pytest.raises(CalibrationError, match="between-channels"):
        attnopt.head_importance(model, [x], "entropy")
    with pytest.raises(PolicyError, match="between channels"):
        attnopt.advise(attnopt.inspect(model, (x,)).sites[0], Causal())
    found = attnopt.head_importance(model, [x], "ablation")
    assert len(next(iter(found.scores.values()))) == H


class Beside(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.between = Transposed()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.between(x)
        q, k, v = (f(x).unflatten(-1, (H, C)).transpose(1, 2) for f in (self.q, self.k, self.v))
        made: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + made


def test_beside_an_attention_of_tokens() -> None:
    model, x = made(Beside)
    assert [s.spec.between_channels for s in attnopt.inspect(model, (x,)).sites] == [True, False]
    collected = attnopt.collect(model, [x], "weights")
    assert list(collected) == [""]
    fast = attnopt.optimize(model, LocalWindow(1), (x,))
    assert [s.status for s in fast.report.sites] == ["refused", "rewritten"]


# ---------------------------------------------------------------- real models
REAL: dict[str, tuple[dict[str, Any], int, list[bool]]] = {
    "davit_tiny": (
        {"embed_dims": (24,), "depths": (1,), "num_heads": (3,)}, 32, [False, True],
    ),
    "xcit_nano_12_p16_224": ({"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}, 32, [True, True, False, False]),
    "edgenext_xx_small": ({}, 64, [True, True, True]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_models_of_timm(name: str) -> None:
    options, size, kinds = REAL[name]
    model = zoo.timm_model(name, **options)
    x = torch.randn(2, 3, size, size)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes={"x": {0: torch.export.Dim("b")}})
    assert [s.spec.between_channels for s in fast.sites] == kinds
    assert not fast.report.near_misses
    for batch in (2, 1, 4):
        other = torch.randn(batch, 3, size, size)
        assert_same(run(fast, (other,)), run(model, (other,)))
    scaled = attnopt.optimize(model, ScaleHeads({0: 0.5}), (x,))
    assert all(s.status == "rewritten" for s in scaled.report.sites)
