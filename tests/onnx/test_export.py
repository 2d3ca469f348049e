"""ONNX export of whole models: the file says what it is, is seen to be right, and is never half written."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import onnx
import oracle
import pytest
import torch
import zoo
from models import Attention, Spelling, inputs
from onnx_core import forms, run
from torch import Tensor, nn
from torch.nn import functional
from variants import mostly_slow

import attnopt
from attnopt.onnx.export import verify
from attnopt.passes import LocalWindow, Sparse
from attnopt.patterns import Blocks, Global, PerHead, Window
from attnopt.patterns.bands import Band
from attnopt.report.report import Report


class Encoder(nn.Module):
    """Two layers of attention."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "out": nn.Linear(dim, dim)}) for _ in "ab"
        )
        self.heads = heads

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            q, k, v = layer["qkv"](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            o = functional.scaled_dot_product_attention(q, k, v)
            x = x + layer["out"](o.transpose(1, 2).flatten(2))
        return {"hidden": x, "mean": x.mean(1)}


@pytest.fixture(scope="module")
def fast() -> attnopt.OptimizedModel:
    torch.manual_seed(0)
    return attnopt.optimize(
        Encoder().eval(), LocalWindow(4), (torch.randn(2, 40, 32),), dynamic_shapes="auto", backend="sdpa"
    )


@pytest.mark.parametrize(("backend", "flavor"), [("sdpa", "onnxruntime"), ("blocked", "standard")])
def test_windows_lose_their_masks(flavor: Any, backend: str, tmp_path: Path) -> None:
    """A mask that torch needs is not in the file, whichever backend put the pattern into the graph."""
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(2, 40, 32)
    fast = attnopt.optimize(model, LocalWindow(4), (x,), dynamic_shapes="auto", backend=backend)
    fast.export_onnx(tmp_path / "m.onnx", flavor=flavor)
    assert forms(tmp_path / "m.onnx") == ["blocks", "blocks"]
    for size in ((2, 40, 32), (1, 7, 32), (3, 300, 32)):
        x = torch.randn(size)
        oracle.assert_same(run(tmp_path / "m.onnx", (x,)), oracle.run(fast, (x,)))


def test_names_and_metadata(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    fast.export_onnx(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    assert [i.name for i in model.graph.input] == ["x"]
    assert [o.name for o in model.graph.output] == ["hidden", "mean"]
    said = {p.key: p.value for p in model.metadata_props}
    assert said["attnopt.version"] == attnopt.__version__
    assert said["attnopt.flavor"] == "onnxruntime"
    assert json.loads(said["attnopt.policy"])["*"][0]["pass"] == "local-window"
    assert Report.from_json(json.loads(said["attnopt.report"])).headline == fast.report.headline
    assert [s["pattern"] for s in json.loads(said["attnopt.attention"])] == ["Window(left=4, right=4)"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "mbart"])
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    entry = zoo.BY_NAME[name]
    model, args, kwargs = entry.build()
    shapes = "auto" if entry.dynamic else None
    fast = attnopt.optimize(model, LocalWindow(3, 0), args, kwargs, dynamic_shapes=shapes, backend="blocked")
    fast.export_onnx(tmp_path / "m.onnx")
    assert len(forms(tmp_path / "m.onnx")) == len(fast.sites)


def test_a_sparse_pattern_per_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(1, 40, 32)
    fast = attnopt.optimize(model, Sparse(PerHead({1: Blocks(8)}, default=Global((0,)) | Window(2))), (x,))
    fast.export_onnx(tmp_path / "m.onnx")
    oracle.assert_same(run(tmp_path / "m.onnx", (x,)), oracle.run(fast, (x,)))


# ---------------------------------------------------------------- files
def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_external_data(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    x = torch.randn(2, 40, 32)
    for _ in range(2):  # the second takes the first one's place
        fast.export_onnx(tmp_path / "m.onnx", external_data=True)
        (data,) = tmp_path.glob("m.onnx.*.data")
        assert names(tmp_path) == ["m.onnx", data.name]
        oracle.assert_same(run(tmp_path / "m.onnx", (x,)), oracle.run(fast, (x,)))
    fast.export_onnx(tmp_path / "m.onnx")
    assert names(tmp_path) == ["m.onnx"]


@pytest.mark.parametrize("external", mostly_slow([True, False], True))
def test_a_full_disk_leaves_the_older_model(
    fast: attnopt.OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    fast.export_onnx(tmp_path / "m.onnx", external_data=external)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(attnopt.AttnoptError, match="No space left"):
                fast.export_onnx(tmp_path / "m.onnx", external_data=external)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_interrupted_export_leaves_nothing(
    fast: attnopt.OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fast.export_onnx(tmp_path / "m.onnx", external_data=True)
    assert names(tmp_path) == []


def test_a_read_only_folder(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        with pytest.raises(attnopt.AttnoptError, match="ermission"):
            fast.export_onnx(tmp_path / "m.onnx")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("folder", ["/proc", "no/such/place"])
def test_where_nothing_can_be_written(fast: attnopt.OptimizedModel, folder: str, tmp_path: Path) -> None:
    for external in (True, False):
        with pytest.raises(attnopt.AttnoptError, match="cannot write"):
            fast.export_onnx(tmp_path / folder / "m.onnx", external_data=external)


def test_disagreement_names_the_first_site(
    fast: attnopt.OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that is off by one in the second attention alone."""
    from attnopt.onnx.export import block_loop

    honest, turn = block_loop._inside, [0]

    def off_by_one(b: Any, site: Any, found: Any, *rest: Any) -> Any:
        turn[0] += 1
        wrong = [Band(band.low + 1, band.high) for band in found] if turn[0] == 2 else found
        table = honest(b, site, found, *rest)
        return table if turn[0] != 2 else b.op("And", table, block_loop._seen(b, wrong, rest[0], *rest[1:3]))

    monkeypatch.setattr(block_loop, "_inside", off_by_one)
    with pytest.raises(attnopt.ExportError, match="ONNX Runtime and torch disagree") as caught:
        fast.export_onnx(tmp_path / "m.onnx", external_data=True)
    assert caught.value.site == fast.sites[1].name
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"flavor": "tensorrt"}, "flavor 'tensorrt'"),
        ({"opset": 26}, "opset 26"),
        ({"opset": 20}, "opset 20"),
        ({"external_data": "yes"}, "external_data='yes'"),
    ],
    ids=str,
)
def test_wrong_options(fast: attnopt.OptimizedModel, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(attnopt.ExportError, match=said):
        fast.export_onnx(tmp_path / "m.onnx", **options)
    assert names(tmp_path) == []


def test_half_precision_with_sinks_is_written_without_complaints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spelling = Spelling(sinks=True)
    given = {name: x.half() for name, x in inputs(spelling).items()}
    fast = attnopt.optimize(Attention(spelling).half().eval(), "fuse", (), given, dynamic_shapes="auto")
    fast.export_onnx(tmp_path / "m.onnx")
    assert not [r.getMessage() for r in caplog.records if "not known" in r.getMessage()]
