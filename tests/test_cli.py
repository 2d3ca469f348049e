"""The command line: what it prints, where, and with which exit code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import attnopt
from attnopt import cli, demo, demo_similarity
from attnopt.errors import AttnoptError

HERE = Path(__file__).parent
COMMANDS = ("inspect", "optimize", "export", "demo", "passes")


@pytest.fixture(autouse=True)
def in_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    code = cli.main([*argv, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def _error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("attnopt: ")
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.strip().startswith(f"attnopt {command}")


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("dance",),
        ("inspect",),
        ("optimize", "m:f", "--limit", "-1"),
        ("optimize", "m:f", "--limit", "some"),
        ("optimize", "m:f", "--tolerance", "0"),
        ("export", "m:f"),
    ],
)
def test_a_wrong_command_line(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "usage: attnopt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_folder", "not of the form package.module:factory"),
        ("tiny_models:", "not of the form package.module:factory"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("tiny_models:no_such", "it has causal, failing, full, without_attention"),
        ("tiny_models:constant", "is a int, expected a function"),
        ("tiny_models:failing", "RuntimeError: no such checkpoint (tiny_models.py:"),
        ("tiny_models:wrong", "returned list, expected a model, (model, args) or (model, args, kwargs)"),
    ],
)
def test_a_model_that_is_none(model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _error(capsys, "inspect", model)


@pytest.mark.parametrize("command", ["inspect", "optimize"])
def test_a_model_without_inputs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "without example inputs" in _error(capsys, command, "tiny_models:without_inputs")


def test_an_internal_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(attnopt, "inspect", broken)
    assert cli.main(["inspect", "tiny_models:causal"]) == 3
    assert "internal error, please report it: ZeroDivisionError: oh" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", "tiny_models:causal", "--debug"])


def test_a_model_without_attention(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "tiny_models:without_attention"]) == 0
    assert capsys.readouterr().out == "0 attentions in 0 candidates\n"
    assert cli.main(["optimize", "tiny_models:without_attention"]) == 0
    assert "warning: no attention was found" in capsys.readouterr().err


def test_a_folder_that_holds_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in _error(capsys, "inspect", str(tmp_path))


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    names = {row["name"] for row in _json(capsys, "passes")}
    assert {"fuse", "local-window", "sparse", "prune-heads", "grouped-query", "scale-heads"} <= names
    assert {"reference", "sdpa"} <= names
    assert cli.main(["passes"]) == 0
    assert "local-window" in capsys.readouterr().out


@pytest.mark.parametrize("factory", ["causal", "full"])
def test_inspect(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, "inspect", f"tiny_models:{factory}")
    assert [site["name"] for site in found["sites"]] == ["layers.0", "layers.1"]
    assert found["sites"][0]["num_heads"] == 2
    assert cli.main(["inspect", f"tiny_models:{factory}"]) == 0
    assert "layers.1" in capsys.readouterr().out


def test_optimize_save_and_look_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, page = tmp_path / "fast", tmp_path / "report.html"
    argv = ["--policy", "local-window(left=3, right=0)", "--out", str(saved), "--html", str(page)]
    done = _json(capsys, "optimize", "tiny_models:causal", *argv)
    assert [site["status"] for site in done["report"]["sites"]] == ["rewritten"] * 2
    assert done["written"] == {"saved": str(saved), "html": str(page)}
    assert page.is_file()
    assert _json(capsys, "inspect", str(saved))["sites"] == done["report"]["sites"]
    assert "optimized already" in _error(capsys, "optimize", str(saved))


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model.onnx"
    assert cli.main(["export", "tiny_models:causal", "--dynamic", "--onnx", str(target)]) == 0
    assert f"onnx: {target}" in capsys.readouterr().out
    assert target.stat().st_size > 0


def test_an_unknown_pass_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no-such-pass" in _error(capsys, "optimize", "tiny_models:causal", "--policy", "no-such-pass")


def test_the_demo_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(demo_similarity.INSTALLED_WITH, "no_such_package", "pip install no-such-package")
    told = _error(capsys, "demo")
    assert "the demo needs no_such_package" in told
    assert "hint: pip install no-such-package" in told


def test_the_demo_needs_a_folder_that_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AttnoptError, match="cannot make the folder"):
        demo._folder(str(tmp_path / "file" / "out"))


def test_listing_the_commands_imports_little() -> None:
    heavy = "{'onnx', 'onnxruntime', 'transformers'}"
    code = f"import sys, attnopt.cli as cli; cli._parser(); sys.exit(bool({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=False)
    assert done.returncode == 0
