"""Killed at any moment, on a full disk, in a folder that may not be written: what was there stays whole."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Attention

import attnopt
from attnopt.base import atomic_files as files
from attnopt.base.atomic_files import MARKER, atomic_folder, atomic_write
from attnopt.passes import LocalWindow

X = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
NOBODY = 65534


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> attnopt.OptimizedModel:
    torch.manual_seed(0)
    made = attnopt.optimize(Attention().eval(), LocalWindow(3), (X,))
    made.export_onnx(tmp_path_factory.mktemp("first") / "m.onnx")  # imports everything: children may not be allowed to
    return made


def in_child(work: Callable[[], Any], prepare: Callable[[], None] = lambda: None) -> int:
    """The exit status of a forked process: 0 where ``work`` ended well, 3 after an AttnoptError, -signal if it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            prepare()
            work()
            status = 0
        except attnopt.AttnoptError:
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(moment: int, folder: Path) -> Callable[[], None]:
    """SIGKILL before the operation of that number on something in ``folder``."""

    def prepare() -> None:
        seen = [0]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event.startswith(("os.", "open", "shutil.")) and any(str(folder) in str(a) for a in arguments):
                seen[0] += 1
                if seen[0] == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return prepare


def moments(work: Callable[[], Any], folder: Path, step: int = 1) -> Iterator[int]:
    """Kills ``work`` at its first operation in ``folder``, at the next, ...; a number each time, until it comes through."""
    moment = 1
    while (status := in_child(work, killed_at(moment, folder))) != 0:
        assert status == -signal.SIGKILL
        yield moment
        moment += step


@pytest.mark.subprocess
@pytest.mark.parametrize("exchanges", [True, False], ids=["one step", "two steps"])
def test_a_folder(tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system cannot swap folders in one step, the old one may be found under its other name."""
    if not exchanges:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    target = tmp_path / "model"
    target.mkdir()
    (target / MARKER).write_text("old")

    def write() -> None:
        with atomic_folder(target) as temporary:
            (temporary / "more").write_text("new")
            (temporary / MARKER).write_text("new")

    count = 0
    for moment in moments(write, tmp_path):
        count += 1
        whole = [p for p in tmp_path.iterdir() if (p / MARKER).is_file() and (p / MARKER).read_text() == "old"]
        assert exchanges <= target.is_dir(), moment
        found = target if target.is_dir() else whole[0]
        assert (found / MARKER).read_text() == "old" or (found / "more").read_text() == "new", moment
        if not target.is_dir():
            whole[0].rename(target)
        (target / MARKER).write_text("old")
    assert count > 5
    assert (target / MARKER).read_text() == "new"


@pytest.mark.subprocess
def test_a_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old" * 1000)

    def write() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("new" * 1000)

    count = 0
    for moment in moments(write, tmp_path):
        count += 1
        assert target.read_text() in ("old" * 1000, "new" * 1000), moment
    assert count > 3


@pytest.mark.subprocess
def test_save(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    fast.save(target)
    for _ in moments(lambda: fast.save(target), tmp_path, step=4):
        assert torch.equal(attnopt.load(target)(X), fast(X))


@pytest.mark.subprocess
def test_export(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")
    for moment in (1, 2, 4):
        assert in_child(lambda: fast.export_onnx(target), killed_at(moment, tmp_path)) == -signal.SIGKILL
        assert target.read_bytes() == b"old"


@pytest.mark.subprocess
def test_quantized_export(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    """Its last operation in the folder that matters is the one that puts the file in its place."""
    target = tmp_path / "m.onnx"
    fast.export_onnx(target, quantize="int8")  # imports the quantizer
    target.write_bytes(b"old")
    for moment in (1, 3, 9, 14):
        assert (
            in_child(lambda: fast.export_onnx(target, quantize="int8"), killed_at(moment, tmp_path)) == -signal.SIGKILL
        )
        assert target.read_bytes() == b"old"
    fast.export_onnx(target, quantize="int8")
    assert target.read_bytes() != b"old"


def _limited() -> None:
    """Files of 8 KiB at most, as on a disk that is nearly full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


def _nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


@pytest.mark.subprocess
@pytest.mark.parametrize("what", ["save", "export_onnx"])
def test_a_full_disk(fast: attnopt.OptimizedModel, tmp_path: Path, what: str) -> None:
    target = tmp_path / "m"
    if what == "save":
        fast.save(target)
    else:
        target.write_bytes(b"old")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert in_child(lambda: getattr(fast, what)(target), _limited) == 3
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.subprocess
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("what", ["save", "export_onnx"])
def test_a_folder_of_somebody_else(fast: attnopt.OptimizedModel, tmp_path: Path, what: str) -> None:
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(0o755)
    assert in_child(lambda: getattr(fast, what)(tmp_path / "m"), _nobody) == 3
    assert not list(tmp_path.iterdir())


def test_memory_that_runs_out_while_calibrating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails on the way, the user's model keeps its weights, mode and attributes."""
    model = Attention(causal=False).train()
    x = torch.randn(8, 8, 16)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}

    def exhausted(*_: Any, **__: Any) -> Any:
        raise MemoryError

    for where in (
        "attnopt.compiler.layerwise_calibration.Forward.up_to",
        "attnopt.fit.least_squares.torch.linalg.cholesky_ex",
        "attnopt.lower.lower._carry_out",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, exhausted)
            with pytest.raises((MemoryError, attnopt.RewriteError)):
                attnopt.optimize(model, "prune-heads(0.5)", (x,), calibration=[x])
        assert model.training
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
