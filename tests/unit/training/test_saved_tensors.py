"""Tensors that autograd keeps of attention, as integers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Attention, Spelling, inputs
from stacks import batches, stack
from torch import Tensor, nn

import attnopt
from attnopt.ir.spec import AttentionSpec
from attnopt.passes import LocalWindow
from attnopt.training import quantize_saved
from attnopt.training.head_ranges import HeadSizes, pack

SIZES = HeadSizes.of(AttentionSpec.of(4, 2, 5, 3, scale=1.0))
SHOWN = [
    Spelling(),
    Spelling(core="sdpa", packing="fused", mask=("causal",)),
    Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2, mask=("padding",)),
    Spelling(core="einsum", packing="per-head", softmax="exp"),
]


def test_a_range_for_each_head_of_each_sequence() -> None:
    x = torch.randn(3, 4, 7, 5) * 10.0 ** torch.arange(4)[None, :, None, None]
    packed = pack(x, SIZES, 8)
    assert packed is not None
    assert packed.codes.dtype == torch.uint8
    assert packed.nbytes == x.numel() + 2 * 4 * 12
    step = (x.amax((2, 3)) - x.amin((2, 3))) / 255
    assert ((packed.tensor() - x).abs().amax((2, 3)) <= 0.51 * step).all()


def test_four_bits_share_bytes() -> None:
    for shape in ((3, 4, 7, 5), (1, 2, 3, 3)):
        x = torch.randn(shape)
        packed = pack(x, SIZES, 4)
        assert packed is not None
        assert packed.codes.numel() == (x.numel() + 1) // 2
        step = (x.amax((2, 3)) - x.amin((2, 3))) / 15
        assert ((packed.tensor() - x).abs().amax((2, 3)) <= 0.51 * step).all()


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((2, 4, 9, 9), (2, 3)), ((2, 2, 9, 5), (2, 3)), ((2, 9, 4, 5), (1, 3)), ((8, 9, 5), (1, 2)), ((8, 3, 9), (1, 2)),
     ((8, 9, 20), None), ((8, 5, 20), None), ((8, 9, 9), None), ((3, 9, 5), None), ((2, 9, 3, 7), None), ((9, 5), None)],
)  # fmt: skip
def test_which_axes_are_inside_a_head(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> None:
    assert SIZES.within(torch.Size(shape)) == axes
    assert (pack(torch.randn(shape), SIZES, 8) is None) == (axes is None)


def test_numbers_that_have_no_range_stay() -> None:
    x = torch.randn(2, 4, 3, 5)
    x[0, 0, 0, 0] = torch.inf
    assert pack(x, SIZES, 8) is None
    assert pack(x.long(), SIZES, 8) is None
    constant = pack(torch.full((2, 4, 3, 5), 3.0), SIZES, 8)
    assert constant is not None
    assert torch.equal(constant.tensor(), torch.full((2, 4, 3, 5), 3.0))


@pytest.mark.parametrize("s", SHOWN, ids=str)
def test_the_forward_is_the_same_and_gradients_are_near(s: Spelling) -> None:
    model, given = Attention(s), inputs(s)
    plain = model(**given)
    with quantize_saved(model, (), given) as saved:
        assert torch.equal(model(**given), plain)
        found = saved.report(lambda: model(**given).square().sum())
        assert found.same_loss
        assert found.bytes_after < 0.8 * found.bytes_before
        assert (0.98 if s.exponentials else 0.999) < found.cosine < 1.0  # exponentials differ by more than their sum
        assert "cosine of the gradients 0.9" in str(found)
        coarse = quantize_saved(model, (), given, bits=4)
        saved.remove()
        four = coarse.report(lambda: model(**given).square().sum())
        assert four.bytes_after < found.bytes_after
        assert (0.7 if s.exponentials else 0.9) < four.cosine < found.cosine
        coarse.remove()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_gradients_are_those_of_what_is_kept() -> None:
    """By hand: the map of one attention from rounded operands."""
    torch.manual_seed(0)

    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return self.out(((q @ k.mT * 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))

    model, x = Core(), torch.randn(3, 6, 8)
    with quantize_saved(model, (x,), bits=4):
        got = torch.autograd.grad(model(x).sum(), [*model.parameters()])
    rounded = lambda t: pack(t.detach(), HeadSizes.of(AttentionSpec.of(2, 2, 4, 4, scale=1.0)), 4).tensor()  # noqa: E731
    q, k, v = model.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    p = (q @ k.mT * 0.5).softmax(-1)
    do = (torch.ones(3, 6, 8) @ model.out.weight).unflatten(-1, (2, 4)).transpose(1, 2)
    r = rounded(p)
    dp = do @ rounded(v).mT
    ds = r * (dp - (dp * r).sum(-1, keepdim=True)) * 0.5
    parts = torch.stack([ds @ rounded(k), ds.mT @ rounded(q), r.mT @ do]).permute(1, 3, 0, 2, 4).flatten(2)
    torch.testing.assert_close(got[0], torch.einsum("blo,bli->oi", parts, x), rtol=1e-4, atol=1e-5)
    exact = torch.autograd.grad(model(x).sum(), [model.qkv.weight])[0]
    assert not torch.allclose(exact, got[0], rtol=1e-4, atol=1e-5)


def test_a_short_run_converges_alike() -> None:
    teacher, data = stack(causal=False), batches()

    def trained(bits: int | None) -> list[float]:
        torch.manual_seed(1)
        student = copy.deepcopy(teacher)
        for p in student.parameters():
            p.data += 0.2 * torch.randn_like(p)
        if bits is not None:
            quantize_saved(student, (data[0],), bits=bits)
        return attnopt.distill(student, teacher, data, 60, optimizer=torch.optim.Adam(student.parameters(), 3e-3))

    exact, eight = trained(None), trained(8)
    assert exact[0] == eight[0]
    assert exact != eight
    assert sum(exact[-4:]) < 0.3 * sum(exact[:4])
    assert sum(eight[-4:]) == pytest.approx(sum(exact[-4:]), rel=0.1)


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_an_optimized_model(backend: str) -> None:
    model, data = stack(), batches()
    fast = attnopt.optimize(model, LocalWindow(4), (data[0],), backend=backend)
    plain = fast(data[0])
    with quantize_saved(fast) as saved:
        assert saved.sites == ("layers.0", "layers.1")
        assert torch.equal(fast(data[0]), plain)
        found = saved.report(lambda: fast(data[0]).square().sum())
    assert found.same_loss
    assert found.bytes_after < found.bytes_before
    assert 0.999 < found.cosine < 1.0


def test_hooks_end_with_an_error() -> None:
    model, data = stack(), batches()
    with quantize_saved(model, (data[0],)):
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 12, 3))
        x = torch.randn(2, 4, 3, 5, requires_grad=True)
        y = x.square()  # outside of attention
        assert y.grad_fn._saved_self is x or torch.equal(y.grad_fn._saved_self, x)  # type: ignore[union-attr]
        F.softmax(x, -1).sum().backward()


def test_what_cannot_be() -> None:
    with pytest.raises(attnopt.PolicyError, match="bits=3: expected one of 8, 4"):
        quantize_saved(stack(), (batches()[0],), bits=3)
    with pytest.raises(attnopt.PolicyError, match="no attention was found"):
        quantize_saved(nn.Linear(4, 4), (torch.zeros(2, 4),))


def test_gradients_of_parameters_stay_where_they_are() -> None:
    model, data = stack(), batches()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    saved: Any = quantize_saved(model, (data[0],))
    saved.report(lambda: model(data[0]).sum())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
