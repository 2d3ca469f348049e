"""Models that call ``flex_attention``: read through their score_mod and mask_mod, or left to their own kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

import attnopt
from attnopt.passes import LocalWindow, PruneHeads
from attnopt.patterns import Window

E, H, D, L = 12, 3, 4, 7
Mod = Callable[..., Tensor]


class Flex(nn.Module):
    """[B, L, E] -> [B, L, E]; ``score`` and ``seen`` make the mods of a call from the module and its other input."""

    def __init__(
        self,
        score: Callable[..., Mod] | None = None,
        seen: Callable[..., Mod] | None = None,
        kv: int = H,
        **options: Any,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(E, E), nn.Linear(E, kv * D), nn.Linear(E, kv * D), nn.Linear(E, E)
        self.table = nn.Parameter(torch.randn(H, 64))
        self.register_buffer("slopes", 0.5 ** torch.arange(1.0, H + 1))
        self.score, self.seen, self.options = score, seen, {"enable_gqa": kv != H, **options}

    def blocks(self, length: int, batch: int, other: Tensor | None) -> BlockMask | None:
        if self.seen is None:
            return None
        count = None if other is None else batch
        return create_block_mask(self.seen(self, other), count, None, length, length, device="cpu")

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        q, k, v = (f(x).unflatten(-1, (-1, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mod = None if self.score is None else self.score(self, other)
        made = flex_attention(q, k, v, mod, self.blocks(x.shape[1], len(x), other), **self.options)
        if isinstance(made, tuple):
            return self.o(made[0].transpose(1, 2).flatten(2)), made[1].lse
        return self.o(made.transpose(1, 2).flatten(2))


def causal(m: Flex, other: Any) -> Mod:
    return lambda b, h, i, j: i >= j


def one_document(m: Flex, other: Any) -> Mod:
    return lambda b, h, i, j: (other[b, i] == other[b, j]) & (i >= j)


def first_head_sees_all(m: Flex, other: Any) -> Mod:
    return lambda b, h, i, j: (h == 0) | (i >= j)


def relative(m: Flex, other: Any) -> Mod:
    return lambda s, b, h, i, j: s + m.table[h, i - j + 32]


def row_by_row(m: Flex, other: Any) -> Mod:
    return lambda s, b, h, i, j: s + m.table[h][i - j + 32]


def alibi(m: Flex, other: Any) -> Mod:
    return lambda s, b, h, i, j: s - m.slopes[h] * (i - j).abs()


def given(m: Flex, other: Any) -> Mod:
    return lambda s, b, h, i, j: s + other[b, 0, i, j]


def capped(m: Flex, other: Any) -> Mod:
    return lambda s, b, h, i, j: 5 * torch.tanh(s / 5)


def hidden_by_score(m: Flex, other: Any) -> Mod:
    return lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf"))


def rectified(m: Flex, other: Any) -> Mod:
    return lambda s, b, h, i, j: torch.relu(s)


def squared(m: Flex, other: Any) -> Mod:
    return lambda s, b, h, i, j: s * s


def replaced(m: Flex, other: Any) -> Mod:
    return lambda s, b, h, i, j: m.table[h, i - j + 32]


DOCUMENTS = torch.tensor([[0] * 3 + [1] * 4, [0] * L])
READ: dict[str, tuple[Flex, tuple[Tensor, ...], dict[str, Any]]] = {
    "plain": (Flex(), (), {"pattern": "Full()", "has_bias": False, "has_mask": False}),
    "causal": (Flex(seen=causal), (), {"pattern": "Causal()", "has_mask": False}),
    "scale": (Flex(seen=causal, scale=0.3), (), {"scale": 0.3}),
    "groups": (Flex(seen=causal, kv=1), (), {"pattern": "Causal()", "kv_heads": (0,)}),
    "documents": (Flex(seen=one_document), (DOCUMENTS,), {"has_mask": True}),
    "heads apart": (Flex(seen=first_head_sees_all), (), {"has_mask": True}),
    "table": (Flex(relative, causal), (), {"pattern": "Causal()", "has_bias": True}),
    "rows of a table": (Flex(row_by_row), (), {"has_bias": True}),
    "alibi": (Flex(alibi), (), {"has_bias": True}),
    "an input": (Flex(given), (torch.randn(2, 1, L, L),), {"has_bias": True}),
    "softcap": (Flex(capped, causal), (), {"softcap": 5.0, "pattern": "Causal()"}),
    "where": (Flex(hidden_by_score), (), {"pattern": "Causal()"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_calls_are_read_and_rewritten(name: str) -> None:
    model, others, want = READ[name]
    args = (torch.randn(2, L, E), *others)
    (site,) = attnopt.inspect(model, args).sites
    for field, value in want.items():
        got = getattr(site.spec, field)
        assert (str(got) if field == "pattern" else got) == value, field
    fast = attnopt.optimize(model, [LocalWindow(1, 1), PruneHeads(heads=[1])], args)
    assert [s.status for s in fast.report.sites] == ["rewritten"]
    assert "flex_attention" not in fast.graph_module.code
    edit = oracle.Edit(oracle.visible(Window(1, 1), L, L, 1), gains=(1.0, 0.0, 1.0))
    want_out = oracle.run_edited(model, args, None, {0: edit})
    oracle.assert_same(oracle.run(fast, args), want_out)
    oracle.assert_differs(want_out, oracle.run(model, args))


LEFT: dict[str, tuple[Flex, str]] = {
    "relu": (Flex(rectified), "no-query-key-product"),
    "squares": (Flex(squared), "scores-feed-back"),
    "no scores": (Flex(replaced), "no-query-key-product"),
    "log-sum-exp": (Flex(seen=causal, return_aux=AuxRequest(lse=True)), "opaque-operator"),
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")
def test_what_is_not_read_keeps_its_kernel(name: str) -> None:
    model, code = LEFT[name]
    args = (torch.randn(2, L, E),)
    fast = attnopt.optimize(model, "fuse", args)
    assert [m.refusal.code for m in fast.report.near_misses] == [code]
    assert not fast.sites
    assert "flex_attention" in fast.graph_module.code
    assert "_safe_softmax" not in fast.graph_module.code
    oracle.assert_same(oracle.run(fast, args), oracle.run(model, args), limit=0.0)


class BlocksAlone(Flex):
    """The blocks leave out keys that mask_mod, which there is none of, would show."""

    def blocks(self, length: int, batch: int, other: Tensor | None) -> BlockMask:
        counts = torch.ones(1, 1, length, dtype=torch.int32)
        indices = torch.arange(length, dtype=torch.int32)[None, None, :, None].expand(1, 1, length, length)
        return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=1, seq_lengths=(length, length))


@pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")
def test_blocks_that_hide_more_than_the_mask_are_left() -> None:
    fast = attnopt.optimize(BlocksAlone(), "fuse", (torch.randn(2, L, E),))
    (miss,) = fast.report.near_misses
    assert miss.refusal.found == "flex_attention whose BlockMask blocks and mask_mod hide different keys"


class Twice(nn.Module):
    """One that is read and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Flex(relative, causal), Flex(rectified, causal)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_each_call_goes_its_own_way() -> None:
    model, args = Twice(), (torch.randn(2, L, E),)
    fast = attnopt.optimize(model, PruneHeads(heads=[1]), args)
    assert [s.name for s in fast.sites] == ["first"]
    assert [m.name for m in fast.report.near_misses] == ["second"]
    want = oracle.run_edited(model, args, None, {0: oracle.Edit(gains=(1.0, 0.0, 1.0))})
    oracle.assert_same(oracle.run(fast, args), want)


