"""Keys and values that are pooled before their projection, where that is the same."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from pooled import means
from torch import Tensor, nn

import attnopt
from attnopt import Input
from attnopt.graph.nodes import opname, shape
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.passes import AddValues, LocalWindow, PoolKeys, PruneHeads, ScaleHeads, Transplant

B, L, E, H, D = 2, 17, 24, 4, 6  # a class token before 4 x 4 others
SIZE, GRID = 2, (4, 4)
ALL, LO = (0, 1, 2, 3), (1, 3)


class Attention(nn.Module):
    """``spelling``: how queries, keys and values are projected.  ``pools``: for each head, weights [L, L] of tokens."""

    def __init__(self, spelling: str, kv_heads: int = H) -> None:
        super().__init__()
        self.spelling, self.kv_heads = spelling, kv_heads
        width = kv_heads * D
        self.q, self.k, self.v, self.out = (
            nn.Linear(E, H * D),
            nn.Linear(E, width),
            nn.Linear(E, width),
            nn.Linear(H * D, E),
        )
        self.packed = nn.Linear(E, 3 * E, bias=spelling != "timm")
        self.low, self.high = nn.Linear(E, 5, bias=False), nn.Linear(5, width, bias=False)
        self.norm = nn.LayerNorm(D)
        self.place = nn.Parameter(torch.randn(L, E))
        self.shift = nn.Parameter(torch.randn(width))
        self.pools: Tensor | None = None

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        B, L, _ = x.shape
        if self.spelling == "timm":
            packed = self.packed(x).reshape(B, L, 3, H, D).permute(2, 0, 3, 1, 4)
            return packed.unbind(0)
        if self.spelling == "chunk":
            return tuple(t.view(B, L, H, -1).transpose(1, 2) for t in self.packed(x).chunk(3, -1))
        k, v = self.k(x), self.v(x)
        if self.spelling == "low rank":
            k = k + 0.5 * self.high(self.low(x))
        if self.spelling == "places":
            k = self.k(x + self.place)
        if self.spelling == "shifted":
            k, v = k - self.shift, v * self.shift
        if self.spelling == "matrix":
            k = x @ self.k.weight.T
        if self.spelling == "squares":
            k = k * k
        q, k, v = (t.view(B, L, -1, D).transpose(1, 2) for t in (self.q(x), k, v))
        return (q, self.norm(k), v) if self.spelling == "norm" else (q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        k, v = (t.repeat_interleave(H // self.kv_heads, 1) for t in (k, v))
        weights = None
        if self.pools is not None:
            weights = (self.pools == 0).float().sum(-1)
            k, v = self.pools @ k, self.pools @ v
        s = q @ k.transpose(-1, -2) / D**0.5
        if weights is not None and self.pools is not None:
            s = s - (1 / self.pools.max(-1).values).log()[:, None]
        o = s.softmax(-1) @ v
        return self.out(o.transpose(1, 2).flatten(2))


def pooled_by_hand(model: Attention, x: Tensor, heads: tuple[int, ...]) -> Tensor:
    model.pools = means(PooledKeys(SIZE, heads, GRID, 1), x.shape[1], H)
    try:
        with torch.no_grad():
            result: Tensor = model(x)
    finally:
        model.pools = None
    return result


def made(spelling: str, kv_heads: int = H) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    return Attention(spelling, kv_heads).eval(), torch.randn(B, L, E)


def projected(fast: attnopt.OptimizedModel) -> int:
    """Multiplications of projections."""
    total = 0
    for n in fast.graph_module.graph.nodes:
        if opname(n) == "linear":
            *tokens, width = shape(n)
            total += torch.Size(tokens).numel() * width * shape(n.args[0])[-1]
        if opname(n) == "matmul" and len(shape(n.args[1])) == 2:
            total += torch.Size(shape(n)).numel() * shape(n.args[0])[-1]
    return total


EARLY = ("separate", "timm", "chunk", "low rank", "places", "shifted", "matrix")
POOLS = 1 + 4


@pytest.mark.parametrize(("spelling", "heads"), list(product(EARLY, (ALL, LO))))
def test_equals_pools_of_projected_tokens(spelling: str, heads: tuple[int, ...]) -> None:
    model, x = made(spelling)
    batch = {"x": {0: torch.export.Dim("batch")}}
    fast = attnopt.optimize(model, PoolKeys(SIZE, GRID, heads, prefix=1), (x,), dynamic_shapes=batch, backend="sdpa")
    for n in (2, 1, 5):
        given = torch.randn(n, L, E)
        torch.testing.assert_close(fast(given), pooled_by_hand(model, given, heads), atol=2e-6, rtol=1e-6)
    plain = attnopt.optimize(model, args=(x,), dynamic_shapes=batch)
    saved = B * (L - POOLS) * 2 * len(heads) * D * E
    more = B * (L - POOLS) * (len(heads) * D + E) * 5 if spelling == "low rank" and len(heads) == H else 0
    if spelling != "low rank" or len(heads) == H:
        assert projected(plain) - projected(fast) == saved + more


@pytest.mark.parametrize("heads", [ALL, LO, (0, 1, 2)])
def test_shared_keys(heads: tuple[int, ...]) -> None:
    model, x = made("separate", kv_heads=2)
    fast = attnopt.optimize(model, PoolKeys(SIZE, GRID, heads, prefix=1), (x,), backend="sdpa")
    torch.testing.assert_close(fast(x), pooled_by_hand(model, x, heads), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("spelling", ["norm", "squares"])
def test_what_is_not_affine_is_pooled_where_it_was(spelling: str) -> None:
    model, x = made(spelling)
    fast = attnopt.optimize(model, PoolKeys(SIZE, GRID, prefix=1), (x,), backend="sdpa")
    torch.testing.assert_close(fast(x), pooled_by_hand(model, x, ALL), atol=2e-6, rtol=1e-6)
    assert projected(fast) == projected(attnopt.optimize(model, args=(x,)))


def test_rows_of_any_length() -> None:
    model, x = made("chunk")
    length = 3 * torch.export.Dim("pools", min=2, max=100)
    given = torch.randn(2, 12, E)
    fast = attnopt.optimize(model, PoolKeys(3), (given,), dynamic_shapes={"x": {1: length}}, backend="sdpa")
    for n in (12, 6, 30):
        x = torch.randn(2, n, E)
        model.pools = means(PooledKeys(3, ALL), n, H)
        with torch.no_grad():
            want = model(x)
        model.pools = None
        torch.testing.assert_close(fast(x), want, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("spelling", ["separate", "timm"])
@pytest.mark.parametrize("heads", [ALL, LO])
def test_saved_and_exported(spelling: str, heads: tuple[int, ...], tmp_path: Path) -> None:
    model, x = made(spelling)
    fast = attnopt.optimize(model, PoolKeys(SIZE, GRID, heads, prefix=1), (x,), backend="sdpa")
    fast.save(tmp_path / "saved")
    assert torch.equal(attnopt.load(tmp_path / "saved")(x), fast(x))
    fast.export_onnx(tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), pooled_by_hand(model, x, heads), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["separate", "timm"])
def test_in_a_file(spelling: str, tmp_path: Path) -> None:
    model, x = made(spelling)
    torch.onnx.export(model, (x,), tmp_path / "given.onnx", dynamo=True, verbose=False)
    file = str(tmp_path / "given.onnx")
    fast = attnopt.optimize(file, PoolKeys(SIZE, GRID, LO, prefix=1), (x,), backend="sdpa", dynamic_shapes=None)
    want = pooled_by_hand(model, x, LO)
    (got,) = fast(x).values()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    fast.export_onnx(tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-4, rtol=1e-4)


def test_other_passes() -> None:
    """What reads the values of single tokens keeps them; pruned and scaled heads do not."""
    model, x = made("timm")
    pools = PoolKeys(SIZE, GRID, LO, prefix=1)
    for other, linears in ((PruneHeads(heads=[1]), 3), (ScaleHeads({3: 0.5}), 3), (AddValues([2], alpha=0.5), 2)):
        policy = [pools, other]
        fast = attnopt.optimize(model, policy, (x,), backend="sdpa")
        assert sum(opname(n) == "linear" for n in fast.graph_module.graph.nodes) == linears, "values are projected once"
        plain = attnopt.optimize(model, policy, (x,), backend="reference")
        assert [s.status for s in fast.report.sites] == ["rewritten"]
        torch.testing.assert_close(fast(x), plain(x), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("role", ["q", "k"])
def test_queries_and_keys_of_another_run_stay(role: str) -> None:
    """Transplants replace keys of single tokens, which are then pooled."""
    model, x = made("timm")
    given = {role: torch.randn(B, 2, L, D)}
    policy = [PoolKeys(SIZE, GRID, prefix=1), Transplant(heads=[1, 2], **given)]
    q, k, v = model.projected(x)
    roles = {"q": q, "k": k.clone()}
    roles[role] = torch.cat([roles[role][:, :1], given[role], roles[role][:, 3:]], 1)
    pools = means(PooledKeys(SIZE, ALL, GRID, 1), L, H)
    s = roles["q"] @ (pools @ roles["k"]).mT / D**0.5 + pools.max(-1).values.log()[:, None]
    want = model.out((s.softmax(-1) @ (pools @ v)).transpose(1, 2).flatten(2))
    for backend in ("sdpa", "reference"):
        fast = attnopt.optimize(model, policy, (x,), backend=backend)
        torch.testing.assert_close(fast(x), want, atol=2e-6, rtol=1e-6)


def test_gains_of_a_call_leave_the_values() -> None:
    model, x = made("separate")
    pools, gains = PoolKeys(SIZE, GRID, prefix=1), torch.rand(B, H)
    fast = attnopt.optimize(model, [pools, ScaleHeads(Input("gains"))], (x,), {"gains": gains}, backend="sdpa")
    plain = attnopt.optimize(model, pools, (x,), backend="sdpa")
    assert projected(fast) == projected(plain) < projected(attnopt.optimize(model, args=(x,)))
    want = []
    for sample, own in zip(x, gains, strict=True):
        one = attnopt.optimize(model, [pools, ScaleHeads(own.tolist())], (x[:1],), backend="reference")
        want.append(one(sample[None]))
    torch.testing.assert_close(fast(x, gains=gains), torch.cat(want), atol=2e-6, rtol=1e-6)


def test_pools_under_a_pattern_stay() -> None:
    model, x = made("separate")
    policy = [PoolKeys(SIZE, GRID, prefix=1), LocalWindow(4, heads=[0])]
    fast = attnopt.optimize(model, policy, (x,), backend="sdpa")
    plain = attnopt.optimize(model, policy, (x,), backend="reference")
    torch.testing.assert_close(fast(x), plain(x), atol=2e-6, rtol=1e-6)


def test_gradients() -> None:
    model, x = made("separate")
    fast = attnopt.optimize(model, PoolKeys(SIZE, GRID, prefix=1), (x,), backend="sdpa")
    fast(x).square().sum().backward()
    model.pools = means(PooledKeys(SIZE, ALL, GRID, 1), L, H)
    model(x).square().sum().backward()
    want = dict(model.named_parameters())
    for name, p in fast.graph_module.named_parameters():
        torch.testing.assert_close(p.grad, want[name].grad, atol=1e-4, rtol=1e-4)
