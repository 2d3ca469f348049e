"""Every way to write a softmax by hand is one attention; what only looks like one is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_differs, assert_same, run
from torch import Tensor, nn

import attnopt
from attnopt.passes import LocalWindow
from attnopt.patterns import Causal, Full, Window

WIDTH, HEADS, LENGTH = 12, 3, 7
INF, LOG2_E = math.inf, math.log2(math.e)

Weigh = Callable[[Tensor], Tensor]


class Attending(nn.Module):
    """[B, L, WIDTH]; ``weigh`` makes weights of scores [B, H, L, S], which are changed by ``before`` first."""

    def __init__(self, weigh: Weigh, before: Weigh = lambda s: s) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.weigh, self.before = weigh, before

    def heads(self, x: Tensor) -> Iterator[Tensor]:
        return (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = self.weigh(self.before(q @ k.transpose(-1, -2) / 2))
        made: Tensor = self.o((weights @ v).transpose(1, 2).flatten(2))
        return made


def given(seed: int = 0, length: int = LENGTH) -> tuple[Tensor]:
    return (torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(seed)),)


def plain(s: Tensor) -> Tensor:
    return s.softmax(-1)


def windowed(s: Tensor) -> Tensor:
    return s.masked_fill(~Window(2, 1).mask(s.shape[-2], s.shape[-1]), -INF)


def top(s: Tensor) -> Tensor:
    return s.amax(-1, keepdim=True)


def total(e: Tensor) -> Tensor:
    return e.sum(-1, keepdim=True)


def over(e: Tensor) -> Tensor:
    return e / total(e)


def by_logarithm(s: Tensor, m: Tensor) -> Tensor:
    return (s - (m + total((s - m).exp()).log())).exp()


SAME: dict[str, Weigh] = {
    "times the inverse": lambda s: (e := (s - top(s)).exp()) * (1 / total(e)),
    "the inverse times": lambda s: total(e := (s - top(s)).exp()).reciprocal() * e,
    "times the power -1": lambda s: (e := s.exp()) * total(e) ** -1,
    "times the inverse, spread later": lambda s: (e := s.exp()) * e.sum(-1).reciprocal()[..., None],
    "spread later": lambda s: (e := s.exp()) / e.sum(-1).unsqueeze(-1),
    "reshaped": lambda s: (e := s.exp()) / e.sum(-1).reshape(*s.shape[:-1], 1),
    "squeezed, spread later": lambda s: (e := (s - top(s)).exp()) / total(e).squeeze(-1).unsqueeze(-1),
    "a bound below in a tensor": lambda s: (e := (s - top(s)).exp()) / total(e).clamp(min=torch.tensor(1e-6)),
    "a norm": lambda s: (e := (s - top(s)).exp()) / e.norm(p=1, dim=-1, keepdim=True),
    "normalize": lambda s: F.normalize((s - top(s)).exp(), p=1.0, dim=-1),
    "powers of 2": lambda s: over(torch.exp2((s - top(s)) * LOG2_E)),
    "powers of 2 of scaled scores": lambda s: over(torch.exp2((t := s * LOG2_E) - top(t))),
    "powers of e": lambda s: over(torch.pow(math.e, s)),
    "powers of 3": lambda s: over(torch.pow(3.0, (s - top(s)) / math.log(3))),
    "a bound below": lambda s: (e := (s - top(s)).exp()) / total(e).clamp(min=1e-6),
    "a bound below, and an epsilon": lambda s: (e := (s - top(s)).exp()) / (total(e).clamp_min(1e-6) + 1e-9),
    "an epsilon, spread later": lambda s: (
        (e := (s - s.max(-1).values[..., None]).exp()) / (e.sum(-1) + 1e-9)[..., None]
    ),
    "less the logarithm of the sum": lambda s: ((t := s - top(s)) - total(t.exp()).log()).exp(),
    "less the logarithm, unshifted": lambda s: (s - s.exp().sum(-1).log().unsqueeze(-1)).exp(),
    "less maximum and logarithm": lambda s: by_logarithm(s, top(s)),
    "logsumexp, spread later": lambda s: (s - s.logsumexp(-1)[..., None]).exp(),
    "normalised again": lambda s: over(s.softmax(-1)),
    "normalised again, with an epsilon": lambda s: (w := s.softmax(-1)) / (total(w) + 1e-9),
}


@pytest.mark.parametrize("name", SAME)
def test_one_attention(name: str) -> None:
    """Fused, at other inputs and other lengths, and under a window, which hides keys before the maximum is taken."""
    model = Attending(SAME[name]).eval()
    fast = attnopt.optimize(model, "fuse", given(), dynamic_shapes="auto")
    assert len(fast.sites) == 1
    for length in (LENGTH, LENGTH + 4):
        assert_same(run(fast, given(1, length)), run(model, given(1, length)), name)
    narrow = attnopt.optimize(model, LocalWindow(2, 1), given())
    assert narrow.report.sites[0].status == "rewritten"
    want = run(Attending(plain, windowed).eval(), given(1))
    assert_same(run(narrow, given(1)), want, name)
    assert_differs(run(narrow, given(1)), run(model, given(1)), name)


def late(s: Tensor, v: Tensor) -> Tensor:
    e = (s - top(s)).exp()
    return (e @ v) * (1 / total(e))


def late_power(s: Tensor, v: Tensor) -> Tensor:
    e = torch.exp2(s * LOG2_E)
    return e.sum(-1).pow(-1).unsqueeze(-1) * (e @ v)


class Late(Attending):
    """``attend`` gets the scores and the values."""

    def __init__(self, attend: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(plain)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        made: Tensor = self.o(self.attend(q @ k.transpose(-1, -2) / 2, v).transpose(1, 2).flatten(2))
        return made


@pytest.mark.parametrize("attend", [late, late_power])
def test_an_inverse_after_the_values(attend: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Late(attend).eval()
    narrow = attnopt.optimize(model, LocalWindow(2, 1), given())
    assert narrow.report.sites[0].status == "rewritten"
    assert_same(run(narrow, given(1)), run(Attending(plain, windowed).eval(), given(1)))


SINKS: dict[str, Weigh] = {
    "scaled": lambda s: (with_sink(s) * 2.0).softmax(-1)[..., :-1],
    "divided": lambda s: (with_sink(s) / 3.0).softmax(-1)[..., :-1],
    "capped and scaled": lambda s: (with_sink(torch.tanh(s / 3) * 3) * 2.0).softmax(-1)[..., :-1],
    "powers of 2": lambda s: over(torch.exp2(with_sink(s)))[..., :-1],
    "one more in the sum": lambda s: (e := s.exp()) / (1 + total(e)),
}


def with_sink(s: Tensor) -> Tensor:
    """[B, H, L, S] with a column more: a logit of each head."""
    return torch.cat([s, torch.tensor([0.5, 1.0, -1.0])[:, None, None].expand(*s.shape[:-1], 1)], -1)


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_is_scaled_with_the_scores(name: str) -> None:
    model = Attending(SINKS[name]).eval()
    fast = attnopt.optimize(model, "fuse", given(), backend="blocked")
    assert [s.spec.has_sinks for s in fast.sites] == [True]
    assert_same(run(fast, given(1)), run(model, given(1)), name)


OTHERS: dict[str, Weigh] = {
    "one more in the shifted sum": lambda s: (e := (s - top(s)).exp()) / (1 + total(e)),
    "one more in another row's sum": lambda s: (e := s.exp()) / (1 + e.sum(-1).unsqueeze(-2)),
    "an epsilon that shows": lambda s: (e := (s - top(s)).exp()) / (total(e) + 1e-3),
    "a bound that shows": lambda s: (e := (s - top(s)).exp()) / total(e).clamp(min=1.5),
    "a bound without a shift": lambda s: (e := (s - 20).exp()) / total(e).clamp(min=1e-6),
    "a bound above": lambda s: (e := (s - top(s)).exp()) / total(e).clamp(1e-6, 2.0),
    "times the sum": lambda s: (e := s.exp()) * total(e),
    "over the inverse": lambda s: (e := s.exp()) / total(e).reciprocal(),
    "the inverse of the inverse": lambda s: (e := s.exp()) * total(e).reciprocal().reciprocal(),
    "the power -2": lambda s: (e := s.exp()) * total(e) ** -2,
    "another row's sum": lambda s: (e := s.exp()) / e.sum(-1).unsqueeze(-2),
    "another row's logarithm": lambda s: (s - s.logsumexp(-1).unsqueeze(-2)).exp(),
    "the logarithm of another sum": lambda s: (s - (2 * s).logsumexp(-1, keepdim=True)).exp(),
    "another maximum than was taken off": lambda s: (s - (2 * top(s) + total((s - top(s)).exp()).log())).exp(),
    "a norm of squares": lambda s: F.normalize(s.exp(), dim=-1),
    "normalised by half": lambda s: (w := s.softmax(-1)) / (total(w) + 1),
    "normalised over queries": lambda s: (w := s.softmax(-1)) / w.sum(-2, keepdim=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_softmax(name: str) -> None:
    assert not attnopt.inspect(Attending(OTHERS[name]).eval(), given()).sites


def band(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:]).tril()


LIKE: dict[str, Weigh] = {
    "ones_like": lambda s: s.masked_fill(torch.ones_like(s).triu(1).bool(), -INF).softmax(-1),
    "ones_like, bool": lambda s: s.masked_fill(~torch.tril(torch.ones_like(s, dtype=torch.bool)), -INF).softmax(-1),
    "full_like": lambda s: (s + torch.full_like(s, -INF).triu(1)).softmax(-1),
    "new_full": lambda s: (s + s.new_full(s.shape[-2:], -INF).triu(1)).softmax(-1),
    "new_ones": lambda s: torch.where(s.new_ones(s.shape[-2:]).tril() > 0, s, torch.full_like(s, -1e9)).softmax(-1),
    "zeros_like": lambda s: (s + torch.zeros_like(s).masked_fill(band(s) == 0, -INF)).softmax(-1),
    "filled": lambda s: s.masked_fill(torch.empty_like(s).fill_(1).triu(1) > 0, -INF).softmax(-1),
    "numbers times ones_like": lambda s: torch.where(band(s) > 0, s, -9e15 * torch.ones_like(s)).softmax(-1),
    "type_as": lambda s: (s - (1 - band(s).double()).type_as(s) * 1e9).softmax(-1),
    "expand_as": lambda s: s.masked_fill((band(s) == 0).expand_as(s), -INF).softmax(-1),
    "exponentials times numbers": lambda s: over((s - top(s)).exp() * band(s)),
}


@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("shapes", [None, "auto"])
def test_masks_in_the_form_of_the_scores(name: str, shapes: str | None) -> None:
    """They are made from sizes alone, and read as what they are."""
    model = Attending(LIKE[name]).eval()
    fast = attnopt.optimize(model, "fuse", given(), dynamic_shapes=shapes)
    assert [s.spec.pattern for s in fast.sites] == [Causal()]
    for length in (LENGTH, LENGTH + 4) if shapes else (LENGTH,):
        assert_same(run(fast, given(1, length)), run(model, given(1, length)), name)


def test_in_onnx(tmp_path: Path) -> None:
    model = Attending(LIKE["ones_like"]).eval()
    fast = attnopt.optimize(model, "fuse", given(), dynamic_shapes="auto")
    fast.export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (x,) = given(1, LENGTH + 4)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_same([torch.from_numpy(got)], run(model, (x,)))


def test_numbers_that_are_no_flags() -> None:
    model = Attending(lambda s: over(s.exp() * (band(s) / 2 + 0.5))).eval()
    found = attnopt.inspect(model, given())
    assert not found.sites
    assert [miss.refusal.code for miss in found.near_misses] == ["weights-changed"]


class OtherNames(Attending):
    """torch has several names for one operator, and torch.export keeps them apart."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        s = torch.divide(torch.linalg.matmul(q, torch.swapaxes(k, -1, -2)), 2.0)
        s = torch.subtract(torch.multiply(s, 3.0), band(s).triu(1))
        s = torch.concat([s.clip(torch.finfo(s.dtype).min), torch.negative(s.new_ones(*s.shape[:-1], 1))], -1)
        weights = torch.true_divide(e := torch.special.exp2(s), total(e))[..., :-1]
        made: Tensor = self.o((weights @ v).transpose(1, 2).flatten(2))
        return made


def test_other_names() -> None:
    model = OtherNames(plain).eval()
    fast = attnopt.optimize(model, "fuse", given(), backend="blocked")
    assert [(s.spec.has_sinks, s.spec.scale) for s in fast.sites] == [(True, pytest.approx(1.5 * math.log(2)))]
    assert_same(run(fast, given(1)), run(model, given(1)))


def test_no_mask_at_all() -> None:
    fast = attnopt.optimize(Attending(lambda s: over(s.exp() * torch.ones_like(s))).eval(), "fuse", given())
    assert [s.spec.pattern for s in fast.sites] == [Full()]
