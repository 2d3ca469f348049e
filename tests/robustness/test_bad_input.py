"""Bad input: a clear AttnoptError or a loud warning each time, and the user's model and files untouched."""

from __future__ import annotations

import errno
import io
import json
import math
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Attention, Spelling
from torch import Tensor, nn

import attnopt
from attnopt.passes import LocalWindow, PruneHeads

FILES = ("attnopt.json", "graph.json", "weights.safetensors")
X = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(5))


def new_model() -> nn.Module:
    return nn.Sequential(*(Attention(Spelling(residual=True), seed=i) for i in range(2))).eval()


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """A model that must be the same afterwards."""
    made = new_model()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    modules = {n: type(m) for n, m in made.named_modules()}
    yield made
    after = made.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k].nan_to_num(7.0), v.nan_to_num(7.0)) for k, v in before.items())
    assert {n: type(m) for n, m in made.named_modules()} == modules
    assert not made.training


@pytest.fixture(scope="module")
def fast() -> attnopt.OptimizedModel:
    return attnopt.optimize(new_model(), PruneHeads(heads=[0]), (X,))


@pytest.fixture
def saved(fast: attnopt.OptimizedModel, tmp_path: Path) -> Path:
    fast.save(tmp_path / "saved")
    return tmp_path / "saved"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# ---------------------------------------------------------------- models that cannot be captured
class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(Spelling())

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.attention(x)
        return x


class Repeating(Deciding):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max())):
            x = x + self.attention(x)
        return x


@pytest.mark.parametrize("kind", [Deciding, Repeating])
def test_a_model_that_cannot_be_captured(kind: type[nn.Module]) -> None:
    with pytest.raises(attnopt.CaptureError) as caught:
        attnopt.optimize(kind().eval(), "fuse", (X,))
    text = str(caught.value)
    assert "test_bad_input.py" in text, "the user's line"
    line = {Deciding: "x.sum() > 0", Repeating: "in range(int(x.abs()"}[kind]
    numbers = [i for i, t in enumerate(Path(__file__).read_text(encoding="utf-8").splitlines(), 1) if line in t]
    assert any(f"test_bad_input.py:{n}" in text or f'test_bad_input.py", line {n}' in text for n in numbers)
    assert all(way in text for way in ("torch.export", "torch.fx.symbolic_trace"))
    assert caught.value.hint


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
def test_torchscript(inside: bool) -> None:
    """Traced code has no Python that could be captured, wherever it stands."""
    traced = torch.jit.trace(new_model(), X, check_trace=False)
    with pytest.raises(attnopt.CaptureError, match="TorchScript, which has no Python code to capture"):
        attnopt.optimize(nn.Sequential(traced) if inside else traced, "fuse", (X,))


class WithItsOwnNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = new_model()

    def forward(self, x: Tensor) -> Any:
        return self.inner(x + torch.rand(x.shape, generator=torch.Generator().manual_seed(0)))


def test_a_generator_of_the_model(model: nn.Module) -> None:
    """torch.export would keep the generator, and every call would draw on; that of torch 2.11 cannot trace it."""
    told = (
        r"rand at test_bad_input.py:[0-9]+ draws from the model's own torch.Generator"
        r"|argument of type: <class 'torch._C.Generator'>"
    )
    with pytest.raises(attnopt.CaptureError, match=told):
        attnopt.optimize(WithItsOwnNoise().eval(), "fuse", (X,))


def test_inspect_says_the_same() -> None:
    with pytest.raises(attnopt.CaptureError, match="could not be captured"):
        attnopt.inspect(Deciding().eval(), (X,))


