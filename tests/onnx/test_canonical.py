"""What lowering notes at the attention calls of a graph: an export finds it there, whatever happened to the model since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import oracle
import pytest
import torch
from onnx_core import run
from test_decoder import END, optimized
from test_export import Encoder

import attnopt
from attnopt.lower.attention_calls import attention_calls, lowered_at
from attnopt.passes import LocalWindow, ScaleHeads
from attnopt.patterns import Window

X = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))


def two_windows(backend: str) -> attnopt.OptimizedModel:
    torch.manual_seed(0)
    policy = {"#2": [LocalWindow(2)], "*": [LocalWindow(4), ScaleHeads([1.0, 2.0, 1.0, 0.5])]}
    return attnopt.optimize(Encoder().eval(), policy, (X,), dynamic_shapes="auto", backend=backend)


def said(file: Path) -> Any:
    return json.loads({p.key: p.value for p in onnx.load(file).metadata_props}["attnopt.attention"])


@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_calls_know_their_site_and_spec(backend: str) -> None:
    fast = two_windows(backend)
    found = [lowered_at(call) for call in attention_calls(fast.graph_module.graph)]
    assert [(f.site, f.spec.pattern, f.spec.after) for f in found if f] == [
        ("", Window(4, 4), ()),
        ("#2", Window(2, 2), ()),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_a_loaded_model_is_exported_as_before(backend: str, tmp_path: Path) -> None:
    fast = two_windows(backend)
    fast.save(tmp_path / "saved")
    again = attnopt.load(tmp_path / "saved")
    again.save(tmp_path / "once more")
    for name, model in {"own": fast, "loaded": again, "twice": attnopt.load(tmp_path / "once more")}.items():
        model.export_onnx(tmp_path / f"{name}.onnx")
    own, *others = (said(tmp_path / f"{name}.onnx") for name in ("own", "loaded", "twice"))
    assert [(s["site"], s["form"], s["pattern"]) for s in own] == [
        ("", "blocks", "Window(left=4, right=4)"),
        ("#2", "blocks", "Window(left=2, right=2)"),
    ]
    assert others == [own, own]
    oracle.assert_same(run(tmp_path / "loaded.onnx", (X,)), oracle.run(fast, (X,)))


def test_a_model_that_was_trained_is_exported_with_its_weights(tmp_path: Path) -> None:
    fast = two_windows("sdpa")
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(1.5)
    fast.export_onnx(tmp_path / "m.onnx")
    assert [s["form"] for s in said(tmp_path / "m.onnx")] == ["blocks", "blocks"]
    oracle.assert_same(run(tmp_path / "m.onnx", (X,)), oracle.run(fast, (X,)))


@pytest.mark.slow
def test_a_loaded_decoder(tmp_path: Path) -> None:
    optimized(LocalWindow(4)).save(tmp_path / "saved")
    attnopt.load(tmp_path / "saved").export_decoder(tmp_path / "decoder", context_length=32, eos_token_id=END)
    assert {s["pattern"] for s in said(tmp_path / "decoder" / "model.onnx")} == {"Causal() & Window(left=4, right=0)"}
