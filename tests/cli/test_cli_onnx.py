"""The command line with ONNX files as models."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import audited
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models
import torch
from command_line import error_of, json_of
from places import SUPPORT

import attnopt
from attnopt.cli import main as cli

pytestmark = pytest.mark.usefixtures("one_torchlib")

BANDED = ("--policy", "local-window(left=3)")
SIZES = ("--size", "batch=3", "--size", "length=9")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """``tiny_models:causal`` with free axes, and an input whose name is no identifier."""
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    model, args = tiny_models.causal()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            args,
            str(path),
            dynamo=False,
            verbose=False,
            input_names=["x.1"],
            dynamic_axes={"x.1": {0: "batch", 1: "length"}},
        )
    return str(path)


@pytest.fixture(autouse=True)
def in_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SUPPORT)


def in_runtime(path: str | Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_inspect(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "inspect", file)
    assert [(site["name"], site["num_heads"]) for site in found["sites"]] == [("layers.0", 2), ("layers.1", 2)]
    assert cli.main(["inspect", file]) == 0
    assert f"using synthetic inputs for {file}: x.1 float32 [2, 16, 16]" in capsys.readouterr().err


def test_optimize_gives_the_file_that_the_model_would_give(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "fast.onnx"
    done = json_of(capsys, "optimize", file, *BANDED, "--dynamic", "--onnx", str(target))
    assert [(s["name"], s["status"]) for s in done["report"]["sites"]] == [
        ("layers.0", "rewritten"),
        ("layers.1", "rewritten"),
    ]
    model, args = tiny_models.causal()
    want = attnopt.optimize(model.eval(), BANDED[1], args, dynamic_shapes="auto")
    for batch, length in ((1, 5), (3, 23)):
        x = torch.randn(batch, length, 16)
        torch.testing.assert_close(in_runtime(target, x), want(x), rtol=1e-4, atol=1e-5)


def test_sizes_of_free_axes_are_fixed(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "fused.onnx"
    assert cli.main(["export", file, *BANDED, *SIZES, "--onnx", str(target)]) == 0
    shape = onnx.load(target).graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [3, 9, 16]
    told = capsys.readouterr()
    assert "x.1 float32 [3, 9, 16]" in told.err
    assert f"onnx: {target}" in told.out


def test_inputs_from_a_file(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, folder = tmp_path / "x.npz", str(tmp_path / "fast")
    np.savez(arrays, **{"x.1": np.zeros((2, 7, 16), np.float32)})
    assert cli.main(["optimize", file, "--inputs", str(arrays), "--out", folder]) == 0
    assert "synthetic inputs" not in capsys.readouterr().err
    assert attnopt.load(folder)(torch.randn(2, 7, 16))


@pytest.mark.slow
def test_inputs_of_a_policy_are_among_the_arrays(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, target = str(tmp_path / "x.npz"), str(tmp_path / "fast.onnx")
    np.savez(arrays, **{"gains": np.ones((2, 2), np.float32), "x.1": np.zeros((2, 7, 16), np.float32)})
    policy = ("--policy", "scale-heads(gains=Input('gains'))")
    assert cli.main(["optimize", file, "--dynamic", *policy, "--inputs", arrays, "--onnx", target, "--time"]) == 0
    capsys.readouterr()
    assert [i.name for i in onnx.load(target).graph.input] == ["x.1", "gains"]
    hunks = json_of(capsys, "diff", file, *policy, "--inputs", arrays)
    assert [hunk["site"] for hunk in hunks] == ["layers.0", "layers.1"]
    (found,) = json_of(capsys, "explain", file, "layers.1", *policy, "--inputs", arrays)
    assert "scale-heads" in found["accepted"]
    assert f"contains gains, x.1, but {file} takes x.1" in error_of(capsys, "inspect", file, "--inputs", arrays)
    told = error_of(capsys, "optimize", file, "--dynamic", *policy, *SIZES)
    assert "reads the input gains, which is not among the example inputs" in told


def test_explain_and_diff(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = json_of(capsys, "explain", file, "layers.1")
    assert found["kind"] == "attention"
    hunks = json_of(capsys, "diff", file, *BANDED, *SIZES)
    assert [hunk["site"] for hunk in hunks] == ["layers.0", "layers.1"]


def test_bench_runs_files_in_onnx_runtime(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``fast.onnx`` holds operators that only ONNX Runtime reads."""
    fast = str(tmp_path / "fast.onnx")
    assert cli.main(["optimize", file, *BANDED, "--dynamic", "--onnx", fast]) == 0
    capsys.readouterr()
    found = json_of(capsys, "bench", file, fast, *SIZES, "--rounds", "2")
    assert 1e-3 < found["difference"] < 10
    assert [len(model["rounds_ms"]) for model in found["models"].values()] == [2, 2]
    beside_torch = json_of(capsys, "bench", file, "tiny_models:causal", "--rounds", "2")
    assert beside_torch["inputs"] == "the example inputs of tiny_models:causal"
    assert beside_torch["difference"] < 1e-5


