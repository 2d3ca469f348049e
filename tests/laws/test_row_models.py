"""Models whose rows are chosen: the same as with zeros in the other rows of their maps, everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnxruntime
import oracle
import pytest
import torch
from models import Attention, Spelling, inputs
from torch import Tensor, nn
from zoo import SMALL, hf, ids, pixels

import attnopt
from attnopt.passes import LocalWindow, PruneHeads, QueryRows, ScaleHeads
from attnopt.patterns import Window

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def kept_by_hand(rank: list[float], real: list[bool], keep: float | int, prefix: int) -> list[bool]:
    free = [i for i in range(prefix, len(rank)) if real[i]]
    count = keep if isinstance(keep, int) else math.ceil(keep * len(free))
    best = sorted(free, key=lambda i: (-rank[i], i))[:count]
    return [i < prefix or i in best for i in range(len(rank))]


def zeroed(
    p: Tensor, keep: float | int, prefix: int, stride: int, heads: list[int] | None = None, real: Tensor | None = None
) -> Tensor:
    """Weights [B, H, L, S] without the rows whose tokens receive least from ``heads``."""
    B, H, L, _ = p.shape
    some = [*range(H)] if heads is None else heads
    marks = torch.ones(B, L, dtype=torch.bool) if real is None else real
    made = p.clone()
    for b in range(B):
        voters = [i for i in range(0, L, stride) if marks[b, i]]
        received = p[b, some][:, voters].double().sum((0, 1))
        relative = (received / received.sum() * marks[b].sum()).clamp(min=1e-38)
        kept = kept_by_hand((relative.log() * 4096).round().tolist(), marks[b].tolist(), keep, prefix)
        for h in some:
            made[b, h, [not k for k in kept]] = 0.0
    return made


def edits(count: int, change: Callable[[Tensor], Tensor], **more: Any) -> dict[int, oracle.Edit]:
    return dict.fromkeys(range(count), oracle.Edit(weights=change, **more))


def vit(impl: str = "eager") -> nn.Module:
    return hf("ViTModel", "ViTConfig", impl, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
              image_size=32, patch_size=8)  # fmt: skip


def bert(impl: str = "eager") -> nn.Module:
    return hf("BertModel", "BertConfig", impl, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "blocked", "reference"])
def test_in_a_vision_transformer(backend: str, tmp_path: Any) -> None:
    """The class token stays; a batch of another size; saved, in ONNX Runtime, optimized again."""
    model, x = vit("sdpa"), pixels()
    policy = QueryRows("received(stride=2)", keep=0.25, prefix=1)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    fast = attnopt.optimize(model, policy, (x,), dynamic_shapes=shapes, backend=backend)
    assert [s.status for s in fast.report.sites] == ["rewritten", "rewritten"]
    assert fast.sites[0].spec.rows is not None
    eager = vit()
    want = oracle.run_edited(eager, (x,), None, edits(2, lambda p: zeroed(p, 0.25, 1, 2)))
    oracle.assert_differs(want, oracle.run(eager, (x,)))
    oracle.assert_same(oracle.run(fast, (x,)), want)
    fast.save(tmp_path / "saved")
    loaded = attnopt.load(tmp_path / "saved")
    assert [s.spec for s in loaded.sites] == [s.spec for s in fast.sites]
    oracle.assert_same(oracle.run(loaded, (x,)), oracle.run(fast, (x,)), limit=0.0)
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    other = torch.randn(3, 3, 32, 32)
    for images in (x, other):
        want = oracle.run_edited(eager, (images,), None, edits(2, lambda p: zeroed(p, 0.25, 1, 2)))
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        oracle.assert_same([torch.from_numpy(o) for o in found], want, "ONNX Runtime")
        oracle.assert_same(oracle.run(fast, (images,)), want)
    if backend == "sdpa":  # attnopt's own operator is no attention that is found again
        again = attnopt.optimize(fast, "fuse", (x,))
        assert [s.status for s in again.report.sites] == ["rewritten", "rewritten"]
        oracle.assert_same(oracle.run(again, (x,)), oracle.run(fast, (x,)))


@pytest.mark.slow  # a whole model in torch and ONNX Runtime
@pytest.mark.parametrize("impl", ["eager", "sdpa"])
def test_in_an_encoder_with_padding(impl: str, tmp_path: Any) -> None:
    """Lengths and padding that vary: a text gives the same alone."""
    model, tokens = bert(impl), ids(length=13)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, 9:] = 0
    given = {"input_ids": tokens, "attention_mask": mask}
    fast = attnopt.optimize(model, QueryRows("received", keep=0.4, prefix=1), (), given, dynamic_shapes="auto")
    assert [s.status for s in fast.report.sites] == ["rewritten", "rewritten"]
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    eager = bert()

    def meant(texts: Tensor, marks: Tensor) -> list[Tensor]:
        change = edits(2, lambda p: zeroed(p, 0.4, 1, 1, real=marks.bool()))
        return oracle.run_edited(eager, (), {"input_ids": texts, "attention_mask": marks}, change)

    for length, pad in ((13, 4), (21, 0), (6, 3), (17, 16)):
        texts, marks = ids(length=length, seed=length), torch.ones(2, length, dtype=torch.long)
        marks[1, length - pad :] = 0
        named = {"input_ids": texts, "attention_mask": marks}
        want = meant(texts, marks)
        oracle.assert_same(oracle.run(fast, (), named), want, str(length))
        feed = {i.name: named[i.name].numpy() for i in session.get_inputs()}
        oracle.assert_same([torch.from_numpy(o) for o in session.run(None, feed)], want, f"ONNX Runtime, {length}")
        alone = oracle.run(fast, (), {name: x[1:, : length - pad] for name, x in named.items()})
        oracle.assert_same([alone[0]], [oracle.run(fast, (), named)[0][1:, : length - pad]], "alone")


SHARING = Spelling(heads=6, kv_heads=2, head_dim=5, value_dim=3, share="repeat_interleave", packing="fused")
LAWS = {
    "plain": Spelling(),
    "shared": SHARING,
    "tiled": replace(SHARING, share="tiled", packing="separate"),
    "sinks": Spelling(sinks=True, core="bmm"),
    "norm": Spelling(norm="rms", rope="half", scale="buffer"),
    "bias": Spelling(bias_kind="alibi"),
    "softcap": Spelling(softcap=2.0),
    "sdpa": Spelling(core="sdpa", heads=6, kv_heads=3, share="enable_gqa"),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_it_equals_the_model_with_rows_of_zeros(law: str) -> None:
    """Of some heads; behind windows, with pruned heads before and after, with gains."""
    s = LAWS[law]
    model, given = Attention(s), inputs(s)
    L = given["x"].shape[1]

    def change(p: Tensor, heads: list[int]) -> Tensor:
        return torch.cat([zeroed(p[..., :L], 3, 1, 1, heads), p[..., L:]], -1)

    heads = [0, 2, 3]
    rows = QueryRows("received", 3, prefix=1, heads=heads)
    want = oracle.run_edited(model, (), given, edits(1, lambda p: change(p, heads)), heads=s.heads)
    oracle.assert_differs(want, oracle.run(model, (), given))
    for backend in ("auto", "blocked", "reference"):
        fast = attnopt.optimize(model, rows, (), given, backend=backend)
        (site,) = fast.report.sites
        assert not site.refusals
        oracle.assert_same(oracle.run(fast, (), given), want, backend)
    visible = Window(3).mask(L, L).expand(s.heads, -1, -1)
    gains = (1.0, 1.0, 0.0, *(1.0,) * (s.heads - 4), 2.0)
    edit = edits(1, lambda p: change(p, [0, 3]), gains=gains, visible=visible)
    want = oracle.run_edited(model, (), given, edit, heads=s.heads)
    others = [PruneHeads(heads=[2]), ScaleHeads({s.heads - 1: 2.0}), LocalWindow(3)]
    for policy in ([rows, *others], [*others, rows], [others[0], rows, *others[1:]]):
        fast = attnopt.optimize(model, policy, (), given)
        assert not fast.report.sites[0].refusals
        oracle.assert_same(oracle.run(fast, (), given), want)


@pytest.mark.parametrize("score", ["norm", "each head"])
def test_cross_attention(score: str, tmp_path: Any) -> None:
    """Queries are ranked by what they are; what keys receive says nothing about them."""
    s = Spelling(cross=True)
    model, given = Attention(s), inputs(s)
    each = lambda q, k, **_: q.square().sum(-1)  # noqa: E731
    fast = attnopt.optimize(model, QueryRows("norm" if score == "norm" else each, 3), (), given, backend="sdpa")
    (site,) = fast.report.sites
    assert not site.refusals
    q = model.q_proj(given["x"])
    squares = q.unflatten(-1, (s.heads, -1)).square().sum(-1).transpose(1, 2)
    rank = squares.sum(1, keepdim=True).expand_as(squares) if score == "norm" else squares
    L = q.shape[1]
    used = torch.tensor([[kept_by_hand(r, [True] * L, 3, 0) for r in of] for of in rank.tolist()]).float()
    want = oracle.run_edited(model, (), given, {0: oracle.Edit(used=used)})
    oracle.assert_differs(want, oracle.run(model, (), given))
    oracle.assert_same(oracle.run(fast, (), given), want)
    with pytest.warns(attnopt.AttnoptWarning, match="the policy changes nothing"):
        (site,) = attnopt.optimize(model, QueryRows("received", 3), (), given).report.sites
    assert str(site.refusals["query-rows"]).startswith("[needs-self-attention]")


class _Weighed(nn.Module):
    """A bias that depends on the key and the head alone, [B, H, 1, S]: it may hide keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.factor = nn.Linear(24, 72), nn.Linear(24, 24), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT / 8**0.5 + self.factor[:, None, None] * x.mean(-1)[:, None, None]
        made: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return made


