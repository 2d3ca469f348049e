"""Examples that export run as they are, and their files agree with torch."""

from __future__ import annotations

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