def test_nothing_but_the_models_own_words_are_printed(capfd: pytest.CaptureFixture[str]) -> None:
    class Telling(Deciding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            print("I decide", file=sys.stderr)
            return super().forward(x)

    with pytest.raises(attnopt.CaptureError):
        attnopt.inspect(Telling().eval(), (X,))
    assert set(capfd.readouterr().err.splitlines()) == {"I decide"}


# ---------------------------------------------------------------- wrong inputs
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((X, X, X), {}), ((X,), {"mask": X}), ((), {"inputs": X}), ((X[..., :5],), {}), (("text",), {}), ((X.int(),), {})],
    ids=["too many", "unknown name", "missing", "wrong width", "no tensor", "integers"],
)
@pytest.mark.parametrize(
    "call", [attnopt.inspect, lambda m, a, k: attnopt.optimize(m, "fuse", a, k)], ids=["inspect", "optimize"]
)
def test_wrong_example_inputs(model: nn.Module, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with pytest.raises(attnopt.CaptureError) as caught:
        call(model, args, kwargs)
    assert len(str(caught.value)) < 4000


def test_wrong_first_call_of_a_deferred_model(model: nn.Module) -> None:
    fast = attnopt.optimize(model, "fuse")
    with pytest.raises(attnopt.CaptureError):
        fast(X, X)
    assert torch.allclose(fast(X), model(X), atol=1e-5), "it can still be called rightly"


@pytest.mark.parametrize(
    ("args", "kwargs", "told"),
    [
        ((), {}, "input"),
        ((X, X), {}, "argument"),
        ((X,), {"other": X}, "other"),
        ((X.double(),), {}, "float64"),
        (("text",), {}, "input"),
        ((X[0],), {}, "axes"),
        ((X[:1],), {}, "axis 0"),
        ((X[:, :4],), {}, "axis 1"),
        ((X[..., :4],), {}, "axis 2"),
        ((torch.empty(0, 7, 12),), {}, "axis 0"),
    ],
    ids=["none", "too many", "unknown", "dtype", "no tensor", "axes", "batch", "length", "width", "empty"],
)
def test_wrong_inputs_at_call_time(
    fast: attnopt.OptimizedModel, args: tuple[Any, ...], kwargs: dict[str, Any], told: str
) -> None:
    with pytest.raises(attnopt.CaptureError, match=told):
        fast(*args, **kwargs)


def test_wrong_sizes_of_a_dynamic_model(model: nn.Module) -> None:
    fast = attnopt.optimize(model, "fuse", (X,), dynamic_shapes={"input": {1: torch.export.Dim.DYNAMIC}})
    assert torch.allclose(fast(X[:, :5]), model(X[:, :5]), atol=1e-5)
    with pytest.raises(attnopt.CaptureError, match="axis 0"):
        fast(X[:1])
    with pytest.raises(attnopt.CaptureError, match="axis 2"):
        fast(X[..., :3])


def test_axes_that_cannot_be_dynamic(model: nn.Module) -> None:
    with pytest.raises(attnopt.CaptureError) as caught:
        attnopt.optimize(model, "fuse", (X,), dynamic_shapes={"input": {2: torch.export.Dim.DYNAMIC}})
    assert "12" in str(caught.value)
    with pytest.raises(attnopt.AttnoptError):
        attnopt.optimize(model, "fuse", (X,), dynamic_shapes={"nothing": {0: torch.export.Dim.DYNAMIC}})
    with pytest.raises(attnopt.AttnoptError):
        attnopt.optimize(model, "fuse", (X,), dynamic_shapes="all")


@pytest.mark.parametrize("wrong", ["text", None, 3, [X]], ids=["text", "None", "number", "list"])
def test_what_is_no_model(wrong: Any) -> None:
    with pytest.raises(attnopt.AttnoptError):
        attnopt.optimize(wrong, "fuse", (X,))
    with pytest.raises(attnopt.AttnoptError):
        attnopt.inspect(wrong, (X,))


# ---------------------------------------------------------------- policies
@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ("local-windw(left=2)", "local-window"),
        ("local-window(lft=2)", "lft"),
        ("local-window", "left"),
        ("local-window(left=-1)", "left"),
        ("local-window(left=1.5)", "left"),
        ("local-window(left=", "local-window"),
        ("prune-heads(fraction=2)", "fraction"),
        ("scale-heads(gains=[1, nan])", "nan"),
        ("import os", "import os"),
        ("__import__('os').system('true')", "__import__"),
        ({"*": "sparse(pattern=Nothing())"}, "Nothing"),
        ({3: "fuse"}, "3"),
        (17, "17"),
        ("missing.yaml", "missing.yaml"),
        ([LocalWindow(1), 3], "3"),
    ],
    ids=str,
)
def test_unknown_pass_or_option(model: nn.Module, policy: Any, told: str) -> None:
    with pytest.raises(attnopt.PolicyError, match=told.replace("(", r"\(")):
        attnopt.optimize(model, policy, (X,))


