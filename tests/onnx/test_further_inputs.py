"""What a policy reads of each call, where the model is an ONNX file: an input of the rewritten file beside its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import oracle
import pytest
import torch
from call_models import HEADS, SIZE, Stack
from onnx_by_hand import DIM, contrib, plain, recurrent
from torch import Tensor, nn
from variants import mostly_slow

import attnopt
from attnopt import Input
from attnopt.passes import (
    ExtendKeys,
    HeadPatch,
    LocalWindow,
    MixMap,
    PruneHeads,
    ScaleHeads,
    SegmentGain,
    Sparse,
    Steer,
    Transplant,
)  # fmt: skip
from attnopt.patterns import Segments

Given = dict[str, Tensor]
OTHERS = 5  # tokens of a reference


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 3, (batch, length))


def segment(number: int) -> Segments:
    """The keys of one, whoever asks."""
    return Segments(Input("given"), [(None, number)])


# policy, what a call brings for (batch, length)
CASES: dict[str, tuple[Any, Callable[[int, int], Given]]] = {
    "gains": (ScaleHeads(Input("given")), lambda B, L: {"given": torch.rand(B, HEADS)}),
    "one delta for all": (Steer(Input("given"), [2, 0]), lambda B, L: {"given": torch.randn(2, SIZE)}),
    "a delta of each token": (
        [LocalWindow(2), Steer(Input("given"), [1])], lambda B, L: {"given": torch.randn(B, 1, L, SIZE)},
    ),
    "values": (
        [PruneHeads(heads=[0]), HeadPatch([1, 3], Input("given"))], lambda B, L: {"given": torch.randn(B, 2, L, SIZE)},
    ),
    "a map": (MixMap(Input("given"), 0.25, [0, 2]), lambda B, L: {"given": torch.randn(B, 2, L, L)}),
    "segments": (Sparse(Segments(Input("given"))), lambda B, L: {"given": ids(B, L)}),
    "segments by pairs": (
        Sparse(Segments(Input("given"), [(0, 0), (1, None), (2, 1), (2, 2)])), lambda B, L: {"given": ids(1, L)[0]},
    ),
    "gains on segments": (
        SegmentGain(segment(1), 0.5, normalise="redistribute", to=segment(2)),
        lambda B, L: {"given": ids(B, L)},
    ),
    "a reference under a mask": (
        ExtendKeys(Input("given"), 1.5, mask=Input("seen")),
        lambda B, L: {"given": torch.randn(B, OTHERS, DIM), "seen": torch.arange(OTHERS).expand(B, -1) < 3},
    ),
    "queries and keys": (
        Transplant(q=Input("given"), k=Input("keys"), heads=[3, 1]),
        lambda B, L: {"given": torch.randn(B, 2, L, SIZE), "keys": torch.randn(B, 2, L, SIZE)},
    ),
    "another map": (Transplant(map=Input("given")), lambda B, L: {"given": torch.rand(B, HEADS, L, L)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model, and the file that torch makes of it."""
    model, file = Stack().eval(), tmp_path_factory.mktemp("further") / "m.onnx"
    axes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(2, 9, DIM),), str(file), dynamo=True, dynamic_shapes=axes, verbose=False)
    return model, file


def in_runtime(file: Path, feed: Given) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert {i.name for i in session.get_inputs()} == set(feed)
    return [torch.from_numpy(o) for o in session.run(None, {n: x.numpy() for n, x in feed.items()})]


@pytest.mark.parametrize("case", mostly_slow(CASES, "values"))
def test_law_a_file_means_what_its_model_means(case: str, stack: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """At sizes that no example had, from an example of one sequence, too."""
    policy, brought = CASES[case]
    model, file = stack
    wanted = attnopt.optimize(model, policy, (torch.randn(2, 9, DIM),), brought(2, 9), dynamic_shapes="auto")
    for example in ((1, 9), (2, 9)) if case in ("gains", "segments", "a reference under a mask") else ((2, 9),):
        fast = attnopt.optimize(file, policy, (torch.randn(*example, DIM),), brought(*example))
        assert [s.status for s in fast.report.sites] == ["rewritten", "rewritten"]
        fast.export_onnx(tmp_path / "fast.onnx")
        for batch, length in ((2, 9), (1, 9), (3, 14)):
            x, given = torch.randn(batch, length, DIM), brought(batch, length)
            want = oracle.run(wanted, (x,), given)
            oracle.assert_differs(want, oracle.run(model, (x,)))
            oracle.assert_same(list(fast(x, **given).values()), want)
            oracle.assert_same(in_runtime(tmp_path / "fast.onnx", {"x": x, **given}), want)


def test_everything_else_stays_and_free_axes_have_their_names(tmp_path: Path) -> None:
    """In a file with names that Python does not know, and operators that ONNX Runtime executes."""
    file, out, x = contrib(tmp_path / "m.onnx"), tmp_path / "fast.onnx", torch.randn(2, 7, DIM)
    policy = {"layer.0.*": Steer(Input("delta")), "layer.1.*": Sparse(Segments(Input("kinds")))}
    fast = attnopt.optimize(file, policy, (x,), {"delta": torch.randn(2, 4, 7, 8), "kinds": ids(1, 7)})
    fast.export_onnx(out)
    before, after = onnx.load(file).graph, onnx.load(out).graph
    assert list(after.input)[:1] == list(before.input)
    assert list(after.output) == list(before.output)
    named = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in list(after.input)[1:]}
    assert named == {"delta": ["Batch Size", 4, "seq-len", 8], "kinds": [1, "seq-len"]}
    x, given = torch.randn(3, 12, DIM), {"delta": torch.randn(3, 4, 12, 8), "kinds": ids(1, 12)}
    oracle.assert_same(in_runtime(out, {"InputIds:0": x, **given}), list(fast(x, **given).values()))


