"""Which weights are left when heads go: nothing of a head that is gone, and projections of one input together."""

from __future__ import annotations

from collections.abc import Callable
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
Q, KV = HEADS * DIM, GROUPS * DIM


class Attending(nn.Module):
    """[B, L, WIDTH] -> [B, L, WIDTH]; subclasses project."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(Q, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in self.projected(x))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        made: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return made

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class Separate(Attending):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n, bias=bias) for n in (Q, KV, KV))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


class Matrices(Attending):
    """Parameters of the attention itself, stored as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(WIDTH, n) / 7) for n in (Q, KV, KV))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x @ self.wq, x @ self.wk, x @ self.wv


class Packed(Attending):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, Q + 2 * KV)
        self.norms = nn.ModuleList([nn.RMSNorm(Q), nn.RMSNorm(KV)] if norm else [nn.Identity()] * 2)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).split([Q, KV, KV], -1)
        return self.norms[0](q), self.norms[1](k), v


class PackedByGroup(Attending):
    """Each group's queries beside its key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, Q + 2 * KV)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.packed(x).unflatten(-1, (GROUPS, HEADS // GROUPS + 2, DIM))
        return y[..., :-2, :].flatten(-3), y[..., -2, :].flatten(-2), y[..., -1, :].flatten(-2)

    def packed(self, x: Tensor) -> Tensor:
        made: Tensor = self.qkv(x)
        return made


class PackedByGroupOfAllTokens(PackedByGroup):
    """As GPT-2's ``Conv1D``: a matrix product of batch and tokens in one axis, with a weight stored as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(self.qkv.weight.detach().mT.contiguous())

    def packed(self, x: Tensor) -> Tensor:
        return torch.addmm(self.qkv.bias, x.flatten(0, 1), self.kernel).view(*x.shape[:2], -1)


def pruned(model: nn.Module, *heads: int) -> attnopt.OptimizedModel:
    """Without these heads, and checked against the model with their part of the output projection zeroed."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, WIDTH)
    axes = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    fast = attnopt.optimize(model.eval(), PruneHeads(heads=heads), (x,), dynamic_shapes=axes)
    silenced = [c for h in heads for c in range(h * DIM, (h + 1) * DIM)]
    for given in (x, torch.randn(3, 5, WIDTH)):
        weight = model.out.weight.detach().clone()
        weight[:, silenced] = 0
        want = torch.func.functional_call(model, {"out.weight": weight}, (given,))
        assert_same(run(fast, (given,), {}), [want], "pruned")
    return fast


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix("module."): tuple(p.shape) for name, p in model.named_parameters()}


def test_smaller_projections_of_one_input_are_joined() -> None:
    got = shapes(pruned(Separate(), 1, 2, 3))
    assert got == {
        "q_k_v.weight": (3 * DIM + 2 * 2 * DIM, WIDTH), "q_k_v.bias": (7 * DIM,),
        "out.weight": (WIDTH, 3 * DIM), "out.bias": (WIDTH,),
    }  # fmt: skip


def test_parameters_of_one_module_are_joined_there() -> None:
    assert shapes(pruned(Matrices(), 0, 1, 5))["wq_wk_wv"] == (WIDTH, 7 * DIM)


def test_what_keeps_its_size_stays_the_users_own() -> None:
    model = Separate(bias=False).eval()
    fast = attnopt.optimize(model, GroupedQuery(1, merge="first", grouping="adjacent"), (torch.randn(2, 7, WIDTH),))
    assert shapes(fast)["k_v.weight"] == (2 * DIM, WIDTH)
    assert fast.get_parameter("module.q.weight") is model.q.weight


def test_a_packed_projection_stays_one() -> None:
    assert shapes(pruned(Packed(), 1, 2, 3))["qkv.weight"] == (7 * DIM, WIDTH)


@pytest.mark.parametrize("form", [PackedByGroup, PackedByGroupOfAllTokens])
@pytest.mark.parametrize("heads", [(1,), (1, 2, 3), (0, 3, 4)])
def test_groups_that_lose_different_heads(heads: tuple[int, ...], form: type[PackedByGroup]) -> None:
    fast = pruned(form(), *heads)
    groups = len({h // 2 for h in range(HEADS) if h not in heads})
    features = (HEADS - len(heads) + 2 * groups) * DIM
    kept = {name: size for name, size in shapes(fast).items() if not name.startswith("out")}
    assert kept.pop("qkv.bias") == (features,)
    assert set(*kept.values()) == {features, WIDTH}


def test_a_norm_across_heads_keeps_what_it_measures() -> None:
    """Queries and keys stay, as the norm takes all of them; the value of the group that went does not."""
    assert shapes(pruned(Packed(norm=True), 2, 3))["qkv.weight"] == (Q + KV + 2 * DIM, WIDTH)


class Bent(Separate):
    """Queries and keys go through a function of single elements."""

    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bend = bend

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().projected(x)
        return self.bend(q), self.bend(k), v


@pytest.mark.parametrize("bend", [nn.functional.mish, nn.functional.hardswish, torch.erf, torch.expm1])
def test_functions_of_single_elements_keep_heads_apart(bend: Callable[[Tensor], Tensor]) -> None:
    got = shapes(pruned(Bent(bend), 0, 1))
    assert got["q_k_v.weight"] == (4 * DIM + 2 * 2 * DIM, WIDTH)


def test_detached_weights_are_cut() -> None:
    class Detached(Separate):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in self.projected(x))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
            return nn.functional.linear(mixed, self.out.weight.detach(), self.out.bias)

    assert shapes(pruned(Detached(), 0, 1))["out.weight"] == (WIDTH, 4 * DIM)


def test_weights_that_are_read_elsewhere_are_not_joined() -> None:
    class Returning(Separate):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), self.k.weight.sum()

    model = Returning().eval()
    x = torch.randn(2, 7, WIDTH)
    fast = attnopt.optimize(model, PruneHeads(heads=(2, 3)), (x,))
    assert torch.equal(fast(x)[1], model(x)[1])
    assert shapes(fast)["k.weight"] == (KV, WIDTH)


def test_joined_projections_are_found_again() -> None:
    fast = pruned(Separate(), 0, 1)
    again = attnopt.inspect(fast, (torch.randn(2, 7, WIDTH),))
    (site,) = again.sites
    assert (site.num_heads, site.num_kv_heads) == (4, 2)
    assert {p.weight for r, p in site.projections.items() if r != "out"} == {"module.q_k_v.weight"}


@pytest.mark.parametrize("model", [Packed(), Packed(norm=True), PackedByGroup()], ids=["packed", "norm", "groups"])
def test_onnx_takes_packed_projections_apart(model: nn.Module, tmp_path: Path) -> None:
    """One product for each role, which ONNX Runtime need not copy the parts of."""
    x = torch.randn(2, 7, WIDTH)
    attnopt.optimize(model.eval(), "fuse", (x,)).export_onnx(tmp_path / "m.onnx")
    made = onnx.load(tmp_path / "m.onnx")
    assert {tuple(i.dims) for i in made.graph.initializer} >= {(WIDTH, Q), (WIDTH, KV)}
    assert not {n.op_type for n in made.graph.node} & {"Split", "Slice", "Gather"}
