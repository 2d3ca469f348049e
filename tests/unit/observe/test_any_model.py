"""Taps on models that are written in other ways: layouts, parallel branches, padding, shared and pruned weights, files."""

from __future__ import annotations

from pathlib import Path

import observed
import pytest
import torch
from observed import WIDTH, D, H, assert_near
from torch import Tensor, nn

import attnopt
from attnopt.errors import CalibrationError, PolicyError
from attnopt.ir.operands import OperandTensors
from attnopt.passes import PruneHeads


class Attention(nn.Module):
    """``bias``: what is added to the scores, by the mask of padding [B, S]."""

    def __init__(self, heads: int = H) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores if bias is None else scores + bias
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Parallel(nn.Module):
    """``order``: how the stream, the attention and the MLP are added."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.attn, self.norm = order, Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        h = self.norm(x)
        a, m = self.attn(h), self.mlp(h)
        return {"x+a+m": x + a + m, "x+m+a": x + m + a, "a+m+x": a + m + x, "m+(x+a)": m + (x + a)}[self.order]


@pytest.mark.parametrize("order", ["x+a+m", "x+m+a", "a+m+x", "m+(x+a)"])
def test_parallel_branches_are_told_apart(order: str) -> None:
    torch.manual_seed(0)
    model, x = observed.far(Parallel(order)), torch.randn(2, 5, WIDTH)
    found = attnopt.collect(model, [x], "contribution")
    assert set(found) == {"attn", "mlp", "embedding"}
    _, outputs, _ = observed.hooked(model, {"x": x})
    assert_near(found["attn", "contribution"][0].sum(1) + model.attn.o.bias.detach(), outputs["attn"])
    assert_near(found["mlp", "contribution"][0], outputs["mlp"])
    assert_near(found["embedding", "contribution"][0], 2 * x)


@pytest.mark.parametrize("length", [5, 3, 1])
def test_tokens_before_sequences(length: int) -> None:
    """Also where there are as many of both, which no size tells."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, H)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model, x = observed.far(Model()), torch.randn(length, 3, WIDTH)
    found = attnopt.collect(model, [x], ["input", "contribution"], "attn")
    assert_near(found["attn", "input"][0], x.transpose(0, 1))
    added = (model(x) - x).transpose(0, 1).detach()
    assert_near(found["attn", "contribution"][0].sum(1) + model.attn.out_proj.bias.detach(), added)
    told = attnopt.logit_attribution(model, [x], lambda y: y[-1, :, 0])
    torch.testing.assert_close(told.total, model(x)[-1, :, 0].detach(), rtol=1e-5, atol=1e-5)


def test_shifted_windows() -> None:
    """The output is moved and cut after the projection; windows are sequences of their own."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.up, self.down = Attention(), nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            windows = nn.functional.pad(x, (0, 0, 0, 2)).roll(1, 1).unflatten(1, (3, 4)).flatten(0, 1)
            y = self.attn(windows).unflatten(0, (-1, 3)).flatten(1, 2).roll(-1, 1)[:, :10]
            x = x + y
            return x + self.down(self.up(x).relu())

    torch.manual_seed(0)
    model, x = observed.far(Model()), torch.randn(2, 10, WIDTH)
    found = attnopt.collect(model, [x], "contribution")
    assert set(found) == {"attn", "embedding", "down"} or set(found) == {"attn", "embedding", "(root)"}
    heads = found["attn", "contribution"][0]
    assert heads.shape == (6, H, 4, WIDTH)
    _, outputs, _ = observed.hooked(model, {"x": x})
    assert_near(heads.sum(1) + model.attn.o.bias.detach(), outputs["attn"])
    told = attnopt.logit_attribution(model, [x], lambda y: y[:, 0, 3])
    torch.testing.assert_close(told.total, model(x)[:, 0, 3].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_left_padding_by_any_number(hidden: float) -> None:
    """Causal, so the first queries see no key at all: a model that adds finite numbers gives them the mean of all values."""
    seen = torch.ones(5, 5, dtype=torch.bool).tril() & torch.tensor([False, False, True, True, True])
    bias = torch.zeros(5, 5).masked_fill(~seen, hidden)[None, None]
    q = torch.randn(1, H, 5, D)
    assert OperandTensors(q, q, q, bias).real.tolist() == [[False, False, True, True, True]]
    assert OperandTensors(q, q, q, bias * 0 - 3.0).real.all()


def test_one_head_and_weights_that_are_returned() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weights = (self.q(x) @ self.k(x).mT / 4).softmax(-1)
            return weights @ self.v(x), weights

    torch.manual_seed(0)
    model, x = observed.far(Model()), torch.randn(2, 5, WIDTH)
    found = attnopt.collect(model, [x], ["weights", "outputs", "k"])
    out, weights = model(x)
    assert_near(found["", "weights"][0], weights[:, None].detach())
    assert_near(found["", "outputs"][0], out[:, None].detach())
    assert found[""].heads == (0,)
    with pytest.raises(CalibrationError, match="the output projection cannot be read"):
        attnopt.collect(model, [x], "contribution")


class Twice(nn.Module):
    """One module that runs twice, and one whose output is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.idle = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        for _ in range(2):
            x = x + self.attn(x)
        return x


