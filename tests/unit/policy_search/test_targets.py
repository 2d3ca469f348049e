"""What latency is measured in: each target runs the file that a user would deploy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from stacks import batches, stack
from tiny_decoder import decoder

import attnopt
from attnopt import Budget, Choice
from attnopt.base.call_inputs import CallInputs
from attnopt.base.cpu_timing import Times
from attnopt.errors import PolicyError
from attnopt.passes import Fuse, GroupedQuery, LocalWindow, PruneHeads, Sparse
from attnopt.patterns import Strided
from attnopt.policy_search.latency import Clock
from attnopt.policy_search.targets import call_of

pytestmark = pytest.mark.usefixtures("one_capture")
DATA = batches(4, 4)
X = DATA[0]
small, a_decoder = cache(stack), cache(decoder)
IDS = torch.randint(0, 49, (2, 12), generator=torch.Generator().manual_seed(0))
DECODED = (IDS, torch.ones_like(IDS), torch.arange(12).expand(2, -1))


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-int8"])
def test_a_call_gives_what_the_model_gives(target: str) -> None:
    fast = attnopt.optimize(small(), LocalWindow(2), (X,))
    (got,) = call_of(target, fast, CallInputs((X,), {}))()  # type: ignore[misc]
    want = fast(X).detach().numpy()
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < 1e-5 if target == "onnxruntime" else 1e-4 < error < 0.1


@pytest.mark.slow  # files of decoders
@pytest.mark.parametrize("window", [None, 4])
def test_a_token_follows_as_many_as_a_call_has(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.onnx.export import timed_calls

    held: list[Any] = []

    class Seen(timed_calls.DecoderRun):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            held.append(self)

    monkeypatch.setattr(timed_calls, "DecoderRun", Seen)
    fast = attnopt.optimize(
        decoder(), "fuse" if window is None else LocalWindow(window), DECODED, dynamic_shapes="auto"
    )
    logits: Any = call_of("token", fast, CallInputs(DECODED, {}))()
    assert logits.shape == (2, 1, 50)
    (run,) = held
    rooms = {v.shape()[2] for v in run.cache.values()}
    assert rooms == ({13} if window is None else {5})


def clocked(monkeypatch: pytest.MonkeyPatch, ms: Callable[[Any], float]) -> list[list[str]]:
    """Models take ``ms``, whatever they really take; the names of what was compared."""
    compared: list[list[str]] = []

    def compare(self: Clock, calls: Any) -> Times:
        compared.append(list(calls))
        return Times({name: (ms(m) / 1e3,) * 3 for name, m in calls.items()})

    monkeypatch.setattr(Clock, "call", lambda self, model, inputs: model)
    monkeypatch.setattr(Clock, "compare", compare)
    return compared


def test_shares_are_of_the_original_in_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = clocked(monkeypatch, lambda m: float(sum(s.num_heads for s in m.sites)))
    budget = Budget(latency=0.75, target="onnxruntime")
    found = attnopt.search(small(), Choice(None, PruneHeads(0.5)), (X,), calibration=DATA, budget=budget)
    assert found.report.original["latency"] == pytest.approx(8.0)
    assert found.report.best is not None
    assert found.report.best.costs["latency"] == pytest.approx(6.0)
    assert found.report.latency == {"predicted": pytest.approx(6.0), "measured": pytest.approx(6.0)}
    assert compared[0] == ["graph"], "the user's own model is no file"
    assert found.report.budget == "latency in ONNX Runtime 0.75 of the original"


@pytest.mark.slow
def test_a_decoder_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows can roll, and are found; what no cache of ONNX Runtime holds is refused with the reason."""
    clocked(monkeypatch, lambda m: sum(2.0 if "Window" in str(s.spec.pattern) else 4.0 for s in m.sites))
    strided = Sparse(Strided(2))
    policy = {"layers.0": Choice(None, LocalWindow(2), strided), "layers.1": LocalWindow(3)}
    budget = Budget(latency=0.6, target="token")
    found = attnopt.search(a_decoder(), policy, DECODED, calibration=[DECODED], budget=budget)
    ((site, _, why),) = found.report.refused
    assert (site, "supports only Causal() and a causal window" in why) == ("layers.0", True)
    assert found.policy == attnopt.Policy.of({"layers.0": LocalWindow(2), "layers.1": LocalWindow(3)})
    assert found.report.original["latency"] == pytest.approx(8.0)


def test_a_choice_that_fits_all_layers_but_not_one_layer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers have one size: no file keeps a layer of one K/V head beside one of two."""
    clocked(monkeypatch, lambda m: sum(2.0 if "Window" in str(s.spec.pattern) else 4.0 for s in m.sites))
    grouped = GroupedQuery(1, "mean", "adjacent", "none")
    policy = {"layers.*": Choice(None, LocalWindow(2), grouped)}
    budget = Budget(latency=0.6, target="token")
    found = attnopt.search(a_decoder(), policy, DECODED, calibration=[DECODED], budget=budget)
    assert [(site, "1 heads of 8, 2 heads of 8" in why) for site, _, why in found.report.refused] == [
        ("layers.0", True),
        ("layers.1", True),
    ]
    assert found.policy == attnopt.Policy.of({"layers.0": LocalWindow(2), "layers.1": LocalWindow(2)})


def test_what_is_left_as_it_is_is_fused_for_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked(monkeypatch, lambda m: sum(2.0 if "Window" in str(s.spec.pattern) else 4.0 for s in m.sites))
    budget = Budget(latency=1.0, target="token")
    found = attnopt.search(
        decoder(), {"layers.0": Choice(None, LocalWindow(2))}, DECODED, calibration=[DECODED], budget=budget
    )
    assert found.policy == attnopt.Policy.of({"layers.0": Fuse(), "layers.1": Fuse()})


@pytest.mark.slow  # exports, and a search
@pytest.mark.filterwarnings("ignore:search. the whole model takes")  # a busy machine
@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime-int8", "token"])
def test_on_this_machine(target: str) -> None:
    model, args = (a_decoder(), DECODED) if target == "token" else (small(), (X,))
    policy = Choice(None, LocalWindow(2), LocalWindow(2, sinks=1))
    budget = Budget(latency=1e6, target=target)
    found = attnopt.search(model, policy, args, calibration=[args] * 2, budget=budget, evaluations=3)
    assert set(found.report.latency) == {"predicted", "measured"}
    assert found.report.original["latency"] > 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"latency": 0.5, "target": "onnxruntim"}, "did you mean 'onnxruntime'"),
        ({"flops": 0.5, "target": "token"}, "target='token' is what latency on a CPU is measured in"),
        ({"latency": 0.5, "target": "onnxruntime", "device": "cuda"}, "is what latency on a CPU is measured in"),
    ],
)
def test_budgets_that_are_none(given: Any, text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Budget(**given)
    assert text in str(caught.value)


def test_a_model_that_is_no_decoder() -> None:
    with pytest.raises(PolicyError, match="cannot run in ONNX Runtime, for one token: a decoder takes input_ids"):
        attnopt.search(
            small(), Choice(None, LocalWindow(2)), (X,), calibration=DATA, budget=Budget(latency=0.9, target="token")
        )