def test_only_what_is_read_becomes_an_input(tmp_path: Path) -> None:
    """Where no attention reads it, the file stays the same."""
    file, out, x = plain(tmp_path / "m.onnx"), tmp_path / "fast.onnx", torch.randn(2, 7, DIM)
    given = {"delta": torch.randn(2, 1, 5)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        fast = attnopt.optimize(file, [PruneHeads(heads=[3]), Steer(Input("delta"), [0])], (x,), given)
    assert fast.report.sites[0].refusals["steer"].code == "other-sizes"
    fast.export_onnx(out)
    assert [i.name for i in onnx.load(out).graph.input] == ["x"]
    oracle.assert_same(in_runtime(out, {"x": x}), list(fast(x, **given).values()))


@pytest.mark.parametrize("opset", [11, 13, 17])
def test_older_opsets(opset: int, tmp_path: Path) -> None:
    file, out, x = plain(tmp_path / "m.onnx", opset), tmp_path / "fast.onnx", torch.randn(2, 9, DIM)
    policy = [Sparse(Segments(Input("ids"))), ScaleHeads(Input("gains")), Steer(Input("delta"), [1])]
    given = {"ids": ids(2, 9), "gains": torch.rand(2, 4), "delta": torch.randn(1, 8)}
    attnopt.optimize(file, policy, (x,), given).export_onnx(out)
    fast = attnopt.optimize(file, policy, (x,), given)
    oracle.assert_same(in_runtime(out, {"x": x, **given}), list(fast(x, **given).values()))
    assert next(o.version for o in onnx.load(out).opset_import if not o.domain) == opset


def test_an_input_that_the_file_has_is_read(tmp_path: Path) -> None:
    """Passed by name, in another order than the file's, too."""

    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = Stack()

        def forward(self, x: Tensor, gains: Tensor) -> Tensor:
            return self.stack(x * gains.mean(1)[:, None, None])

    model, file, out = Gained().eval(), tmp_path / "m.onnx", tmp_path / "fast.onnx"
    x, gains = torch.randn(2, 9, DIM), torch.rand(2, HEADS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x, gains), str(file), dynamo=True, verbose=False)
    want = oracle.run(attnopt.optimize(model, ScaleHeads(Input("gains")), (x, gains)), (x, gains))
    given = {"ids": ids(2, 9), "gains": gains, "x": x}
    fast = attnopt.optimize(file, ScaleHeads(Input("gains")), (), {"gains": gains, "x": x})
    oracle.assert_same(list(fast(gains=gains, x=x).values()), want)
    fast.export_onnx(out)
    assert [i.name for i in onnx.load(out).graph.input] == ["x", "gains"]
    oracle.assert_same(in_runtime(out, {"x": x, "gains": gains}), want)
    both = [ScaleHeads(Input("gains")), Sparse(Segments(Input("ids")))]
    fast = attnopt.optimize(file, both, (), given)
    fast.export_onnx(out)
    assert [i.name for i in onnx.load(out).graph.input] == ["x", "gains", "ids"]
    want = oracle.run(
        attnopt.optimize(model, both, (x, gains), {"ids": given["ids"]}), (x, gains), {"ids": given["ids"]}
    )
    oracle.assert_same(in_runtime(out, given), want)


def test_names_of_a_file_by_keyword_in_any_order(tmp_path: Path) -> None:
    file, out = recurrent(tmp_path / "m.onnx"), tmp_path / "fast.onnx"
    x, bias = torch.randn(2, 7, DIM), 0.1 * torch.randn(2, 1, 1, 7)
    fast = attnopt.optimize(file, PruneHeads(heads=[1]), (), {"bias": bias, "_from": x})
    fast.export_onnx(out)
    oracle.assert_same(in_runtime(out, {"from": x, "bias": bias}), list(fast(_from=x, bias=bias).values()))


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    file, x = plain(tmp_path / "m.onnx"), torch.randn(2, 7, DIM)
    with pytest.raises(attnopt.PolicyError, match="reads the input delta, which is not among the example inputs"):
        attnopt.optimize(file, Steer(Input("delta")), (x,))
    with pytest.raises(attnopt.CaptureError, match="unexpected keyword argument 'other'"):
        attnopt.optimize(file, Steer(Input("delta")), (x,), {"delta": torch.randn(2, 4, 8), "other": x})
    model = onnx.load(file)
    inner = next(i for i, n in enumerate(model.graph.node) if n.op_type == "Softmax")
    old, name = model.graph.node[inner].output[0], "weights"
    for node in model.graph.node:
        for values in (node.input, node.output):
            renamed = [name if v == old else v for v in values]
            del values[:]
            values.extend(renamed)
    onnx.save(model, str(file))
    with pytest.raises(attnopt.PolicyError, match="reads the input weights, but the file has a value or a weight"):
        attnopt.optimize(file, Transplant(map=Input("weights")), (x,), {"weights": torch.rand(2, 4, 7, 7)})
    fast = attnopt.optimize(file, Steer(Input("delta")), (x,), {"delta": torch.randn(2, 4, 8)})
    with pytest.raises(attnopt.CaptureError, match="delta has length 3 along axis 1"):
        fast(x, delta=torch.randn(2, 3, 8))
