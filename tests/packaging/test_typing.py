"""The package is typed for its users: a strictly checked script passes, and its mistakes are seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

SCRIPT = """
import torch
from torch import nn

import attnopt
from attnopt.passes import LocalWindow, PruneHeads
from attnopt.patterns import Causal, Sinks, Window


def use(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[float, ...]]:
    found = attnopt.inspect(model, (x,))
    sizes: list[int] = [site.num_heads for site in found.sites]
    fast = attnopt.optimize(model, {"*": [LocalWindow(left=4), PruneHeads(0.5)]}, (x,), dynamic_shapes="auto", calibration=[x])
    error: float | None = fast.report.error
    fast.save("saved")
    again: attnopt.OptimizedModel = attnopt.load("saved")
    again.export_onnx("m.onnx", opset=23)
    pattern = Causal() & (Window(3, 0) | Sinks(2))
    mask: torch.Tensor = pattern.mask(8, 8)
    importance = attnopt.head_importance(model, [x])
    print(sizes, error, mask.shape, fast.report.to_json())
    return dict(importance)
"""
WRONG = {
    'LocalWindow(left="4")': "LocalWindow(left=4)",
    "fast.report.eror": "fast.report.error",
    'again.export_onnx("m.onnx", opset="23")': 'again.export_onnx("m.onnx", opset=23)',
    "attnopt.load(3)": 'attnopt.load("saved")',
}


@pytest.mark.slow
@pytest.mark.subprocess
def test_users_are_checked(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(SCRIPT)
    wrong = SCRIPT
    for mistake, good in WRONG.items():
        assert good in wrong
        wrong = wrong.replace(good, mistake)
    (tmp_path / "wrong.py").write_text(wrong)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file", ""]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "users"), "right.py", "wrong.py"]  # torch takes half a minute
    found = {**os.environ, "MYPYPATH": str(ROOT)}  # mypy does not follow the import hook of an editable installation
    done = subprocess.run(command, cwd=tmp_path, env=found, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert not [line for line in lines if not line.startswith("wrong.py")], done.stdout + done.stderr
    assert len(lines) == len(WRONG), done.stdout
