"""The command line: what it prints, where, and with which exit code."""

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tiny_models
from command_line import error_of, json_of
from needs import needs_compiler
from places import ROOT, SUPPORT

import attnopt
from attnopt.base import progress
from attnopt.cli import demo, demo_policy
from attnopt.cli import demo_data as demo_similarity
from attnopt.cli import main as cli
from attnopt.errors import AttnoptError

COMMANDS = ("inspect", "optimize", "export", "explain", "diff", "search", "heads", "bench", "demo", "passes", "doctor")


@pytest.fixture(autouse=True)
def in_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SUPPORT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a window of ``tiny_models:causal``."""
    folder = tmp_path_factory.mktemp("saved") / "fast"
    model, args = tiny_models.causal()
    attnopt.optimize(model.eval(), "local-window(left=2)", args).save(folder)
    return str(folder)


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
        ("explain", "m:f"),
        ("bench", "m:f"),
        ("bench", "m:f", "m:g", "--rounds", "1"),
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
        ("no_such_folder", "does not have the form package.module:factory"),
        ("tiny_models:", "does not have the form package.module:factory"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("tiny_models.py:causal", "hint: name the module without .py"),
        ("tiny_models:no_such", "it has batches, causal, failing, full, without_attention"),
        ("tiny_models:constant", "is a int, expected a function"),
        ("tiny_models:failing", "RuntimeError: no such checkpoint (tiny_models.py:"),
        (
            "broken_models:f",
            "importing broken_models failed: ModuleNotFoundError: half an install (broken_models.py:3)",
        ),
        ("tiny_models:wrong", "returned list, expected a model, (model, args) or (model, args, kwargs)"),
    ],
)
def test_a_model_that_is_none(model: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(capsys, "inspect", model)


@pytest.mark.parametrize("command", ["inspect", "optimize"])
def test_a_model_without_inputs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "without example inputs" in error_of(capsys, command, "tiny_models:without_inputs")


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
    assert str(tmp_path) in error_of(capsys, "inspect", str(tmp_path))


@needs_compiler
def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {row["what"]: row for row in json_of(capsys, "doctor")}
    assert found["CPU kernel"]["found"].startswith("compiled: ")
    assert (found["onnx"]["is_fine"], found["onnx"]["note"]) == (True, "for everything")
    assert "CPUExecutionProvider" in found["providers of ONNX Runtime"]["found"]

    def version(name: str) -> str:
        if name == "scipy":
            raise metadata.PackageNotFoundError(name)
        return "1.0" if name == "onnx" else known(name)

    known = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr("attnopt.backends.native.why_not", lambda: "there is no C++ compiler")
    found = {row["what"]: row for row in json_of(capsys, "doctor")}
    assert not any(found[what]["is_fine"] for what in ("CPU kernel", "onnx", "scipy"))
    assert (found["scipy"]["found"], found["onnx"]["found"]) == ("not installed", "1.0")
    assert found["scipy"]["note"] == 'for attnopt demo and attnopt.search; pip install "scipy>=1.11"'
    assert "C++ compiler" in found["CPU kernel"]["note"]
    assert cli.main(["doctor"]) == 0
    assert "--  CPU kernel" in capsys.readouterr().out


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    names = {row["name"] for row in json_of(capsys, "passes")}
    assert {"fuse", "local-window", "sparse", "prune-heads", "grouped-query", "scale-heads"} <= names
    assert {"reference", "sdpa"} <= names
    assert cli.main(["passes"]) == 0
    assert "local-window" in capsys.readouterr().out


@pytest.mark.parametrize("factory", ["causal", "full"])
def test_inspect(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "inspect", f"tiny_models:{factory}")
    assert [site["name"] for site in found["sites"]] == ["layers.0", "layers.1"]
    assert found["sites"][0]["num_heads"] == 2
    assert cli.main(["inspect", f"tiny_models:{factory}"]) == 0
    assert "0-1\n" in capsys.readouterr().out


def test_optimize_save_and_look_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, page = tmp_path / "fast", tmp_path / "report.html"
    argv = ["--policy", "local-window(left=3, right=0)", "--out", str(saved), "--html", str(page)]
    done = json_of(capsys, "optimize", "tiny_models:causal", *argv)
    assert [site["status"] for site in done["report"]["sites"]] == ["rewritten"] * 2
    assert done["written"] == {"saved": str(saved), "html": str(page)}
    assert page.is_file()
    assert json_of(capsys, "inspect", str(saved))["sites"] == done["report"]["sites"]
    assert "already optimized" in error_of(capsys, "optimize", str(saved))


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model.onnx"
    assert cli.main(["export", "tiny_models:causal", "--dynamic", "--onnx", str(target)]) == 0
    assert f"onnx: {target}" in capsys.readouterr().out
    assert target.stat().st_size > 0


@pytest.mark.slow  # exports a whole model twice
def test_export_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model.onnx"
    argv = ["tiny_models:causal", "--dynamic", "--quantize", "int8"]
    done = json_of(capsys, "export", *argv, "--onnx", str(target))["quantization"]
    assert (done["how"], done["products"], done["bytes_after"]) == ("int8", 8, target.stat().st_size)
    assert cli.main(["optimize", *argv, "--onnx", str(target)]) == 0
    assert "int8: 8 products and 0 tables quantized" in capsys.readouterr().out
    assert "add --onnx FILE" in error_of(capsys, "optimize", *argv)


@pytest.mark.slow
def test_optimize_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "fast")
    assert cli.main(["optimize", "tiny_models:causal", "--time", "--out", folder]) == 0
    assert "CPU time per call" in capsys.readouterr().out
    assert set(attnopt.load(folder).report.cpu_seconds) == {"before", "after"}


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = json_of(capsys, "explain", "odd_models:mixed", "cubed")
    assert found["steps"][-1]["differs"]
    assert found["refusals"]["matching"]["code"] == "no-query-key-product"
    assert cli.main(["explain", "odd_models:mixed", "stack.0", "--policy", "prune-heads(heads=[7])"]) == 0
    out = capsys.readouterr().out
    assert "prune-heads refuses it: [unknown-head]" in out
    assert "scores.softmax(-1)" in out
    assert "did you mean 'cubed'" in error_of(capsys, "explain", "odd_models:mixed", "cube")


@pytest.mark.slow
def test_diff(capsys: pytest.CaptureFixture[str]) -> None:
    policy = ("--policy", "local-window(left=3)")
    found = json_of(capsys, "diff", "tiny_models:causal", *policy)
    assert [hunk["site"] for hunk in found] == ["layers.0", "layers.1"]
    assert cli.main(["diff", "tiny_models:causal", *policy, "--site", "layers.1", "--dynamic"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("@@ layers.1: local-window   tiny_models.py:")
    assert "layers.0" not in out
    assert "no change belongs" in error_of(capsys, "diff", "tiny_models:causal", "--site", "layers.2")


def test_bench(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "bench", "tiny_models:causal", saved, "--rounds", "3")
    assert [len(model["rounds_ms"]) for model in found["models"].values()] == [3, 3]
    assert 1e-3 < found["difference"] < 10
    assert found["inputs"] == "the example inputs of tiny_models:causal"
    other = str(shutil.copytree(saved, tmp_path / "other"))
    assert cli.main(["bench", saved, other, "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "zeros of the sizes that" in out
    assert "largest relative difference of the outputs: 0.0e+00" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("bench", "tiny_models:causal", "tiny_models:causal"), "the two models have the same name"),
        (("bench", "tiny_models:causal", "odd_models:other_inputs"), "odd_models:other_inputs fails on the inputs"),
        (("explain", "tiny_models:without_inputs", "a"), "without example inputs"),
        (("explain", "tiny_models:causal", "layers.0", "--policy", "dance()"), "unknown pass 'dance'"),
    ],
)
def test_what_cannot_be_compared(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(capsys, *argv)


@pytest.mark.parametrize("command", [("explain", "{}", "layers.0"), ("diff", "{}")])
def test_a_saved_model_has_no_graph_from_before(
    command: tuple[str, ...], saved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is a saved model" in error_of(capsys, *(part.format(saved) for part in command))


def test_an_unknown_pass_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no-such-pass" in error_of(capsys, "optimize", "tiny_models:causal", "--policy", "no-such-pass")


def test_the_demo_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(demo_similarity.INSTALLED_WITH, "no_such_package", "pip install no-such-package")
    told = error_of(capsys, "demo")
    assert "the demo needs no_such_package" in told
    assert "hint: pip install no-such-package" in told


def test_the_demo_needs_a_folder_that_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AttnoptError, match="cannot create the folder"):
        demo._folder(str(tmp_path / "file" / "out"))


@pytest.mark.slow
def test_the_demo_takes_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--policy", "local-window(left=2)", "--quick", "--out", str(tmp_path))
    found = json_of(capsys, "demo", "--model", "tiny_models:causal", *options)
    cosine = found["measured"]["cosine to the model's output"]
    assert list(cosine)[:2] == ["torch", "torch's export"]
    assert min(cosine["torch"], cosine["torch's export"], cosine["attnopt"]) > 0.99999
    faster = found["measured"]["times faster, on the example inputs"]
    assert faster["torch"] == 1
    assert set(faster) == set(cosine) == set(found["measured"]["MB"])
    assert all(Path(p).is_file() for p in found["files"].values())
    assert ("attnopt, rewritten, int8" in cosine) == ("int8" in found["files"])


@pytest.mark.slow
def test_the_demo_goes_on_where_nothing_saves_enough(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_policy, "LATENCIES", (0.01,))
    found = json_of(capsys, "demo", "--quick", "--out", str(tmp_path))
    assert set(found["files"]) == {"exact", "int8", "report", "data"}
    assert found["measured"]["Lee-50, Pearson"]["attnopt"] == pytest.approx(
        found["measured"]["Lee-50, Pearson"]["torch"], abs=1e-3
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--policy", "fuse"), "--policy is for a model of your own"),
        (("--model", "model.onnx"), "the demo starts from a model in torch"),
        (("--model", "tiny_models:without_inputs"), "without example inputs"),
    ],
)
def test_the_demo_refuses(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(capsys, "demo", *argv)


@pytest.mark.subprocess
def test_listing_the_commands_imports_little() -> None:
    heavy = "{'onnx', 'onnxruntime', 'transformers'}"
    code = f"import sys, attnopt.cli.main as cli; cli._parser(); sys.exit(bool({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_long_work_shows_progress_where_somebody_watches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress.watched(range(3), "measuring")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.working("reading [brackets]"):
        assert list(progress.watched(range(3), "measuring")) == [0, 1, 2], "a job inside another"
    told = capsys.readouterr()
    assert "reading [brackets]" in told.err
    assert "measuring" in told.err
    assert told.out == ""
