"""The command line called in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from attnopt.cli import main as cli


def json_of(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    code = cli.main([*argv, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("attnopt: ")
    assert "Traceback" not in captured.err
    return captured.err
