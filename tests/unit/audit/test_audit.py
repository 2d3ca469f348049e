"""``attnopt.diff``: what an export lost is named, and an honest one raises no alarm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import audited
import pytest
import torch
from audited import FAULTS, Layer, Model

import attnopt
from attnopt.errors import CaptureError

FAST = (
    "window", "window-4096", "sinks", "softcap", "scale", "padding", "alibi", "kv-tiled", "heads-zeroed", "heads-swapped",
    "rope-base", "causal-second-layer", "attention-skipped",
)  # fmt: skip


def audit_of(fault: audited.Fault, path: Path, export: audited.Exporter = audited.by_script) -> attnopt.Audit:
    model, args = Model(fault.layer, fault.layer), audited.inputs()
    export(audited.changed(model, fault.at, **fault.lost), args, path)
    return attnopt.diff(model, path, args)


def check(fault: audited.Fault, audit: attnopt.Audit) -> None:
    """The attention that lost something is the one that differs, in the way that was planted, and its effect is no zero."""
    assert audit.verdict == "differs"
    assert audit.exit_code == 1
    assert [s.verdict for s in audit.sites if s.name] == ["differs" if i == fault.at else "same" for i in range(2)], audit
    found = audit.sites[fault.at].differences
    assert {d.kind for d in found} in ({fault.kind}, {fault.kind} | fault.beside)
    if fault.kind != "missing":
        assert all(d.effect is not None and d.effect.error > 1e-4 for d in found)


@pytest.mark.parametrize("name", FAST)
def test_what_an_export_lost_is_named(name: str, tmp_path: Path) -> None:
    check(FAULTS[name], audit_of(FAULTS[name], tmp_path / "lost.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo-18", "dynamo-23", "script-17"])
@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_fault_is_named(name: str, exporter: str, tmp_path: Path) -> None:
    check(FAULTS[name], audit_of(FAULTS[name], tmp_path / "lost.onnx", audited.EXPORTERS[exporter]))


HONEST = {
    "decoder": Layer(),
    "window-and-sinks": Layer(window=5, sinks=True, softcap=6.0),
    "window-4096": Layer(window=4096),
    "encoder": Layer(kv=4, causal=False, turn=None, alibi=0.5),
    "normed": Layer(normed=True),
}


@pytest.mark.parametrize(("name", "exporter"), [("window-and-sinks", "script-17"), ("encoder", "dynamo-20")])
def test_an_honest_export_is_the_same(name: str, exporter: str, tmp_path: Path) -> None:
    model, args = Model(HONEST[name], HONEST[name]), audited.inputs()
    audit = attnopt.diff(model, audited.EXPORTERS[exporter](model, args, tmp_path / "honest.onnx"), args)
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


def test_a_window_that_the_example_does_not_reach_is_shown_beyond_it(tmp_path: Path) -> None:
    (lost,) = audit_of(FAULTS["window-4096"], tmp_path / "lost.onnx").sites[0].differences
    assert lost.effect is not None
    assert lost.effect.tokens > 4096
    assert lost.effect.setting == "alone"
    assert "4095" in lost.model
    assert "4095" not in lost.file


def test_a_file_of_one_size_is_compared_at_it_and_says_so(tmp_path: Path) -> None:
    layer = Layer(window=4096)
    model, args = Model(layer, layer), audited.inputs()
    audit = attnopt.diff(model, audited.at_one_size(model, args, tmp_path / "fixed.onnx"), args)
    assert audit.verdict == "same"
    assert all("12 tokens alone" in s.notes[0] for s in audit.sites)


def test_it_is_plain_data_and_prints(tmp_path: Path) -> None:
    audit = audit_of(FAULTS["softcap"], tmp_path / "lost.onnx")
    found = json.loads(json.dumps(audit.to_json()))
    assert found["verdict"] == "differs"
    assert found["sites"][0]["differences"][0] | {"effect": None} == {
        "kind": "softcap", "model": "5", "file": "none", "effect": None,
    }  # fmt: skip
    assert "differs: softcap" in str(audit)
    assert "12 tokens (on the example)" in str(audit)


class _OtherInput(torch.nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, gain: Any) -> Any:
        return self.model(input_ids, attention_mask) * gain


def test_inputs_that_the_model_does_not_have_are_asked_for(tmp_path: Path) -> None:
    model, args = Model(Layer()), audited.inputs()
    gain = torch.ones(1, 1)
    names = [*audited.NAMES, "gain"]
    path = audited.by_script(_OtherInput(model), (*args, gain), tmp_path / "more.onnx", names)
    with pytest.raises(CaptureError, match="takes gain, which the example inputs of the model do not have"):
        attnopt.diff(model, path, args)
    assert attnopt.diff(model, path, args, inputs={"gain": gain}).verdict == "same"
