"""One tensor that serves as queries and keys, or as keys and values, or as all three."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import attnopt
from attnopt.ir.interfaces import Pass
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, ScaleHeads
from attnopt.patterns import Window

E, H, D = 12, 3, 4
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 2).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)


class Shared(nn.Module):
    """``roles`` names the projections that make q, k and v: "aab" has one for q and k."""

    def __init__(self, roles: str, mix: Mix) -> None:
        super().__init__()
        self.roles, self.mix = roles, mix
        self.made = nn.ModuleDict({name: nn.Linear(E, E) for name in sorted(set(roles))})
        self.out = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        heads = {name: f(x).unflatten(-1, (H, D)).transpose(1, 2) for name, f in self.made.items()}
        mixed = self.mix(*(heads[name] for name in self.roles))
        made: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return made


EVERY = pytest.mark.parametrize("roles", ["aab", "aba", "abb", "aaa"])
MIXES = pytest.mark.parametrize("mix", [fused, by_hand, by_einsum], ids=["sdpa", "hand", "einsum"])


@EVERY
@MIXES
def test_each_rewrite_means_what_it_means(roles: str, mix: Mix) -> None:
    model, args = Shared(roles, mix), (torch.randn(2, 7, E),)
    own = oracle.run(model, args)
    window = oracle.Edit(oracle.visible(Window(2, 1), 7, 7, 1))
    gains = oracle.Edit(gains=(1.0, 0.0, 1.0))
    cases: list[tuple[Pass, oracle.Edit]] = [
        (LocalWindow(2, 1), window), (PruneHeads(heads=[1]), gains), (ScaleHeads({1: 0.0}), gains),
    ]  # fmt: skip
    for p, edit in cases:
        fast = attnopt.optimize(model, p, args)
        assert [s.status for s in fast.report.sites] == ["rewritten"]
        want = oracle.run_edited(model, args, None, {0: edit})
        oracle.assert_same(oracle.run(fast, args), want, p.name)
        oracle.assert_differs(want, own)
    (site,) = fast.sites
    assert site.projections["q"].rows == tuple(tuple(range(h * D, h * D + D)) for h in range(H))


@EVERY
def test_sizes_may_vary(roles: str) -> None:
    model = Shared(roles, fused)
    shapes = {"x": {0: Dim("B", min=1, max=99), 1: Dim("L", min=2, max=99)}}
    fast = attnopt.optimize(model, "fuse", (torch.randn(2, 7, E),), dynamic_shapes=shapes)
    for batch, length in ((2, 7), (5, 3), (3, 41)):
        x = torch.randn(batch, length, E)
        oracle.assert_same(oracle.run(fast, (x,)), oracle.run(model, (x,)))


@EVERY
def test_merged_heads_of_a_tensor_in_two_roles(roles: str) -> None:
    """Keys and values are averaged; queries made by the same weight stay as they are."""
    model, args = Shared(roles, fused), (torch.randn(2, 7, E),)
    fast = attnopt.optimize(model, GroupedQuery(1, merge="mean"), args)
    assert fast.sites[0].num_kv_heads == 1
    x = args[0]
    heads = {name: f(x).unflatten(-1, (H, D)).transpose(1, 2) for name, f in model.made.items()}
    q, k, v = (heads[name] for name in roles)
    shared = (t.mean(1, keepdim=True).expand(-1, H, -1, -1) for t in (k, v))
    want = model.out(F.scaled_dot_product_attention(q, *shared).transpose(1, 2).flatten(2))
    oracle.assert_same(oracle.run(fast, args), [want])


class Bare(nn.Module):
    """Inputs alone."""

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, v)


@pytest.mark.parametrize("length", [7, 9])
def test_inputs_in_two_roles(length: int) -> None:
    args = (torch.randn(2, H, length, D), torch.randn(2, H, length, D))
    for p, edit in ((LocalWindow(2, 1), oracle.Edit(oracle.visible(Window(2, 1), length, length, 1))),):
        fast = attnopt.optimize(Bare(), p, args)
        assert [s.is_cross for s in fast.sites] == [False]
        oracle.assert_same(oracle.run(fast, args), oracle.run_edited(Bare(), args, None, {0: edit}))
