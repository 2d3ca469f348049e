"""Whether keys are those of the queries' own tokens: what a window may be put on, and what it means there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import attnopt
from attnopt.errors import AttnoptWarning
from attnopt.ir.interfaces import Pass
from attnopt.passes import DynamicSparse, LocalWindow, SoftPAG, Sparse
from attnopt.patterns import Window

E, H, D = 12, 3, 4
WINDOW = Window(2, 2)


class Core(nn.Module):
    """[B, H, L, D] each -> [B, H, L, D]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Projected(nn.Module):
    """[B, L, E] each -> [B, L, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(E, E) for _ in range(4))

    def heads(self, *inputs: Tensor) -> list[Tensor]:
        layers = zip((self.q, self.k, self.v), inputs, strict=True)
        return [f(x).unflatten(-1, (H, D)).transpose(1, 2) for f, x in layers]

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return made

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attended(*self.heads(q, k, v))


class Memory(Projected):
    """Encoder and decoder."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return super().forward(x, memory, memory)


class KeptMemory(Projected):
    """Keys and values of an encoder, projected once before."""

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attended(self.heads(x, x, x)[0], k, v)


class Step(Projected):
    """One step of decoding: past keys and values come first."""

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.heads(x, x, x)
        k, v = self.joined(past_k, k), self.joined(past_v, v)
        return self.attended(q, k, v), k, v

    def joined(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([past, new], 2)


class TurnedStep(Step):
    """Keys are kept as projected and turned when they are joined."""

    def joined(self, past: Tensor, new: Tensor) -> Tensor:
        t = super().joined(past, new)
        angle = torch.arange(t.shape[2])[:, None] * 0.1
        return t * angle.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angle.sin()


class SharedStep(Step):
    """One key/value head that three query heads read."""

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.heads(x, x, x)
        k, v = self.joined(past_k, k[:, :1]), self.joined(past_v, v[:, :1])
        return self.attended(q, k.repeat_interleave(H, 1), v.repeat_interleave(H, 1)), k, v


class Behind(Step):
    """What is held comes after the tokens' own."""

    def joined(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new, past], 2)


