"""An optimized model as a model: optimized once more, copied, pickled."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from models import Attention, Spelling, inputs
from torch import Tensor, nn

import attnopt
from attnopt import Input
from attnopt.backends.attention_operator import ATTENTION
from attnopt.graph.nodes import is_call
from attnopt.passes import LocalWindow, PruneHeads, ScaleHeads, Sparse
from attnopt.patterns import Causal, PerHead, Segments, Window


class Layers(nn.Module):
    """Two attentions, called with a keyword and a nested input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(Spelling(mask=("padding",)), seed=i) for i in range(2))

    def forward(self, x: Tensor, masks: dict[str, Tensor], *, scale: float = 1.0) -> dict[str, Tensor]:
        for layer in self.layers:
            x = x + layer(x, padding=masks["padding"]) * scale
        return {"x": x}


def given() -> tuple[tuple[Any, ...], dict[str, Any]]:
    seen = torch.ones(2, 7, dtype=torch.bool)
    seen[1, -2:] = False
    return (torch.randn(2, 7, 12), {"padding": seen}), {"scale": 0.5}


NAMES = ["layers.0", "layers.1"]


def test_sites_keep_their_names_and_lines(tmp_path: Path) -> None:
    model, (args, kwargs) = Layers(), given()
    first = attnopt.optimize(model, PruneHeads(heads=[1]), args, kwargs)
    again = attnopt.optimize(first, {"layers.1": LocalWindow(1)}, args, kwargs)
    assert [s.name for s in first.sites] == [s.name for s in again.sites] == NAMES
    assert [s.where for s in first.sites] == [s.where for s in again.sites]
    assert [s.status for s in again.report.sites] == ["unchanged", "rewritten"]
    assert [s.name for s in attnopt.inspect(again, args, kwargs).sites] == NAMES
    again.save(tmp_path / "model")
    loaded = attnopt.load(tmp_path / "model")
    assert [s.name for s in attnopt.inspect(loaded, args, kwargs).sites] == NAMES
    third = attnopt.optimize(loaded, ScaleHeads({0: 2.0}), args, kwargs, dynamic_shapes=None)
    window = torch.ones(7, 7, dtype=torch.bool).tril(1).triu(-1)
    halved = [(2.0, 0.0, 1.0, 1.0)] * 2
    edits = {0: oracle.Edit(gains=halved[0]), 1: oracle.Edit(visible=window, gains=halved[1])}
    assert {s.num_heads for s in third.sites} == {3}
    oracle.assert_same(oracle.run(third, args, kwargs), oracle.run_edited(model, args, kwargs, edits))


SHOWN = torch.ones(30, 30, dtype=torch.bool)
WINDOW = SHOWN.tril(2).triu(-2)
BY_HEAD = PerHead({1: Window(left=1, right=1)}, Causal())
# A spelling, the first policy, and what it leaves visible.
CALLS: dict[str, tuple[Spelling, Any, Tensor]] = {
    "window": (Spelling(), LocalWindow(2), WINDOW),
    "causal": (Spelling(mask=("causal",)), LocalWindow(2), WINDOW.tril()),
    "padding": (Spelling(mask=("padding",)), LocalWindow(2), WINDOW),
    "bias": (Spelling(bias_kind="addend", kv_heads=2), LocalWindow(2), WINDOW),
    "softcap": (Spelling(softcap=2.0, kv_heads=1), LocalWindow(2), WINDOW),
    "sinks": (Spelling(sinks=True, mask=("causal",)), LocalWindow(2), WINDOW.tril()),
    "tiled": (Spelling(kv_heads=2, share="tiled"), LocalWindow(2), WINDOW),
    "windows": (Spelling(windows=True), LocalWindow(2), WINDOW),
    "by head": (Spelling(), Sparse(BY_HEAD), torch.stack([SHOWN.tril(), SHOWN.tril(1).triu(-1), *[SHOWN.tril()] * 2])),
}