@pytest.mark.parametrize("command", [("optimize",), ("export", "--onnx", "out.onnx"), ("diff",)])
def test_open_sizes_are_asked_for(command: tuple[str, ...], file: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = error_of(capsys, *command, file)
    assert "does not fix the size of batch, length" in told
    assert "--size batch=128" in told


def test_what_does_not_fit_the_file(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = str(tmp_path / "x.npz")
    np.savez(arrays, y=np.zeros((2, 7, 16), np.float32))
    assert f"{arrays} contains y, but {file} takes x.1" in error_of(capsys, "inspect", file, "--inputs", arrays)
    np.savez(arrays, **{"x.1": np.zeros((2, 7, 5), np.float32)})
    assert "cannot be run on these inputs" in error_of(capsys, "inspect", file, "--inputs", arrays)
    (tmp_path / "text.npz").write_text("no arrays")
    assert "cannot be read" in error_of(capsys, "inspect", file, "--inputs", str(tmp_path / "text.npz"))
    told = error_of(capsys, "inspect", file, "--size", "width=4")
    assert "no free axis width" in told
    assert "its free axes are batch, length" in told


def test_a_file_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    assert "is not a readable ONNX model" in error_of(capsys, "inspect", str(tmp_path / "m.onnx"))
    assert "there is no file" in error_of(capsys, "inspect", str(tmp_path / "missing.onnx"))
    assert "ONNX Runtime cannot load" in error_of(capsys, "bench", str(tmp_path / "m.onnx"), "tiny_models:full")


def test_inputs_are_for_files(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (("inspect", "tiny_models:causal"), ("bench", "tiny_models:causal", "tiny_models:full")):
        assert "only apply to ONNX files" in error_of(capsys, *argv, "--size", "length=3")


@pytest.mark.parametrize("size", ["length", "length=0", "=3", "length=-1", "length=two"])
def test_a_size_that_is_none(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", "m.onnx", "--size", size])
    assert stopped.value.code == 2
    assert "as in length=128" in capsys.readouterr().err


def test_integers_are_made_up_as_places_in_any_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mask among them leaves every causal row something to see."""
    from attnopt.cli.onnx_inputs import Given, example_inputs

    path = tmp_path / "m.onnx"
    given = [
        onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n", None]),
        onnx.helper.make_tensor_value_info("on", onnx.TensorProto.BOOL, []),
    ]
    graph = onnx.helper.make_graph([], "g", given, [])
    onnx.save(onnx.helper.make_model(graph), str(path))
    with pytest.warns(attnopt.AttnoptWarning, match="synthetic inputs"):
        made = example_inputs(path, Given(None, {"ids.1": 40}, needs_sizes=False))
    assert made["ids"].shape == (2, 40)
    assert set(made["ids"].flatten().tolist()) == {0, 1}
    assert made["ids"][:, 0].tolist() == [1, 1]
    assert made["on"].dtype == torch.bool


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "m.onnx")
    assert "not a regular file" in error_of(capsys, "inspect", str(tmp_path / "m.onnx"))


@pytest.mark.slow
def test_diff_with_a_file_is_a_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit codes 0, 1 and 2, with errors among the last."""
    model, args = tiny_models.causal()
    path = audited.by_script(model, args, tmp_path / "same.onnx", ["x"])
    assert cli.main(["diff", "tiny_models:causal", str(path)]) == 0
    assert "same.onnx: same (2 same" in capsys.readouterr().out
    for layer in model.layers:
        layer.causal = False
    path = audited.by_script(model, args, tmp_path / "lost.onnx", ["x"])
    assert cli.main(["diff", "tiny_models:causal", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [s["differences"][0]["kind"] for s in found["sites"]] == ["causal", "causal"]
    assert cli.main(["diff", "tiny_models:causal", str(tmp_path / "none.onnx")]) == 2
    assert "none.onnx" in capsys.readouterr().err


def test_diff_with_a_file_takes_no_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diff", "tiny_models:causal", "some.onnx", "--policy", "local-window(left=2)"]) == 2
    assert "--policy and --site do not apply" in capsys.readouterr().err
    assert cli.main(["diff", "tiny_models:causal", "some.txt"]) == 2
    assert "is not an .onnx file" in capsys.readouterr().err
