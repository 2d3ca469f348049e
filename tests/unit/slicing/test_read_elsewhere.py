"""What something besides the attention reads is computed once: heads that go leave it whole, and nothing stands twice."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from oracle import assert_same, run
from torch import Tensor, nn

import attnopt
from attnopt.passes import GroupedQuery, PruneHeads

pytestmark = pytest.mark.usefixtures("one_capture")

WIDTH, HEADS, GROUPS, DIM = 48, 6, 3, 8
Q, KV, OTHER = HEADS * DIM, GROUPS * DIM, 20
GONE = (0, 1)  # with their group
LESS = 2 * DIM  # features of the queries that go


class Model(nn.Module):
    """``packed``: in one projection, which has ``OTHER`` more features; ``read``: what the model returns beside its output."""

    def __init__(self, packed: bool, read: str) -> None:
        super().__init__()
        sizes = [Q + 2 * KV + OTHER] if packed else [Q, KV, KV, OTHER]
        self.read, self.projections = read, nn.ModuleList(nn.Linear(WIDTH, n) for n in sizes)
        self.out = nn.Linear(Q, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        own = [p(x) for p in self.projections]
        parts = own if len(own) > 1 else own[0].split([Q, KV, KV, OTHER], -1)
        q, k, v = (t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in parts[:3])
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out = self.out(mixed.transpose(1, 2).flatten(2))
        return (out, *{"cache": (k, v), "other": (parts[3],), "whole": (own[0].sum(-1),)}[self.read])


def without(model: nn.Module) -> nn.Module:
    """The same with zeros in the place of the heads that go."""
    with torch.no_grad():
        model.out.weight[:, : len(GONE) * DIM] = 0  # type: ignore[index, union-attr]
    return model


def rows(model: nn.Module) -> int:
    """Features that its projections have before the output's."""
    return sum(p.shape[0] for n, p in model.named_parameters() if p.ndim == 2 and not n.endswith("out.weight"))


PACKED = pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
LEFT = {"cache": Q - LESS + 2 * KV, "other": Q - LESS + 2 * (KV - DIM) + OTHER}


@PACKED
@pytest.mark.parametrize("read", LEFT)
def test_heads_that_go_leave_nothing_twice(packed: bool, read: str) -> None:
    model, x = Model(packed, read).eval(), torch.randn(2, 7, WIDTH)
    fast = attnopt.optimize(model, PruneHeads(heads=GONE), (x,))
    assert rows(fast) == LEFT[read]
    assert_same(run(fast, (x,)), run(without(model), (x,)))
    told = [n for n in fast.report.sites[0].notes if "weights of all heads stay" in n]
    assert [n.split(" weights")[0] for n in told] == (["the k and v"] if read == "cache" else [])


def test_what_is_read_whole_stays_whole() -> None:
    model, x = Model(True, "whole").eval(), torch.randn(2, 7, WIDTH)
    fast = attnopt.optimize(model, PruneHeads(heads=GONE), (x,))
    assert rows(fast) == rows(model)
    assert_same(run(fast, (x,)), run(without(model), (x,)))


@PACKED
def test_merged_heads_stand_beside_those_that_are_read(packed: bool) -> None:
    model, x = Model(packed, "cache").eval(), torch.randn(2, 7, WIDTH)
    fast = attnopt.optimize(model, GroupedQuery(1), (x,))
    assert rows(fast) == Q + 2 * KV + 2 * DIM
    assert [n.split(" weights")[0] for n in fast.report.sites[0].notes if "heads stay" in n] == ["the k and v"]
    assert_same(run(fast, (x,))[1:], run(model, (x,))[1:])


def test_sizes_of_another_projection_make_none_packed() -> None:
    """Where batch and heads are one axis, keys are taken apart by the sizes of the queries."""

    class Merged(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (p(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in list(self.projections)[:3])
            mixed = torch.bmm((_merged(q) @ _merged(k).mT * DIM**-0.5).softmax(-1), _merged(v))
            out = self.out(mixed.view(len(x), HEADS, -1, DIM).transpose(1, 2).reshape(len(x), -1, Q))
            return out, k, v

    model, x = Merged(False, "cache").eval(), torch.randn(2, 7, WIDTH)
    for i in (1, 2):
        model.projections[i] = nn.Linear(WIDTH, Q)
    fast = attnopt.optimize(model, PruneHeads(heads=GONE), (x,), dynamic_shapes="auto")
    assert rows(fast) == Q - LESS + 2 * Q
    assert {n for n, _ in fast.named_parameters()} == {
        f"module.{n}" for n, _ in model.named_parameters() if ".3." not in n
    }
    other = torch.randn(3, 5, WIDTH)
    assert_same(run(fast, (other,)), run(without(model), (other,)))


def _merged(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


@PACKED
@pytest.mark.parametrize("read", ["cache", "other"])
def test_a_file_holds_every_weight_once(packed: bool, read: str, tmp_path: Path) -> None:
    x = torch.randn(2, 7, WIDTH)
    for policy, gone in (("fuse", {}), (PruneHeads(heads=GONE), {"cache": LESS, "other": LESS + 2 * DIM})):
        attnopt.optimize(Model(packed, read).eval(), policy, (x,)).export_onnx(tmp_path / "m.onnx")
        held = [tuple(i.dims) for i in onnx.load(tmp_path / "m.onnx").graph.initializer if len(i.dims) == 2]
        less = gone.get(read, 0)
        features = Q + 2 * KV + (OTHER if read == "other" else 0) - less
        assert sum(a * b for a, b in held) == WIDTH * (features + Q - (LESS if less else 0))
