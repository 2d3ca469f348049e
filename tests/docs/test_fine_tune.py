"""An optimized model trains like any ``nn.Module``: the example's distillation, on a small model."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from places import EXAMPLES

import attnopt
from attnopt.passes import GroupedQuery, PruneHeads, RouteHeads

EXAMPLE = EXAMPLES / "fine_tune.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("fine_tune", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("policy", "backend"),
    [(PruneHeads(heads=[1]), "auto"), (GroupedQuery(kv_heads=1), "blocked"), (RouteHeads(routed=1), "sdpa")],
    ids=["pruned", "grouped", "routed"],
)
def test_a_student_comes_closer_to_its_teacher(example: Any, policy: Any, backend: str, tmp_path: Path) -> None:
    teacher, (x,) = tiny_models.causal()
    before = copy.deepcopy(teacher.state_dict())
    student = attnopt.optimize(copy.deepcopy(teacher), policy, (x,), backend=backend)
    data = [(torch.randn(2, 12, 16),) for _ in range(4)]
    losses = list(example.distil(student, teacher, data, 60, 1e-2, torch.nn.functional.mse_loss))
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    student.save(tmp_path / "trained")
    assert torch.equal(attnopt.load(tmp_path / "trained")(x), student(x))