@pytest.mark.slow  # compiles with inductor
def test_a_call_at_other_lengths() -> None:
    model = Flex(relative, causal)
    oracle.run(model, (torch.randn(2, 11, E),))  # dynamo remembers the size
    fast = attnopt.optimize(model, "fuse", (torch.randn(2, L, E),), dynamic_shapes={"x": {1: Dim("L", min=2, max=30)}})
    for length in (2, 9, 30):
        args = (torch.randn(2, length, E),)
        oracle.assert_same(oracle.run(fast, args), oracle.run(model, args))
    exact = attnopt.optimize(model, "fuse", (torch.randn(2, 5, E),))
    assert [s.status for s in exact.report.sites] == ["rewritten"]


compiled: Any = torch.compile(flex_attention, backend="eager")


class Compiled(Flex):
    """As it is called on a GPU."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        q, k, v = (f(x).unflatten(-1, (-1, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(compiled(q, k, v, block_mask=self.blocks(x.shape[1], len(x), None)).transpose(1, 2).flatten(2))


def test_a_compiled_call_is_read_too() -> None:
    (site,) = attnopt.inspect(Compiled(seen=causal), (torch.randn(2, L, E),)).sites
    assert str(site.spec.pattern) == "Causal()"


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_other_precisions(kind: torch.dtype) -> None:
    model, args = Flex(relative, causal).to(kind), (torch.randn(2, L, E, dtype=kind),)
    fast = attnopt.optimize(model, "fuse", args)
    assert [s.status for s in fast.report.sites] == ["rewritten"]
    oracle.assert_same(oracle.run(fast, args), oracle.run(model, args))
