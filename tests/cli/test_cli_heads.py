"""``attnopt heads``: the atlas from the shell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import planted_heads
import pytest
import tiny_models
import torch
from command_line import error_of, json_of
from induction import INDUCTION
from places import SUPPORT

import attnopt
from attnopt.cli import main as cli
from attnopt.cli.heads import split
from attnopt.statistics import needle_task

X = np.random.default_rng(0).standard_normal((11, 12, 16))


@pytest.fixture(autouse=True)
def in_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SUPPORT)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Inputs of ``tiny_models:causal``, in double precision as numpy makes them."""
    np.savez(tmp_path / "x.npz", x=X)
    return str(tmp_path / "x.npz")


def test_the_example_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "heads", "tiny_models:causal", "--what", "locality,sink-mass(keys=2)")["atlas"]
    model, args = tiny_models.causal()
    assert found == attnopt.atlas(model.eval(), [args], ["locality", "sink-mass(keys=2)"]).to_json()
    assert cli.main(["heads", "tiny_models:causal"]) == 0
    assert "4 heads of 2 attentions, on 2 sequences" in capsys.readouterr().out


def test_a_file_in_batches(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "atlas.html"
    given = ("--data", file, "--batch", "4", "--clusters", "2", "--html", str(page))
    found = json_of(capsys, "heads", "tiny_models:causal", *given, "--sites", "layers.1")
    assert found["written"] == {"html": str(page)}
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (site,) = found["atlas"]["sites"]
    assert (site, found["atlas"]["sequences"]) == ("layers.1", 11)
    model, _ = tiny_models.causal()
    want = attnopt.collect(model.eval(), [torch.from_numpy(X).float()], "weights", site, reduce="mean")
    np.testing.assert_allclose(found["atlas"]["sites"][site]["maps"], want[site, "weights"], atol=2e-6)


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "calibration"])
def test_other_files(suffix: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, path = torch.from_numpy(X), tmp_path / f"x.{suffix}"
    if suffix == "pt":
        torch.save({"x": x}, path)
    elif suffix == "safetensors":
        from safetensors.torch import save_file

        save_file({"x": x}, path)
    else:
        path = path.with_suffix(".safetensors")
        attnopt.Calibration.of([part.float() for part in x.split(8)]).save(path)
    want = json_of(capsys, "heads", "tiny_models:causal", "--data", file)
    assert json_of(capsys, "heads", "tiny_models:causal", "--data", str(path)) == want


def test_a_function_gives_batches_and_a_statistic(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--data", "planted_heads:batches", "--what", "planted_heads:statistic,locality")
    found = json_of(capsys, "heads", "planted_heads:planted", *given)["atlas"]
    want = attnopt.atlas(planted_heads.planted()[0], planted_heads.batches(), [planted_heads.statistic(), "locality"])
    assert found == want.to_json()
    assert list(found["statistics"]) == ["sink-mass(keys=3)", "locality"]


def test_a_model_without_inputs(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(capsys, "heads", "tiny_models:without_inputs", "--data", file, "--batch", "5")
    assert found["atlas"]["sequences"] == 11
    assert "without example inputs" in error_of(capsys, "heads", "tiny_models:without_inputs")


def test_an_onnx_file(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, args = tiny_models.causal()
    attnopt.optimize(model.eval(), "fuse", args, dynamic_shapes="auto").export_onnx(tmp_path / "m.onnx")
    np.savez(tmp_path / "own.npz", x=X.astype(np.float32))
    found = json_of(capsys, "heads", str(tmp_path / "m.onnx"), "--data", str(tmp_path / "own.npz"))["atlas"]
    want = json_of(capsys, "heads", "tiny_models:causal", "--data", file)["atlas"]
    for own, wanted in zip(found["sites"].values(), want["sites"].values(), strict=True):
        np.testing.assert_allclose(own["maps"], wanted["maps"], atol=1e-5)
    error = error_of(capsys, "heads", str(tmp_path / "m.onnx"), "--data", file, "--size", "batch=2")
    assert "omit --inputs and --size" in error


def test_needles_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, retrieval = needle_task([[0, 3, 5, 1, 3], [1, 6, 7, 2, 6]], [(2, 3), (2, 3)], [[5], [7]])
    path = tmp_path / "needles.npz"
    spans = {"retrieval.needles": np.array(retrieval.needles), "retrieval.answers": np.array(retrieval.answers)}
    np.savez(path, ids=torch.cat(texts).numpy(), **spans)
    given = ("--data", str(path), "--what", "retrieval,induction,locality")
    found = json_of(capsys, "heads", "planted_heads:copying", *given)["atlas"]["statistics"]
    want = attnopt.head_importance(planted_heads.copying()[0], texts, retrieval)
    assert found[want.method] == {site: list(scores) for site, scores in want.items()}
    assert want[INDUCTION[0]][INDUCTION[1]] == 1.0
    error = error_of(capsys, "heads", "planted_heads:copying", "--what", "retrieval")
    assert "'retrieval' needs needles and answers" in error
    assert "add arrays retrieval.needles and retrieval.answers to the file of --data" in error


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"y": X}, "contains y, but the model takes x"),
        ({"x": X, "y": X}, "contains x, y, but the model takes x"),
        ({"x": X[0]}, "x has the shape [12, 16], but the example input [2, 12, 16]"),
        ({"x": X.astype(int)}, "x is int64, but the example input is float32"),
        ({"x": np.float32(1)}, "x is one number"),
        ({"x": X[:0]}, "expected as many sequences in every array, found x 0"),
        ({"x": X[..., :7]}, "cannot be multiplied"),
        ({}, "does not hold tensors by name"),
    ],
)
def test_arrays_that_do_not_fit(
    arrays: dict[str, np.ndarray], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    assert told in error_of(capsys, "heads", "tiny_models:causal", "--data", str(tmp_path / "bad.npz"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--what", "localty"), "did you mean 'locality'"),
        (("--what", "sink-mass(key=2)"), "sink-mass takes keys"),
        (("--what", "counterfactual"), "--what my_models:counterfactual; see attnopt.statistics.Counterfactual"),
        (("--what", "fisher"), "'fisher' needs a loss"),
        (("--what", "planted_heads:nothing"), "planted_heads has no 'nothing'"),
        (("--sites", "encoder.*"), "no attention is named 'encoder.*'"),
        (("--data", "no_such.npz"), "there is no file no_such.npz"),
        (("--data", "planted_heads.py"), "save inputs by their names, as in numpy.savez"),
        (("--data", "tiny_models:wrong"), "batch 0 is a int"),
        (("--data", "tiny_models:without_inputs"), "returned Stack, expected an iterable of batches"),
        (("--distance", "locality"), "--distance locality is no distance"),
    ],
)
def test_wrong_questions(given: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in error_of(capsys, "heads", "tiny_models:causal", *given)


def test_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x.npz", "x.safetensors", "x.pt"):
        (tmp_path / name).write_bytes(b"not a file of arrays")
        assert "cannot be read" in error_of(capsys, "heads", "tiny_models:causal", "--data", str(tmp_path / name))


def test_names_are_split_outside_of_parentheses() -> None:
    assert split("locality, segment-mass(queries=(0, 4), keys=[1, 2]),entropy,") == [
        "locality",
        "segment-mass(queries=(0, 4), keys=[1, 2])",
        "entropy",
    ]
