"""The examples run as they are, and their files agree with torch."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if example.stem == "decoder_to_genai":
        pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert "attentions found" in printed
    for said in re.findall(r"largest difference between torch and ONNX Runtime (\S+)", printed):
        assert float(said) < 1e-4
    assert list((tmp_path / "build").iterdir())
