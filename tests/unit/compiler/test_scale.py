"""What many layers and many optimizations cost: one proof for equal layers, time in proportion, nothing left behind."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
from tiny_models import Attention
from torch import nn

import attnopt
from attnopt.match import find as finding
from attnopt.passes import LocalWindow, PruneHeads


def on_meta(layers: int) -> tuple[nn.Module, torch.Tensor]:
    with torch.device("meta"):
        return nn.Sequential(*(Attention(512, 8, causal=False) for _ in range(layers))), torch.empty(1, 32, 512)


def test_equal_layers_are_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[object] = []
    site_error = finding.site_error
    monkeypatch.setattr(finding, "site_error", lambda *given: proofs.append(given) or site_error(*given))
    model, x = on_meta(6)
    assert len(attnopt.inspect(model, (x,)).sites) == 6
    assert len(proofs) == 1


def test_time_grows_with_the_layers_alone() -> None:
    def seconds(layers: int) -> float:
        model, x = on_meta(layers)
        start = time.process_time()
        assert len(attnopt.inspect(model, (x,)).sites) == layers
        return time.process_time() - start

    seconds(1)  # imports
    few, many = min(seconds(4) for _ in range(2)), min(seconds(16) for _ in range(2))
    assert many < 1.6 * 4 * few


@pytest.mark.slow
def test_nothing_is_left_behind() -> None:
    """Neither the models nor what was made of them, nor a tensor more with every round."""
    alive: list[weakref.ref[nn.Module]] = []

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def round_of(policy: object) -> None:
        model, x = Attention(causal=False).eval(), torch.randn(8, 8, 16)
        fast = attnopt.optimize(model, policy, (x,), calibration=[x])
        fast(x)
        alive.extend([weakref.ref(model), weakref.ref(fast), weakref.ref(fast.graph_module)])

    counts: list[int] = []
    for n in range(8):
        round_of((LocalWindow(n + 1), PruneHeads(heads=[n % 2]))[n % 2])
        counts.append(tensors())
    assert not [r() for r in alive if r() is not None]
    assert counts[-1] == counts[3], counts