@pytest.mark.parametrize("name", CALLS)
def test_attnopts_own_operator_is_found_again(name: str) -> None:
    spelling, policy, shown = CALLS[name]
    model = Attention(spelling)
    fast = attnopt.optimize(model, policy, (), inputs(spelling, 9), dynamic_shapes="auto", backend="blocked")
    again = attnopt.optimize(
        fast, PruneHeads(heads=[1]), (), inputs(spelling, 9), dynamic_shapes="auto", backend="blocked"
    )
    assert is_blocked(fast)
    assert is_blocked(again)
    assert [s.num_heads for s in again.sites] == [3]
    for length in (9, 23):
        x = inputs(spelling, length, batch=2 if spelling.windows else 3)  # whose windows are those of the example
        edit = oracle.Edit(shown[..., :length, :length], gains=(1.0, 0.0, 1.0, 1.0))
        oracle.assert_same(oracle.run(again, (), x), oracle.run_edited(model, (), x, {0: edit}))


def test_pairs_that_a_tensor_names_need_the_original_model() -> None:
    model, given = Attention(Spelling()), {**inputs(Spelling(), 9), "ids": torch.randint(0, 2, (2, 9))}
    fast = attnopt.optimize(model, Sparse(Segments(Input("ids"))), (), given, backend="blocked")
    assert is_blocked(fast)
    (miss,) = attnopt.inspect(fast, (), given).near_misses
    assert miss.refusal.hint == "optimize the original model with all of its passes"


def is_blocked(fast: attnopt.OptimizedModel) -> bool:
    return any(is_call(n, ATTENTION) for n in fast.graph_module.graph.nodes)


def test_new_numbers_of_heads_are_told() -> None:
    model, (args, kwargs) = Layers(), given()
    first = attnopt.optimize(model, {"layers.0": PruneHeads(heads=[1])}, args, kwargs)
    again = attnopt.optimize(first, ScaleHeads({1: 3.0}), args, kwargs)
    told = "heads 0, 2, 3 of the optimized model have the numbers 0 to 2 here, also in policies"
    assert [told in site.notes for site in again.report.sites] == [True, False]
    edits = {0: oracle.Edit(gains=(1.0, 0.0, 3.0, 1.0)), 1: oracle.Edit(gains=(1.0, 3.0, 1.0, 1.0))}
    oracle.assert_same(oracle.run(again, args, kwargs), oracle.run_edited(model, args, kwargs, edits))


def test_an_exported_program_keeps_names_too() -> None:
    args, kwargs = given()
    program = torch.export.export(Layers(), args, kwargs, strict=False)
    assert [s.name for s in attnopt.optimize(program, "fuse", args, kwargs).sites] == NAMES


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy], ids=["deep", "shallow"])
def test_copies_run_alike(copied: Any) -> None:
    args, kwargs = given()
    fast = attnopt.optimize(Layers(), PruneHeads(heads=[1]), args, kwargs)
    other = copied(fast)
    oracle.assert_same(oracle.run(other, args, kwargs), oracle.run(fast, args, kwargs), limit=0.0)
    assert other.report == fast.report
    shared = {id(p) for p in fast.parameters()} & {id(p) for p in other.parameters()}
    assert bool(shared) == (copied is copy.copy)


@pytest.mark.parametrize("write", [pickle.dumps, lambda m: torch.save(m, io.BytesIO())], ids=["pickle", "torch.save"])
def test_pickling_names_what_to_do_instead(write: Any) -> None:
    args, kwargs = given()
    fast = attnopt.optimize(Layers(), "fuse", args, kwargs)
    with pytest.raises(attnopt.AttnoptError, match=r"cannot be pickled[\s\S]*fast\.save\(path\)"):
        write(fast)
    assert pickle.loads(pickle.dumps(fast.state_dict())).keys() == fast.state_dict().keys()
