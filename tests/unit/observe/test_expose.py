"""Taps as further outputs: the model's own stay the same, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import observed
import onnxruntime
import oracle
import pytest
import torch
from call_models import HEADS, SIZE, Stack
from observed import EXAMPLES
from torch import Tensor, nn

import attnopt
from attnopt.errors import CaptureError, PolicyError
from attnopt.observe.chosen import KINDS


@pytest.mark.parametrize("name", EXAMPLES)
def test_taps_are_what_hooks_read(name: str) -> None:
    example = EXAMPLES[name]()
    with torch.no_grad():
        own = oracle.leaves(example.model(**example.batch))
    kinds = [k for k in KINDS if k != "input" or name != "GPT-2"]  # whose input is flat
    tapped = attnopt.expose(example.model, {"*": kinds}, (), example.batch)
    with torch.no_grad():
        out, taps = tapped(**example.batch)
    for got, want in zip(oracle.leaves(out), own, strict=True):
        assert torch.equal(got, want)
    assert len(taps) == len(kinds) * len(example.attentions)
    for a in example.attentions:
        want = observed.by_hand(example, a)
        for kind in kinds:
            observed.assert_near(taps[f"{a.name}.{kind}"], want[kind])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "cross"])
def test_at_other_lengths_saved_and_in_onnx(name: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]()
    a = example.attentions[-1]
    taps = {
        a.name: [
            attnopt.Rows([-1, 0], heads=[2, 1]),
            attnopt.Columns([0, -2]),
            attnopt.Outputs(heads=[3]),
            "lse",
            attnopt.Exposed("contribution", rows=[-1]),
        ]
    }
    tapped = attnopt.expose(example.model, taps, (), example.batch, dynamic_shapes="auto")
    tapped.save(tmp_path / "saved")
    tapped.export_onnx(tmp_path / "model.onnx")
    loaded = attnopt.load(tmp_path / "saved")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    longer = longer_batch(name)
    for batch in (example.batch, longer):
        want = observed.by_hand(observed.Example(example.model, batch, example.attentions), a)
        expected = {
            f"{a.name}.weights": want["weights"][:, [1, 2]][:, :, [-1, 0]],
            f"{a.name}.weights#2": want["weights"][..., [0, -2]],
            f"{a.name}.outputs": want["outputs"][:, [3]],
            f"{a.name}.lse": want["lse"],
            f"{a.name}.contribution": want["contribution"][:, :, [-1]],
        }
        with torch.no_grad():
            own = oracle.leaves(example.model(**batch))
            for model in (tapped, loaded):
                out, found = model(**batch)
                assert all(torch.equal(x, y) for x, y in zip(oracle.leaves(out), own, strict=True))
                assert list(found) == list(expected)
                for key, x in expected.items():
                    observed.assert_near(found[key], x)
        names = [o.name for o in session.get_outputs()]
        word = a.name.replace(".", "_")
        assert names[-5:] == [f"{word}_{x}" for x in ("weights", "weights_2", "outputs", "lse", "contribution")]
        feed = {i.name: np.asarray(batch[i.name]) for i in session.get_inputs()}
        for got, x in zip(session.run(names[-5:], feed), expected.values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), x, rtol=1e-4, atol=1e-5)


def longer_batch(name: str) -> dict[str, Any]:
    if name == "cross":
        return {
            "hidden": torch.randn(3, 11, 32),
            "text": torch.randn(3, 9, 12),
            "attention_mask": observed.mask(9, 5, 1),
        }
    batch: dict[str, Any] = {"input_ids": torch.randint(0, 50, (3, 17))}
    return batch if name == "Llama" else {**batch, "attention_mask": observed.mask(17, 6, 9, longest=17)}


@pytest.mark.parametrize(
    "tap",
    [
        attnopt.Rows([-3]),
        attnopt.Columns([-3]),
        attnopt.Exposed("outputs", rows=[-3]),
        attnopt.Exposed("q", rows=[1, -3]),
    ],
)
def test_positions_from_the_end_that_a_shorter_sequence_does_not_have(tap: attnopt.Exposed, tmp_path: Path) -> None:
    """ONNX counts an index below 0 from the end: -3 of two tokens must not be the last one."""
    tapped = attnopt.expose(Stack(), {"first": tap}, (torch.randn(2, 9, HEADS * SIZE),), dynamic_shapes="auto")
    tapped.export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    name = session.get_inputs()[0].name
    x = torch.randn(2, 3, HEADS * SIZE)
    with torch.no_grad():
        (want,) = tapped(x)[1].values()
    np.testing.assert_allclose(session.run(None, {name: x.numpy()})[1], want, atol=1e-5)
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, {name: x[:, :2].numpy()})
    with pytest.raises(IndexError):
        tapped(x[:, :2])


def test_several_rules_for_one_attention() -> None:
    example = EXAMPLES["BERT"]()
    first = example.attentions[0].name
    tapped = attnopt.expose(example.model, {first: "q", "*": attnopt.Rows([0])}, (), example.batch)
    _, taps = tapped(**example.batch)
    assert list(taps) == [f"{first}.q", f"{first}.weights", f"{example.attentions[1].name}.weights"]
    assert [s.status for s in tapped.sites] == ["unchanged"] * 2
    assert "unchanged" in str(tapped.report)


def test_only_rows_are_computed() -> None:
    """No tensor of the graph is a whole map."""
    example = EXAMPLES["Llama"]()
    tapped = attnopt.expose(example.model, {"*": attnopt.Rows([-1])}, (), example.batch)
    own = attnopt.expose(example.model, {"*": "q"}, (), example.batch)

    def maps(model: attnopt.OptimizedModel) -> int:
        found = (n.meta.get("val") for n in model.graph_module.graph.nodes)
        return sum(isinstance(x, Tensor) and x.dim() == 4 and tuple(x.shape[1:]) == (4, 9, 9) for x in found)

    assert maps(tapped) == maps(own)


def errors() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "no taps": ({"taps": {}}, "expected a mapping"),
        "a list": ({"taps": ["q"]}, "expected a mapping"),
        "kind": ({"taps": {"*": "queries"}}, "expected one of 'q', 'k', 'v'"),
        "glob": ({"taps": {"layers.*": "q"}}, "no attention is named 'layers.*'"),
        "rows": ({"taps": {"*": attnopt.Rows([9])}}, "rows 9 out of range"),
        "heads": ({"taps": {"*": attnopt.Outputs(heads=[4])}}, "there is no head 4"),
        "inputs": ({"kwargs": {}}, "expose needs example inputs"),
    }


@pytest.mark.parametrize("case", errors())
def test_errors_say_what_to_do(case: str) -> None:
    changed, told = errors()[case]
    given: dict[str, Any] = {"taps": {"*": "q"}, "kwargs": {"input_ids": torch.zeros(2, 9).long()}}
    with pytest.raises(PolicyError) as e:
        attnopt.expose(EXAMPLES["BERT"]().model, **{**given, **changed})
    assert told in str(e.value)


def test_a_model_that_changes_a_cache() -> None:
    example = EXAMPLES["Llama"]()
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache(config=example.model.config)
    with pytest.raises(CaptureError, match="use_cache=False"):
        attnopt.expose(example.model, {"*": "q"}, (), {**example.batch, "past_key_values": cache, "use_cache": True})


class Outer(nn.Module):
    """Returns a tuple with a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = observed.Cross()

    def forward(self, hidden: Tensor, text: Tensor, attention_mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.attn(hidden, text, attention_mask)
        return x, {"mean": x.mean(1)}


def test_an_output_of_any_structure() -> None:
    batch = EXAMPLES["cross"]().batch
    model = observed.far(Outer())
    tapped = attnopt.expose(model, {"attn": "lse"}, (), batch)
    with torch.no_grad():
        (x, more), taps = tapped(**batch)
        want, others = model(**batch)
    assert torch.equal(x, want)
    assert torch.equal(more["mean"], others["mean"])
    assert list(taps) == ["attn.lse"]