@pytest.mark.parametrize(
    "option",
    [{"backend": "none"}, {"backend": 3}, {"limit": -1}, {"limit": 1.5}, {"tolerance": -1.0}, {"tolerance": math.nan}],
    ids=str,
)
def test_wrong_options(model: nn.Module, option: dict[str, Any]) -> None:
    with pytest.raises(attnopt.PolicyError, match=next(iter(option))):
        attnopt.optimize(model, "fuse", (X,), **option)


def test_a_glob_that_matches_no_site(model: nn.Module) -> None:
    with pytest.raises(attnopt.PolicyError, match=r"encoder\.\*") as caught:
        attnopt.optimize(model, {"encoder.*": "fuse", "0": "fuse"}, (X,))
    assert "'0'" in str(caught.value.hint), "the names that there are"


def test_a_policy_that_rewrites_nothing(model: nn.Module) -> None:
    for policy in ({}, [], {"0": []}, "prune-heads(heads=[99])", {"1": "grouped-query(kv_heads=3)"}):
        with pytest.warns(attnopt.AttnoptWarning, match="changes nothing"):
            fast = attnopt.optimize(model, policy, (X,))
        assert torch.equal(fast(X), model(X))
        assert "changes nothing" in fast.report.warnings[0]


def test_no_attention(tmp_path: Path) -> None:
    linear = nn.Linear(12, 12)
    with pytest.warns(attnopt.AttnoptWarning, match="no attention"):
        fast = attnopt.optimize(linear, "fuse", (X,))
    assert torch.equal(fast(X), linear(X))
    assert not fast.sites
    assert not attnopt.inspect(linear, (X,)).sites


# ---------------------------------------------------------------- weights
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "infinity"])
@pytest.mark.parametrize("policy", ["fuse", LocalWindow(1), PruneHeads(heads=[0])], ids=["fuse", "window", "prune"])
def test_nan_in_weights_is_loud(model: nn.Module, policy: Any, value: float) -> None:
    weight = model.get_parameter("1.q_proj.weight").data
    own = weight[0, 0].clone()
    weight[0, 0] = value
    try:
        with pytest.warns(attnopt.AttnoptWarning, match="NaN"):
            attnopt.optimize(model, policy, (X,))
    except attnopt.AttnoptError as error:
        if "NaN" not in str(error):
            raise
    finally:
        weight[0, 0] = own


