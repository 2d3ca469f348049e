"""What a new user does wrong: each message says what, where, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnopt
from attnopt.passes import LocalWindow
from attnopt.patterns import Window


class Add(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.mean() + 1


X = torch.randn(2, 5, 8)
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "a class": (lambda: attnopt.Policy.of(LocalWindow), r"is not a pass\n  hint: call it .*: LocalWindow\(\.\.\.\)"),
    "a pattern": (
        lambda: attnopt.Policy.of(Window(3)),
        r"is not a pass\n  hint: a pattern goes into .*Sparse\(pattern\)",
    ),
    "no such policy": (lambda: attnopt.Policy.of("no.yaml"), r"no\.yaml: cannot be read: No such file"),
    "no such model": (
        lambda: attnopt.inspect("model.pt", (X,)),
        r"there is no file model\.pt\n  hint: .*the model itself",
    ),
    "a list of args": (
        lambda: attnopt.optimize(Add(), "fuse", [X]),  # type: ignore[arg-type]
        r"itself fails on the example inputs: .*\n  hint: args is a tuple: pass \(x, \.\.\.\)",
    ),
    "an array": (
        lambda: attnopt.inspect(nn.Linear(8, 8), (X.numpy(),)),
        r"itself fails on the example inputs: .*\n  hint: pass tensors: torch\.from_numpy",
    ),
    "a text for shapes": (
        lambda: attnopt.inspect(Add(), (X,), dynamic_shapes="automatic"),
        r"invalid value dynamic_shapes='automatic'\n  hint: use \"auto\"",
    ),
    "an axis too many": (
        lambda: attnopt.inspect(Add(), (X,), dynamic_shapes={"x": {5: torch.export.Dim.DYNAMIC}}),
        r"names axis 5 of x, which has 3 axes",
    ),
    "an axis from the end": (
        lambda: attnopt.inspect(Add(), (X,), dynamic_shapes=({-1: torch.export.Dim.DYNAMIC},)),
        r"names axis -1 of x, which has 3 axes\n  hint: number the axes from 0",
    ),
    "names of sizes": (
        lambda: attnopt.inspect(Add(), (X,), dynamic_shapes={"x": ["batch", None, None]}),
        r"of x: axis 0 is 'batch'\n  hint: write",
    ),
    "shapes of another input": (
        lambda: attnopt.inspect(Add(), (X,), dynamic_shapes={"y": {0: torch.export.Dim.DYNAMIC}}),
        r"unknown inputs y; the inputs are x",
    ),
    "a number for shapes": (
        lambda: attnopt.inspect(Add(), (X,), dynamic_shapes=3),
        r"invalid value dynamic_shapes=3",
    ),
    "no such export": (
        lambda: attnopt.diff(Add(), "model.onnx", (X,)),
        r"there is no file model\.onnx",
    ),
}


@pytest.mark.parametrize("use", WRONG)
def test_the_message_helps(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong, message = WRONG[use]
    with pytest.raises(attnopt.AttnoptError, match=message):
        wrong()


class Several(nn.Module):
    def forward(self, x: Any, y: Any, *more: Any) -> Any:
        return x.mean() + y + sum(m.mean() for m in more)


def test_shapes_of_further_arguments_are_one_entry() -> None:
    free = torch.export.Dim.DYNAMIC
    found = attnopt.inspect(Several(), (X, X[0, 0], X), dynamic_shapes=[{0: free}, None, ({1: free},)])
    assert not found.sites
    with pytest.raises(attnopt.AttnoptError, match="names axis 4 of more_0, which has 3 axes"):
        attnopt.inspect(Several(), (X, X[0, 0], X), dynamic_shapes={"more": ({4: free},)})
