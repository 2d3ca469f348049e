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
from models import Attention, Spelling
from torch import Tensor, nn

import attnopt
from attnopt.passes import LocalWindow, PruneHeads, ScaleHeads


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


def test_an_operator_of_attnopt_says_what_to_do_instead() -> None:
    model, (args, kwargs) = Layers(), given()
    first = attnopt.optimize(model, LocalWindow(1), args, kwargs, backend="blocked")
    with pytest.warns(attnopt.AttnoptWarning, match="2 of them near misses; optimize the original model"):
        again = attnopt.optimize(first, PruneHeads(heads=[1]), args, kwargs)
    assert {m.refusal.hint for m in again.report.near_misses} == {"optimize the original model with all of its passes"}
    both = attnopt.optimize(model, [LocalWindow(1), PruneHeads(heads=[1])], args, kwargs, backend="blocked")
    assert {s.num_heads for s in both.sites} == {3}


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