@pytest.mark.slow
def test_lengths_that_no_stride_divides(tmp_path: Any) -> None:
    fast = attnopt.optimize(
        _Weighed().eval(), QueryRows("received(stride=8)", 0.5), (torch.randn(2, 16, 24),), dynamic_shapes="auto"
    )
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for n in (9, 16, 31):
        x = torch.randn(3, n, 24)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        oracle.assert_same([torch.from_numpy(found)], oracle.run(fast, (x,)))


@pytest.mark.slow
def test_ties_are_the_same_in_onnx_runtime(tmp_path: Any) -> None:
    """Tokens that are all alike: the first ones are kept."""
    torch.manual_seed(0)
    s = Spelling()
    model, given = Attention(s), inputs(s)
    given = {"x": given["x"][:, :1].repeat(1, 9, 1)}
    for score in ("norm", "received", "received(stride=2)"):
        fast = attnopt.optimize(model, QueryRows(score, 4), (), given, dynamic_shapes={"x": {1: torch.export.Dim("n")}})
        fast.export_onnx(tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        for n in (9, 30, 3):
            x = given["x"][:, :1].repeat(1, n, 1)
            made = fast(x=x)
            (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            oracle.assert_same([torch.from_numpy(found)], [made])
            torch.testing.assert_close(made[:, :4], made[:, :1].expand(-1, min(n, 4), -1))
            assert n <= 4 or (made[:, 4:] - made[:, :1]).abs().max() > 1e-3


def test_half_precision_and_training() -> None:
    s = Spelling()
    model, given = Attention(s), inputs(s)
    rows = QueryRows("norm", 3)
    fast, plain = (attnopt.optimize(model, rows, (), given, backend=b) for b in ("sdpa", "reference"))
    found = []
    for made in (fast, plain):
        model.zero_grad()
        made(**given).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 4
    torch.testing.assert_close(found[0], found[1])
    half = {"x": given["x"].bfloat16()}
    low = attnopt.optimize(model.bfloat16(), QueryRows("received", 3), (), half, backend="sdpa")
    reference = attnopt.optimize(model, QueryRows("received", 3), (), half, backend="reference")
    oracle.assert_same(oracle.run(low, (), half), oracle.run(reference, (), half))