def test_shared_and_unused_weights() -> None:
    torch.manual_seed(0)
    model, x = observed.far(Twice()), torch.randn(2, 5, WIDTH)
    found = attnopt.collect(model, [x], "input")
    assert list(found) == ["attn", "attn#2"]
    assert_near(found["attn", "input"][0], x)
    assert_near(found["attn#2", "input"][0], (x + model.attn(x)).detach())


def test_pruned_heads_keep_their_numbers() -> None:
    torch.manual_seed(0)
    model, x = observed.far(Twice()), torch.randn(2, 5, WIDTH)
    want = attnopt.collect(model, [x], ["outputs", "contribution"], "attn")
    fast = attnopt.optimize(model, {"attn*": PruneHeads(heads=[1])}, (x,))
    found = attnopt.collect(fast, [x], ["outputs", "contribution"], "attn")
    assert found["attn"].heads == (0, 2, 3)
    for kind in ("outputs", "contribution"):
        assert_near(found["attn", kind][0], want["attn", kind][0][:, [0, 2, 3]])
    last = attnopt.collect(fast, [x], "outputs", "attn", heads=[3])
    assert_near(last["attn", "outputs"][0], want["attn", "outputs"][0][:, [3]])
    with pytest.raises(PolicyError, match="it has the heads 0, 2, 3"):
        attnopt.collect(fast, [x], "outputs", heads=[1])
    _, taps = attnopt.expose(fast, {"attn": attnopt.Outputs(heads=[2])}, (x,))(x)
    assert_near(taps["attn.outputs"].detach(), want["attn", "outputs"][0][:, [2]])


def test_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = observed.far(Twice()), torch.randn(2, 5, WIDTH)
    attnopt.optimize(model, "fuse", (x,)).export_onnx(tmp_path / "model.onnx", flavor="standard")
    found = attnopt.collect(tmp_path / "model.onnx", [x], ["weights", "outputs", "contribution"])
    want = attnopt.collect(model, [x], ["weights", "outputs", "contribution"])
    sites = [taken for taken in found.values() if taken.heads]
    for got, name in zip(sites, ["attn", "attn#2"], strict=True):
        for kind in ("weights", "outputs", "contribution"):
            torch.testing.assert_close(got[kind], want[name, kind], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = observed.far(Twice()).to(dtype), torch.randn(2, 5, WIDTH).to(dtype)
    found = attnopt.collect(model, [x], ["weights", "outputs", "contribution"], "attn")
    assert [found["attn", kind][0].dtype for kind in ("weights", "outputs")] == [torch.float32, dtype]
    mean = attnopt.collect(model, [x], "outputs", "attn", reduce="mean")["attn", "outputs"]
    torch.testing.assert_close(mean, found["attn", "outputs"][0].float().mean((0, 2)), rtol=1e-5, atol=1e-6)


def test_the_model_stays_as_it_is() -> None:
    class Dropping(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    torch.manual_seed(0)
    model, x = observed.far(Dropping()), torch.randn(2, 5, WIDTH)
    want = attnopt.collect(model, [x], "outputs", "attn")
    with torch.inference_mode():
        found = attnopt.collect(model.train(), [x], "outputs", "attn")
    assert model.training
    assert_near(found["attn", "outputs"][0], want["attn", "outputs"][0])
