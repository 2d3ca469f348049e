"""Guidance: the model pushed away from a weaker form of itself, against both run apart."""

from __future__ import annotations

import math
from pathlib import Path

import onnxruntime
import oracle
import pytest
import torch
import zoo
from stacks import stack
from torch import Tensor, fx, nn

import attnopt
from attnopt.errors import PolicyError, RewriteError, VerificationError
from attnopt.passes import HeadPatch, LocalWindow, PruneHeads, SegmentGain, SoftPAG

LAYERS = 4
WEAK = {
    "one head": {"layers.2": SoftPAG([1], 0.5)},
    "the last layer": {"layers.3": "soft-pag"},
    "pruned": {"layers.1": PruneHeads(heads=[0])},
    "constants": {"layers.2": HeadPatch([1], torch.randn(1, 4))},
    "everywhere": [LocalWindow(2)],
    "gains": {"layers.1": SegmentGain([0], 0.1)},
}


def branches(model: nn.Module, weak: object, args: tuple[Tensor, ...], scale: float, given: Tensor) -> Tensor:
    """The same from two models."""
    strong, other = model(given), attnopt.optimize(model, weak, args, dynamic_shapes="auto")(given)
    pushed: Tensor = strong + scale * (strong - other)
    return pushed


def attentions(graph: fx.Graph) -> int:
    return sum("attention" in str(n.target) for n in graph.nodes if n.op == "call_function")


@pytest.mark.parametrize(("name", "shapes"), [*((name, "auto") for name in WEAK), ("one head", None)])
def test_law_guidance_is_both_branches_apart(name: str, shapes: str | None) -> None:
    model, x = stack(layers=LAYERS), torch.randn(2, 12, 16)
    fast = attnopt.guidance(model, WEAK[name], (x,), scale=1.5, dynamic_shapes=shapes)
    for given in (x, torch.randn(3, 29, 16)) if shapes else (x,):
        want = branches(model, WEAK[name], (x,), 1.5, given).detach()
        oracle.assert_same(oracle.run(fast, (given,)), [want], limit=1e-4)
        oracle.assert_differs([want], oracle.run(model, (given,)))


@pytest.mark.parametrize(("first", "shapes"), [(0, None), (2, None), (3, "auto")])
def test_layers_before_the_first_edit_run_once(first: int, shapes: str | None) -> None:
    model, x = stack(layers=LAYERS), torch.randn(2, 12, 16)
    fast = attnopt.guidance(model, {f"layers.{first}": SoftPAG([1], 0.5)}, (x,), scale=2.0, dynamic_shapes=shapes)
    own = LAYERS - first - 1  # the edited attention itself is computed once, too
    assert attentions(fast.graph_module.graph) == LAYERS + own
    assert sum(p.numel() for p in fast.parameters()) == sum(p.numel() for p in model.parameters())
    assert fast.report.cpu_seconds.keys() == {"before", "after"}


def test_scale_0_is_the_model() -> None:
    model, x = stack(), torch.randn(2, 12, 16)
    fast = attnopt.guidance(model, SoftPAG([1], 0.5), (x,), scale=0.0)
    oracle.assert_same(oracle.run(fast, (x,)), oracle.run(model, (x,)))


def test_saved_exported_and_trained(tmp_path: Path) -> None:
    model, x = stack(), torch.randn(2, 12, 16)
    fast = attnopt.guidance(model, {"layers.1": SoftPAG([1], 0.5)}, (x,), scale=2.0, dynamic_shapes="auto")
    fast.save(tmp_path / "saved")
    fast.export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for given in (x, torch.randn(1, 33, 16)):
        oracle.assert_same(
            oracle.run(attnopt.load(tmp_path / "saved"), (given,)), oracle.run(fast, (given,)), limit=0.0
        )
        (got,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        oracle.assert_same([torch.from_numpy(got)], oracle.run(fast, (given,)), limit=1e-4)
    fast(x).square().sum().backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    branches(model, {"layers.1": SoftPAG([1], 0.5)}, (x,), 2.0, x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-3)  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov2", "roberta"])
def test_law_guidance_of_models(name: str) -> None:
    model, args, kwargs = zoo.BY_NAME[name].build()
    fast = attnopt.guidance(model, SoftPAG([1, 2], 0.7), args, kwargs, scale=0.5)
    strong = oracle.run(model, args, kwargs)
    weak = oracle.run(attnopt.optimize(model, SoftPAG([1, 2], 0.7), args, kwargs), args, kwargs)
    want = [a + 0.5 * (a - b) for a, b in zip(strong, weak, strict=True)]
    oracle.assert_same(oracle.run(fast, args, kwargs), want, limit=1e-4)


class Counting(nn.Module):
    """Attention that counts its calls in a buffer, and returns which token is largest."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.inner = stack(layers=1)
        self.counts = counts
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.counts:
            self.calls.add_(1)
        out = self.inner(x)
        return out, out.sum(-1).argmax(-1)


def test_outputs_that_are_no_numbers_are_the_models() -> None:
    model, x = Counting(False), torch.randn(2, 12, 16)
    pushed, places = attnopt.guidance(model, SoftPAG(), (x,), scale=3.0)(x)
    strong, own = model(x)
    assert torch.equal(places, own)
    assert not torch.allclose(pushed, strong)


def test_what_is_refused() -> None:
    x = torch.randn(2, 12, 16)
    with pytest.raises(RewriteError, match="changes its own state"):
        attnopt.guidance(Counting(True), SoftPAG(), (x,), scale=1.0)
    with pytest.raises(PolicyError, match="scale=nan"):
        attnopt.guidance(stack(), SoftPAG(), (x,), scale=math.nan)
    with pytest.raises(PolicyError, match="example inputs"):
        attnopt.guidance(stack(), SoftPAG(), scale=1.0)
    with pytest.raises(RewriteError, match="soft-pag"):
        attnopt.guidance(stack(), SoftPAG([9]), (x,), scale=1.0, strict=True)


def test_a_wrong_join_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.compiler import guidance

    joined = guidance.joined
    monkeypatch.setattr(guidance, "joined", lambda strong, weak, scale: joined(strong, weak, scale + 0.1))
    with pytest.raises(VerificationError, match="two branches"):
        attnopt.guidance(stack(), SoftPAG(), (torch.randn(2, 12, 16),), scale=1.0)


def test_tensors_that_copies_of_a_graph_share_are_told_apart() -> None:
    """Two nodes with one fake tensor are two inputs of what is traced on them."""
    from attnopt.base.call_inputs import CallInputs
    from attnopt.capture.capture import capture
    from attnopt.graph.emitter import Emitter

    gm = capture(stack(layers=1), CallInputs((torch.randn(2, 12, 16),), {})).module
    first, second = [n for n in gm.graph.nodes if n.op == "call_function" and n.meta["val"].dim() == 3][:2]
    second.meta["val"] = first.meta["val"]
    output = next(iter(reversed(gm.graph.nodes)))
    made = Emitter(gm.graph, output).inline(lambda a, b: a - b, first, second)
    assert made.all_input_nodes == [first, second]
