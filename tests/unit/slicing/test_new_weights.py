"""New weights of queries, keys and values reach the attention through whatever stands between: they were lost behind operators
that return several tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from oracle import assert_differs, assert_same, run
from torch import Tensor, nn

import attnopt
from attnopt import HeadWeights, Pass, Rewrite, Site
from attnopt.passes import GroupedQuery

pytestmark = pytest.mark.usefixtures("one_capture")

WIDTH, DIM = 32, 8
PLACES = torch.arange(7.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
COS, SIN = PLACES.cos(), PLACES.sin()


def _rotated(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a * COS - b * SIN, b * COS + a * SIN], -1)


def _of_unbound(x: Tensor) -> Tensor:
    return _rotated(*x.unflatten(-1, (2, DIM // 2)).unbind(-2))


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "slices": lambda x: _rotated(x[..., : DIM // 2], x[..., DIM // 2 :]),
    "chunk": lambda x: _rotated(*x.chunk(2, -1)),
    "split": lambda x: _rotated(*x.split([DIM // 2, DIM // 2], -1)),
    "unbind": _of_unbound,
    "turned": lambda x: torch.cat([x[..., 3:], x[..., :3]], -1),
    "turned by chunks": lambda x: torch.cat(x.chunk(2, -1)[::-1], -1),
    "norm of a part": lambda x: torch.cat(
        [x.chunk(2, -1)[0] / x.chunk(2, -1)[0].norm(dim=-1, keepdim=True), x[..., 4:]], -1
    ),
}


class Model(nn.Module):
    def __init__(self, spelling: str, kv_heads: int) -> None:
        super().__init__()
        self.turned = SPELLINGS[spelling]
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, kv_heads * DIM), nn.Linear(WIDTH, kv_heads * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        o = nn.functional.scaled_dot_product_attention(self.turned(q), self.turned(k), self.turned(v), enable_gqa=True)
        made: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return made


@dataclass(frozen=True)
class _Times(Pass):
    """All weights of one role times a number; no head goes."""

    name: ClassVar[str] = "times"
    exact: ClassVar[bool] = False
    role: str
    factor: float = 1.5

    def rewrite(self, site: Site) -> Rewrite:
        edits = []
        for head in site.spec.heads if self.role == "q" else site.spec.kv_heads:
            weight, bias = site.head_weight(self.role, head), site.head_bias(self.role, head)
            assert weight is not None
            assert bias is not None
            edits.append(HeadWeights(self.role, head, weight * self.factor, bias * self.factor))
        return Rewrite(site.spec, tuple(edits))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_new_weights_reach_the_attention(spelling: str, kv_heads: int) -> None:
    model, x = Model(spelling, kv_heads).eval(), torch.randn(2, 7, WIDTH)
    before = run(model, (x,))
    for role in "qkv":
        fast = attnopt.optimize(model, _Times(role), (x,))
        assert fast.report.sites[0].status == "rewritten"
        changed = Model(spelling, kv_heads).eval()
        changed.load_state_dict({n: p * (1.5 if n.startswith(role) else 1.0) for n, p in model.state_dict().items()})
        wanted = run(changed, (x,))
        assert_differs(wanted, before)
        assert_same(run(fast, (x,)), wanted)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_merged_heads_reach_the_attention(spelling: str) -> None:
    model, x = Model(spelling, 4).eval(), torch.randn(2, 7, WIDTH)
    fast = attnopt.optimize(model, GroupedQuery(2), (x,))
    merged = Model(spelling, 2).eval()
    state = model.state_dict()
    state |= {n: p.unflatten(0, (2, 2, DIM)).mean(1).flatten(0, 1) for n, p in state.items() if n[0] in "kv"}
    merged.load_state_dict(state)
    assert_same(run(fast, (x,)), run(merged, (x,)))