class Learned(Step):
    """Learned keys and values before the tokens' own stand at no position."""

    def __init__(self) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.randn(1, H, 5, D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        learned = self.learned.expand(len(x), -1, -1, -1)
        return super().forward(x, learned, learned)


class Beside(Step):
    """Keys of another sequence before the tokens' own, as image tokens before text."""

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        _, k, v = self.heads(other, other, other)
        return super().forward(x, k, v)


def tokens(length: int = 9) -> Tensor:
    return torch.randn(2, length, E)


def split(length: int = 9, heads: int = H) -> Tensor:
    return torch.randn(2, heads, length, D)


def meant(model: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor]:
    """What the model gives with a window of two on either side."""
    return oracle.run_edited(model, args, None, lambda _, shape: oracle.Edit(oracle.visible(WINDOW, *shape[-2:], 1)))


CORES: dict[str, tuple[nn.Module, Any]] = {"core": (Core(), split), "projected": (Projected(), tokens)}


# ---------------------------------------------------------------- three inputs
@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("p", [LocalWindow(2), Sparse(WINDOW)], ids=["window", "sparse"])
def test_three_inputs_of_one_length_are_taken_for_one_sequence(name: str, p: Pass) -> None:
    model, make = CORES[name]
    args = (make(), make(), make())
    (site,) = attnopt.inspect(model, args).sites
    assert not site.is_cross
    assert p.name not in site.refusals
    fast = attnopt.optimize(model, p, args)
    (entry,) = fast.report.sites
    assert entry.status == "rewritten"
    assert "queries, keys and values are three inputs of the same length: assumed to be one sequence" in entry.notes
    oracle.assert_same(oracle.run(fast, args), meant(model, args))
    oracle.assert_differs(meant(model, args), oracle.run(model, args))


def test_three_inputs_keep_one_length_where_it_varies() -> None:
    args = (split(), split(), split())
    shapes = {key: {2: Dim("L", min=2, max=300)} for key in "qkv"}
    fast = attnopt.optimize(Core(), LocalWindow(2), args, dynamic_shapes=shapes)
    for length in (5, 70, 201):
        args = (split(length), split(length), split(length))
        oracle.assert_same(oracle.run(fast, args), meant(Core(), args))


@pytest.mark.parametrize("shapes", ["auto", "named"])
def test_three_inputs_of_lengths_that_vary_apart_are_two_sequences(shapes: str) -> None:
    long, wide = {1: Dim("L", min=2, max=100)}, {1: Dim("S", min=2, max=100)}
    given: Any = "auto" if shapes == "auto" else {"q": long, "k": wide, "v": wide}
    with pytest.warns(AttnoptWarning, match="needs-self-attention"):
        fast = attnopt.optimize(Projected(), LocalWindow(2), (tokens(), tokens(), tokens()), dynamic_shapes=given)
    assert fast.sites[0].is_cross
    refusal = fast.report.sites[0].refusals["local-window"]
    assert refusal.found == "query and key inputs with independent lengths"
    assert "torch.export.Dim" in refusal.hint


# ---------------------------------------------------------------- cross-attention, in examples of one length too
def cross() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    memory = tokens()
    return {
        "memory": (Memory(), (tokens(), tokens())),
        "memory given twice": (Projected(), (tokens(), memory, memory)),
        "equal memories": (Projected(), (tokens(), memory, memory.clone())),
        "projected before": (KeptMemory(), (tokens(), split(), split())),
        "another length": (Projected(), (tokens(), tokens(7), tokens(7))),
    }


@pytest.mark.parametrize("name", cross())
@pytest.mark.parametrize("dynamic", [None, "auto"])
def test_keys_of_another_sequence_are_left(name: str, dynamic: str | None) -> None:
    model, args = cross()[name]
    (site,) = attnopt.inspect(model, args).sites
    assert site.is_cross
    assert {"local-window", "sparse"} <= site.refusals.keys()
    with pytest.warns(AttnoptWarning, match="needs-self-attention"):
        fast = attnopt.optimize(model, LocalWindow(2), args, dynamic_shapes=dynamic)
    assert fast.sites[0].is_cross
    oracle.assert_same(oracle.run(fast, args), oracle.run(model, args))


# ---------------------------------------------------------------- a past
@pytest.mark.parametrize("model", [Step(), TurnedStep(), SharedStep()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("p", [LocalWindow(2), Sparse(WINDOW)], ids=["window", "sparse"])
@pytest.mark.parametrize("new", [1, 3])
def test_a_past_comes_before_the_queries_own_keys(model: nn.Module, p: Pass, new: int) -> None:
    heads = 1 if isinstance(model, SharedStep) else H
    args = (tokens(new), split(9, heads), split(9, heads))
    (site,) = attnopt.inspect(model, args).sites
    assert not site.is_cross
    assert p.name not in site.refusals
    fast = attnopt.optimize(model, p, args)
    assert fast.report.sites[0].status == "rewritten"
    oracle.assert_same(oracle.run(fast, args), meant(model, args))
    oracle.assert_differs(meant(model, args), oracle.run(model, args))


def test_a_past_of_any_length() -> None:
    model = Step()
    shapes = {
        "x": {1: Dim("L", min=2, max=300)},
        **{key: {2: Dim("P", min=1, max=400)} for key in ("past_k", "past_v")},
    }
    fast = attnopt.optimize(model, LocalWindow(2), (tokens(3), split(), split()), dynamic_shapes=shapes)
    for new, past in ((3, 9), (7, 1), (130, 40), (5, 333)):
        args = (tokens(new), split(past), split(past))
        oracle.assert_same(oracle.run(fast, args), meant(model, args))


def test_a_past_is_kept_in_a_saved_model(tmp_path: Any) -> None:
    args = (tokens(3), split(), split())
    fast = attnopt.optimize(Step(), LocalWindow(2), args)
    fast.save(tmp_path / "model")
    assert attnopt.load(tmp_path / "model").sites[0].alignment == fast.sites[0].alignment == "last"


@pytest.mark.parametrize("p", [SoftPAG(), DynamicSparse()], ids=lambda p: p.name)
def test_passes_without_a_meaning_behind_a_past_refuse(p: Pass) -> None:
    with pytest.warns(AttnoptWarning, match="3 queries after 9 past keys"):
        attnopt.optimize(Step(), p, (tokens(3), split(), split()))


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (Behind(), (tokens(3), split(), split())),
        (Learned(), (tokens(3),)),
        (Beside(), (tokens(3), tokens())),
    ],
    ids=lambda x: type(x).__name__,
)
def test_other_joined_keys_are_left(model: nn.Module, args: tuple[Tensor, ...]) -> None:
    with pytest.warns(AttnoptWarning, match="needs-self-attention"):
        fast = attnopt.optimize(model, LocalWindow(2), args)
    assert not fast.sites[0].is_cross
    oracle.assert_same(oracle.run(fast, args), oracle.run(model, args))


class LowRank(Projected):
    """Queries are made from a few features, scaled by their length, which ``length`` computes."""

    def __init__(self, length: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.down, self.up, self.length = nn.Linear(E, 6), nn.Linear(6, E), length

    def forward(self, x: Tensor) -> Tensor:
        few = self.down(x)
        q, k, v = self.heads(x, x, x)
        q = self.up(few / self.length(few)).unflatten(-1, (H, D)).transpose(1, 2)
        return self.attended(q, k, v)


LENGTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda t: t.square().mean(-1, keepdim=True).sqrt(),
    "sum": lambda t: (t * t).sum(-1, keepdim=True).sqrt(),
    "norm": lambda t: t.norm(dim=-1, keepdim=True),
    "largest": lambda t: t.abs().amax(-1, keepdim=True),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_norm_by_hand_leaves_each_token_in_its_place(name: str) -> None:
    torch.manual_seed(0)
    (site,) = attnopt.inspect(LowRank(LENGTHS[name]).eval(), (torch.randn(2, 7, E),)).sites
    assert not site.is_cross


def test_a_running_sum_mixes_tokens() -> None:
    (site,) = attnopt.inspect(LowRank(lambda t: t.abs().cumsum(1)).eval(), (torch.randn(2, 7, E),)).sites
    assert site.is_cross
