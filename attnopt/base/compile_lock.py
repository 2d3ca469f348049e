"""The process state of a compilation: one at a time, in a neutral state, regardless of the caller's modes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import nn

_ONE_AT_A_TIME = threading.RLock()
_AUTOCASTING = ("cpu", "cuda", "mps", "xpu")
_RARELY = 100_000  # new objects between two searches for garbage
_callers_device: ContextVar[torch.device | None] = ContextVar("callers_device", default=None)


@contextmanager
def compiling() -> Iterator[None]:
    """Context manager and decorator around everything that traces, verifies or writes a graph.

    One thread at a time: torch.export patches ``nn.Module`` and keeps its modes in globals, and the filters of warnings and
    logs and the random state that verification seeds are global.  Outside inference mode, so new weights
    can be trained.  Without autocast, which belongs to a call, not to the model.  New tensors are on the CPU unless the code
    says otherwise; only the user's model, inside ``as_called``, sees the default device of its caller.
    """
    with _ONE_AT_A_TIME, ExitStack() as state:
        if torch.is_inference_mode_enabled():
            state.enter_context(torch.inference_mode(False))
            state.enter_context(torch.no_grad())
        for kind in _AUTOCASTING:
            if torch.is_autocast_enabled(kind):
                state.enter_context(torch.autocast(kind, enabled=False))
        if torch.backends.mha.get_fastpath_enabled():  # which writes zeros where keys are hidden, unlike any graph
            torch.backends.mha.set_fastpath_enabled(False)
            state.callback(torch.backends.mha.set_fastpath_enabled, True)
        device = torch.get_default_device()
        if device != torch.device("cpu"):
            state.callback(_callers_device.reset, _callers_device.set(device))
            state.enter_context(torch.device("cpu"))
        state.enter_context(_collecting_rarely())
        yield


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """A graph is many objects that live as long as the compilation: to search them for garbage takes a fifth of its time."""
    own = gc.get_threshold()
    if 0 < own[0] < _RARELY:
        gc.set_threshold(_RARELY, *own[1:])
    try:
        yield
    finally:
        gc.set_threshold(*own)


@contextmanager
def as_called() -> Iterator[None]:
    """The user's model runs with the default device that it has outside."""
    device = _callers_device.get()
    if device is None:
        yield
        return
    with device:
        yield


def mode_of(model: nn.Module) -> AbstractContextManager[object]:
    """The mode for torch.export, which sets marks that weights created in inference mode only accept there."""
    is_inference = any(t.is_inference() for t in (*model.parameters(), *model.buffers()))
    return torch.inference_mode() if is_inference else nullcontext()
