"""The caller's surroundings: inference mode, default dtype and device, autocast, low precision, threads."""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Attention
from torch import Tensor, nn

import attnopt
from attnopt.base.closeness import TOLERANCE, difference
from attnopt.base.compile_lock import compiling
from attnopt.capture.capture import capture
from attnopt.passes import DynamicSparse, Fuse, GroupedQuery, LocalWindow, PruneHeads, ScaleHeads, Sparse
from attnopt.patterns import Blocks, Causal, Sinks

POLICY: dict[str, Any] = {
    "0": Fuse(),
    "1": LocalWindow(3),
    "2": Sparse(Causal() & (Blocks(4) | Sinks(2))),
    "3": DynamicSparse(keep=0.5, block=4),
    "4": PruneHeads(0.5),
    "5": GroupedQuery(1),
    "6": ScaleHeads({0: 0.5}),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),  # a tensor that forgets its device would have no values there
}


def made(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A model with a layer for each rule of the policy, an input and calibration data."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Attention(causal=False) for _ in POLICY)).eval()
    return model.to(dtype), torch.randn(2, 16, 16).to(dtype), list(torch.randn(3, 2, 16, 16).to(dtype))


@pytest.fixture(scope="module")
def expected() -> attnopt.OptimizedModel:
    model, x, batches = made()
    return attnopt.optimize(model, POLICY, (x,), calibration=batches)


@pytest.mark.slow
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_the_surroundings_change_nothing(around: str, expected: attnopt.OptimizedModel) -> None:
    model, x, batches = made()
    with SURROUNDINGS[around]():
        fast = attnopt.optimize(model, POLICY, (x,), calibration=batches)
    assert torch.equal(fast(x), expected(x))
    assert [s.status for s in fast.report.sites] == ["rewritten"] * len(POLICY)
    state = fast.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert (state[name].dtype, state[name].device) == (tensor.dtype, tensor.device), name
        assert torch.equal(state[name], tensor), name
    assert fast.report.error == expected.report.error


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_inspect_and_importance(around: str) -> None:
    torch.manual_seed(0)
    model, x, batches = Attention(causal=False).eval(), torch.randn(1, 8, 16), [torch.randn(1, 8, 16)]
    want = attnopt.inspect(model, (x,)), attnopt.head_importance(model, batches)
    with SURROUNDINGS[around]():
        assert (attnopt.inspect(model, (x,)), attnopt.head_importance(model, batches)) == want


@pytest.mark.slow
def test_what_is_made_in_inference_mode_can_be_trained() -> None:
    model, x, batches = made()
    with torch.inference_mode():
        fast = attnopt.optimize(model, POLICY, (x,), calibration=batches)
    fast(x).sum().backward()
    assert all(p.grad is not None for p in fast.parameters())


@pytest.mark.slow
def test_a_model_of_inference_tensors(tmp_path: Path) -> None:
    """Weights, inputs and calibration that were all made in inference mode."""
    with torch.inference_mode():
        model, x, batches = made()
    fast = attnopt.optimize(model, POLICY, (x,), calibration=batches)
    with torch.inference_mode():
        fast.save(tmp_path / "saved")
        assert torch.equal(attnopt.load(tmp_path / "saved")(x), fast(x))


def test_autocast_at_the_call_is_honoured() -> None:
    model, x, _ = made()
    fast = attnopt.optimize(model, "fuse", (x,))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = fast(x), model(x)
        deferred = attnopt.optimize(model, "fuse")(x)
    assert got.dtype == want.dtype
    assert difference([got.float()], [want.float()]) <= TOLERANCE[torch.bfloat16]
    assert torch.equal(deferred, got)


@pytest.mark.slow
def test_bfloat16(tmp_path: Path) -> None:
    model, x, batches = made(torch.bfloat16)
    fast = attnopt.optimize(model, POLICY, (x,), calibration=batches)
    assert {t.dtype for t in (*fast.parameters(), fast(x))} == {torch.bfloat16}
    assert [s.status for s in fast.report.sites] == ["rewritten"] * len(POLICY)
    fast.save(tmp_path / "saved")
    assert torch.equal(attnopt.load(tmp_path / "saved")(x), fast(x))


@pytest.mark.slow
def test_the_states_of_the_process_stay() -> None:
    model, x, batches = made()
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    filters = list(warnings.filters)
    attnopt.optimize(model, POLICY, (x,), calibration=batches)
    assert torch.equal(torch.rand(3), want)
    assert torch.is_grad_enabled()
    assert torch.get_default_device() == torch.device("cpu")
    assert warnings.filters == filters
    assert logging.root.manager.disable == logging.NOTSET


# ---------------------------------------------------------------- threads
THREADS = 2


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """``work`` of every thread's number; all begin together."""
    start = threading.Barrier(THREADS)

    def run(i: int) -> Any:
        start.wait()
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@pytest.mark.slow
def test_threads_that_optimize_at_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models, policies = [Attention(causal=False) for _ in range(THREADS)], [LocalWindow(3), PruneHeads(0.5)]
    x, batches = torch.randn(2, 12, 16), [torch.randn(2, 12, 16)]

    def one(i: int) -> tuple[Tensor, float, Tensor]:
        fast = attnopt.optimize(models[i], policies[i], (x,), calibration=batches)
        fast.save(tmp_path / str(i))
        return fast(x), fast.report.error, attnopt.load(tmp_path / str(i))(x)

    for (y, error, loaded), (y_alone, error_alone, _) in zip(at_once(one), map(one, range(THREADS)), strict=True):
        assert torch.equal(y, y_alone)
        assert torch.equal(loaded, y)
        assert error == error_alone


def test_a_deferred_model_that_threads_call_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Attention(), torch.randn(2, 12, 16)
    want = attnopt.optimize(model, LocalWindow(3), (x,))(x)
    deferred = attnopt.optimize(model, LocalWindow(3))
    captured: list[Any] = []
    monkeypatch.setattr("attnopt.compiler.compile.capture", lambda *given: captured.append(given) or capture(*given))
    assert all(torch.equal(y, want) for y in at_once(lambda _: deferred(x)))
    assert len(captured) == 1


def test_a_model_runs_while_another_is_optimized() -> None:
    model, x = Attention(), torch.randn(2, 12, 16)
    fast = attnopt.optimize(model, LocalWindow(3), (x,))
    want, done, runs = (model(x), fast(x)), threading.Event(), list[bool]()

    def serve() -> None:
        with torch.no_grad():
            while not done.is_set():
                runs.append(torch.equal(model(x), want[0]) and torch.equal(fast(x), want[1]))

    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve)
        try:
            attnopt.optimize(Attention(), PruneHeads(heads=[0]), (x,))
        finally:
            done.set()
        serving.result()
    assert runs
    assert all(runs)


def test_garbage_is_searched_for_as_before() -> None:
    own = gc.get_threshold()
    with pytest.raises(KeyError), compiling(), compiling():
        assert gc.get_threshold()[0] > own[0]
        raise KeyError
    assert gc.get_threshold() == own
    gc.set_threshold(0)  # the user has turned it off
    try:
        with compiling():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*own)
