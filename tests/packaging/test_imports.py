"""``import attnopt`` costs torch and nothing more; what is heavy comes with what needs it."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from places import ROOT

import attnopt

HEAVY = (
    "networkx", "sympy", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "rich", "jinja2", "yaml", "safetensors", "transformers",
    "matplotlib", "torch.export", "torch.fx.experimental.symbolic_shapes", "torch.nn.attention.flex_attention", "torch._inductor",
)  # fmt: skip
OF_A_PLUGIN = (
    "Attend, AttentionSpec, Backend, BlockScores, HeadEdit, Pass, Pattern, Reach, Refusal, Rewrite, Site, register"
)


def loaded(statement: str) -> set[str]:
    """The modules that it brings beyond those of torch."""
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    return set(done.stdout.split())


@pytest.mark.subprocess
@pytest.mark.parametrize("statement", ["import attnopt", f"from attnopt import {OF_A_PLUGIN}, patterns"])
def test_what_is_heavy_is_not_imported(statement: str) -> None:
    assert not {m for m in loaded(statement) if m.startswith(HEAVY)}


@pytest.mark.subprocess
def test_the_package_alone_is_next_to_nothing() -> None:
    operators = {"backends", "backends.attention_operator", "ir", "ir.received_weights", "base.bit_table"}
    light = {"base", "base.display", "render", *operators}
    assert loaded("import attnopt") == {"attnopt", *(f"attnopt.{module}" for module in light)}


@pytest.mark.subprocess
def test_the_operator_is_there_at_once() -> None:
    assert loaded("import attnopt; torch.ops.attnopt.attention.default")


def test_names_for_checkers_and_names_at_run_time_agree() -> None:
    tree = ast.parse((ROOT / "attnopt" / "__init__.py").read_text("utf-8"))
    (guarded,) = (n for n in tree.body if isinstance(n, ast.If))
    typed = {
        a.name: n.module
        for n in guarded.body
        if isinstance(n, ast.ImportFrom)
        for a in n.names
        if n.module != "attnopt"
    }
    assert typed == attnopt._MODULE_OF
    assert {*typed, "distributed", "passes", "patterns", "plot", "recipes", "statistics", "training"} == {
        *attnopt.__all__
    }
    assert all(getattr(attnopt, name) is not None for name in attnopt.__all__)
    assert {*attnopt.__all__} <= {*dir(attnopt)}
    with pytest.raises(AttributeError, match="module 'attnopt' has no attribute 'nothing'"):
        attnopt.nothing  # noqa: B018
