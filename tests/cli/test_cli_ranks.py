"""``torchrun -m attnopt``: processes that share calibration and judging, and that end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from places import ROOT, SUPPORT

import attnopt

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]
SECONDS = 300


def torchrun(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Two processes, which find models and data in ``folder``, too."""
    path = os.pathsep.join(map(str, (ROOT, SUPPORT, folder)))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return subprocess.run(
        [*launcher, "-m", "attnopt", *command], env={**os.environ, "PYTHONPATH": path}, cwd=folder, text=True,
        capture_output=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def test_ranks_calibrate_as_one(tmp_path: Path) -> None:
    policy = "prune-heads(fraction=0.5)"
    done = torchrun(
        tmp_path,
        "optimize",
        "tiny_models:causal",
        "--data",
        "tiny_models:batches",
        "--policy",
        policy,
        "--out",
        "fast",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    told: Any = json.loads(done.stdout)  # of the first process alone
    assert told["written"] == {"saved": "fast"}
    model, args = tiny_models.causal()
    alone = attnopt.optimize(model.eval(), policy, args, calibration=tiny_models.batches())
    shared = attnopt.load(tmp_path / "fast")
    assert [s.spec.heads for s in shared.sites] == [s.spec.heads for s in alone.sites]
    with torch.no_grad():
        torch.testing.assert_close(shared(*args), alone(*args), rtol=1e-4, atol=1e-5)


def test_ranks_search_as_one(tmp_path: Path) -> None:
    space = "choice(None, local-window(left=4), local-window(left=1))"
    options = ("--data", "tiny_models:batches", "--flops", "0.95", "--policy", space, "--out", "policy.json")
    done = torchrun(tmp_path, "search", "tiny_models:causal", *options)
    assert done.returncode == 0, done.stderr
    model, args = tiny_models.causal()
    alone = attnopt.search(
        model.eval(), space, args, calibration=tiny_models.batches(), budget=attnopt.Budget(flops=0.95)
    )
    assert attnopt.Policy.of(tmp_path / "policy.json") == alone.policy
    assert done.stdout.count("budget: flops 0.95 of the original") == 1


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("os.kill(os.getpid(), 9)", "Signal 9"),
        ("raise OSError('disk')", "rank 1 failed while reading the calibration data"),
    ],
)
def test_a_rank_that_fails_ends_all(tmp_path: Path, fault: str, told: str) -> None:
    """Within the time limit of the call, and nothing is written."""
    lines = (
        "import os, tiny_models",
        "def batches():",
        " if os.environ['RANK'] == '1':",
        f"  {fault}",
        " return tiny_models.batches()",
    )
    Path(tmp_path, "bad_data.py").write_text("\n".join(lines))
    policy = "prune-heads(fraction=0.5)"
    done = torchrun(
        tmp_path, "optimize", "tiny_models:causal", "--data", "bad_data:batches", "--policy", policy, "--out", "fast"
    )
    assert done.returncode != 0
    assert told in done.stderr
    assert not Path(tmp_path, "fast").exists()
    assert done.stdout == ""


def test_more_ranks_than_batches(tmp_path: Path) -> None:
    Path(tmp_path, "one.py").write_text("import tiny_models\n\ndef batches():\n    return tiny_models.batches()[:1]\n")
    done = torchrun(
        tmp_path, "optimize", "tiny_models:causal", "--data", "one:batches", "--policy", "prune-heads(fraction=0.5)"
    )
    assert done.returncode != 0
    assert "one:batches: 1 batches cannot be shared by 2 processes" in done.stderr
