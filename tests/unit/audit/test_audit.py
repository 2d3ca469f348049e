"""``attnopt.diff``: what an export lost is named, and an honest one raises no alarm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import audited
import pytest
import torch
from audited import FAULTS, Layer, Model

import attnopt
from attnopt.errors import CaptureError

FAST = ("window-4096", "sinks", "softcap", "scale", "padding", "kv-tiled")
EVERY = tuple(FAULTS)


def lost(names: Sequence[str], path: Path, export: audited.Exporter = audited.by_script) -> attnopt.Audit:
    """One layer for each fault, all of which are planted in one export."""
    model, args = Model(*(FAULTS[n].layer for n in names)), audited.inputs()
    faulty = model
    for at, name in enumerate(names):
        faulty = audited.changed(faulty, at, **FAULTS[name].lost)
    return attnopt.diff(model, export(faulty, args, path), args)


def check(names: Sequence[str], audit: attnopt.Audit) -> None:
    """Each attention differs as was planted in it, and in no other way; the effect is no zero."""
    assert audit.verdict == "differs"
    assert audit.exit_code == 1
    found = [(d.kind,) if (d := s.differences[0]) and len(s.differences) == 1 else s.differences for s in audit.sites]
    assert found == [(FAULTS[name].kind,) for name in names], audit
    assert all(d.effect is not None and d.effect.error > 1e-4 for s in audit.sites for d in s.differences)


@pytest.mark.slow
def test_what_an_export_lost_is_named(tmp_path: Path) -> None:
    audit = lost(FAST, tmp_path / "lost.onnx")
    check(FAST, audit)
    (window,) = audit.sites[0].differences  # of 4,096 tokens, where the example has 12
    assert window.effect is not None
    assert window.effect.tokens > 4096
    assert window.effect.setting == "alone"
    assert "4095" in window.model
    assert "4095" not in window.file
    told = json.loads(json.dumps(audit.to_json()))
    assert told["verdict"] == "differs"
    found = told["sites"][2]["differences"][0]
    assert (found["kind"], found["model"], found["file"]) == ("softcap", "5", "none")
    assert "differs: softcap" in str(audit)
    assert "12 tokens (on the example)" in str(audit)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo-18", "dynamo-23", "script-17"])
@pytest.mark.parametrize("first", range(0, len(EVERY), 9))
def test_every_planted_fault_is_named(first: int, exporter: str, tmp_path: Path) -> None:
    names = EVERY[first : first + 9]
    check(names, lost(names, tmp_path / "lost.onnx", audited.EXPORTERS[exporter]))


@pytest.mark.slow
def test_other_layers_stay_the_same_and_a_lost_one_is_missing(tmp_path: Path) -> None:
    """A fault in the first layer is none of the second."""
    model, args = Model(Layer(), Layer(), Layer()), audited.inputs()
    faulty = audited.changed(audited.changed(model, 0, scale=0.25), 2, skipped=True)
    audit = attnopt.diff(model, audited.by_script(faulty, args, tmp_path / "lost.onnx"), args)
    found = [s.differences[0].kind if s.differences else s.verdict for s in audit.sites]
    assert found == ["scale", "same", "missing"]
    assert [s.verdict for s in audit.sites] == ["differs", "same", "differs"]


HONEST = {
    "decoder": Layer(),
    "window-and-sinks": Layer(window=5, sinks=True, softcap=6.0),
    "window-4096": Layer(window=4096),
    "encoder": Layer(kv=4, causal=False, turn=None, alibi=0.5),
    "normed": Layer(normed=True),
}


@pytest.mark.slow  # exports a whole model in several ways
def test_an_honest_export_is_the_same(tmp_path: Path) -> None:
    model, args = Model(HONEST["window-and-sinks"], HONEST["decoder"]), audited.inputs()
    audit = attnopt.diff(model, audited.by_dynamo(model, args, tmp_path / "honest.onnx"), args)
    assert audit.verdict == "same", audit
    assert audit.exit_code == 0
    assert all(max(s.tokens) > audited.LENGTH for s in audit.sites)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", audited.EXPORTERS)
@pytest.mark.parametrize("name", HONEST)
def test_no_exporter_raises_an_alarm(name: str, exporter: str, tmp_path: Path) -> None:
    model, args = Model(HONEST[name], HONEST[name]), audited.inputs()
    audit = attnopt.diff(model, audited.EXPORTERS[exporter](model, args, tmp_path / "honest.onnx"), args)
    assert audit.verdict != "differs", audit


@pytest.mark.slow
def test_a_file_of_one_size_is_compared_at_it_and_says_so(tmp_path: Path) -> None:
    layer = Layer(window=4096)
    model, args = Model(layer, layer), audited.inputs()
    audit = attnopt.diff(model, audited.at_one_size(model, args, tmp_path / "fixed.onnx"), args)
    assert audit.verdict == "same"
    assert all("12 tokens alone" in s.notes[0] for s in audit.sites)


class _OtherInput(torch.nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, gain: Any) -> Any:
        return self.model(input_ids, attention_mask) * gain


@pytest.mark.slow
def test_inputs_that_the_model_does_not_have_are_asked_for(tmp_path: Path) -> None:
    model, args = Model(Layer()), audited.inputs()
    gain = torch.ones(1, 1)
    names = [*audited.NAMES, "gain"]
    path = audited.by_script(_OtherInput(model), (*args, gain), tmp_path / "more.onnx", names)
    with pytest.raises(CaptureError, match="takes gain, which the example inputs of the model do not have"):
        attnopt.diff(model, path, args)
    assert attnopt.diff(model, path, args, inputs={"gain": gain}).verdict == "same"
