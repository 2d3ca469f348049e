"""Examples that export run as they are, and their files agree with torch."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path

import pytest
from places import EXAMPLES as FOLDER

ELSEWHERE = {
    "fine_tune",
    "chat_with_window",
    "heads_to_groups",
    "long_context",
    "smollm2",
}  # have tests of their own, on smaller models
EXAMPLES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ELSEWHERE)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if example == "decoder_to_genai":
        pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{example}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "attentions found" in printed
    for said in re.findall(r"largest difference between torch and ONNX Runtime (\S+)", printed):
        assert float(said) < 1e-4
    assert list((tmp_path / "build").iterdir())


NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_shows_what_it_makes(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cell after cell, without Jupyter: what ends a cell is shown as there."""
    monkeypatch.chdir(tmp_path)
    cells = [c for c in json.loads(notebook.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    names: dict[str, object] = {}
    shown = 0
    for cell in cells:
        assert not cell["outputs"], "saved without outputs"
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), cell["id"], "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
            shown += "<" in value._repr_html_() if hasattr(value, "_repr_html_") else 0
    assert shown >= 3
    assert (tmp_path / "fast.onnx").is_file()