# ---------------------------------------------------------------- archives
def test_what_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "attnopt.json").write_text("{}")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "attnopt.json").write_bytes(b"\xff\xfe not json")
    before = contents(tmp_path)
    for name in ("file", "empty", "other", "odd", "missing"):
        with pytest.raises(attnopt.ArchiveError, match=name):
            attnopt.load(tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_archive(saved: Path, name: str, share: float) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(attnopt.ArchiveError, match="saved"):
        attnopt.load(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(attnopt.ArchiveError):
        attnopt.load(saved)


def test_the_files_of_a_save(saved: Path) -> None:
    assert sorted(f.name for f in saved.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("key", ["report", "signature", "sites", "attentions", "format"])
@pytest.mark.parametrize("value", [None, -3, [3], {"a": 1}], ids=str)
def test_a_damaged_description(saved: Path, key: str, value: Any) -> None:
    about = json.loads((saved / "attnopt.json").read_text(encoding="utf-8"))
    about[key] = value
    (saved / "attnopt.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(attnopt.ArchiveError):
        attnopt.load(saved)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_pickled_archives_are_not_opened(
    saved: Path, tmp_path: Path, name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save({"state": _Bomb()}, buffer)
    (saved / name).write_bytes(pickle.dumps(_Bomb()) if form == "pickle" else buffer.getvalue())
    with pytest.raises(attnopt.ArchiveError):
        attnopt.load(saved)
    assert not (tmp_path / "exploded").exists(), "something was unpickled"


@pytest.mark.parametrize("field", ["expr_str", "module", "nn_module_stack"])
def test_code_in_a_graph_is_not_run(saved: Path, tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attack = "__import__('pathlib').Path('exploded').touch()"
    text = (saved / "graph.json").read_text(encoding="utf-8")
    data = json.loads(text)
    data["graph_module"]["graph"]["sym_int_values"]["s0"] = {"as_expr": {field: attack, "hint": {"as_int": 7}}}
    (saved / "graph.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(attnopt.ArchiveError):
        attnopt.load(saved)
    assert not (tmp_path / "exploded").exists(), "something was run"


# ---------------------------------------------------------------- disks
@pytest.mark.parametrize("name", ["write_bytes", "write_text"])
def test_a_full_disk_at_save(
    fast: attnopt.OptimizedModel, saved: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved.parent)

    def full(path: Path, data: Any, *_: Any, **__: Any) -> None:
        with path.open("wb") as file:
            file.write((data if isinstance(data, bytes) else data.encode())[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, name, full)
    for target in (saved, saved.parent / "new"):
        with pytest.raises(attnopt.ArchiveError, match="No space left") as caught:
            fast.save(target)
        assert str(target) in str(caught.value)
    monkeypatch.undo()
    assert contents(saved.parent) == before
    assert sorted(p.name for p in saved.parent.iterdir()) == ["saved"]
    attnopt.load(saved)


def test_a_full_disk_at_export(fast: attnopt.OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"older")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("attnopt.base.atomic_files.os.replace", full)
    with pytest.raises(attnopt.AttnoptError, match="No space left"):
        fast.export_onnx(target)
    assert contents(tmp_path) == {"m.onnx": b"older"}


def test_saving_where_it_cannot(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    for target in ("file", "folder", "no/such/place", "file/inside"):
        with pytest.raises(attnopt.ArchiveError):
            fast.save(tmp_path / target)
    with pytest.raises(attnopt.AttnoptError):
        fast.export_onnx(tmp_path / "folder")
    with pytest.raises(attnopt.ExportError, match="opset"):
        fast.export_onnx(tmp_path / "m.onnx", opset=26)
    assert contents(tmp_path) == before


def test_saving_what_was_not_captured(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(attnopt.AttnoptError, match="captured"):
        attnopt.optimize(model).save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- calibration
@pytest.mark.parametrize(
    "calibration",
    [3, [3], ["text"], [None], [], iter(()), [{"nothing": X}], [(X, X, X)], [X[..., :3]], [X[:1]], [{}], [()]],
    ids=[
        "number",
        "list of numbers",
        "text",
        "None",
        "empty",
        "spent",
        "name",
        "too many",
        "width",
        "batch",
        "no kwargs",
        "no args",
    ],
)
def test_calibration_of_the_wrong_form(model: nn.Module, calibration: Any) -> None:
    with pytest.raises(attnopt.AttnoptError):
        attnopt.optimize(model, LocalWindow(1), (X,), calibration=calibration)


def test_calibration_that_fails_on_its_way(model: nn.Module) -> None:
    def batches() -> Iterator[Tensor]:
        yield X
        raise OSError("the disk is gone")

    with pytest.raises((attnopt.CalibrationError, OSError), match="the disk is gone"):
        attnopt.optimize(model, LocalWindow(1), (X,), calibration=batches())


class Draws(nn.Module):
    """The parameters of a distribution, which torch checks by their values."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made, _ = self.attend(x, x, x, need_weights=False)
        return torch.distributions.Normal(made, made.exp()).mean


def test_the_remedy_for_a_distributions_checks_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Draws().eval(), torch.randn(2, 5, 16)
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # libraries turn it off for all
    with pytest.raises(attnopt.CaptureError, match=r"set_default_validate_args\(False\) first"):
        attnopt.optimize(model, "fuse", (x,))
    torch.distributions.Distribution.set_default_validate_args(False)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes="auto")
    assert [s.status for s in fast.report.sites] == ["rewritten"]
    assert torch.allclose(fast(y := torch.randn(3, 8, 16)), model(y), atol=1e-5)
