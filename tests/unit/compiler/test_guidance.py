"""Guidance: the model pushed away from a weaker form of itself, against both run apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import oracle
import pytest
import torch
import zoo
from stacks import stack
from torch import Tensor, fx, nn

import attnopt
from attnopt.errors import PolicyError, RewriteError, VerificationError
from attnopt.passes import HeadPatch, LocalWindow, PruneHeads, ScaleHeads, SegmentGain, SoftPAG

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


@pytest.mark.slow
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


class Packed(nn.Module):
    """Attention whose queries, keys and values are parts of one projection, after a recurrent layer of several results."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.cut, self.start = cut, nn.LSTM(16, 16, batch_first=True)
        self.packed, self.out = (nn.ModuleList(nn.Linear(16, n) for _ in range(LAYERS)) for n in (48, 16))

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        x = self.start(x)[0]
        for packed, out in zip(self.packed, self.out, strict=True):
            parts = packed(x).split(16, -1) if self.cut == "split" else packed(x).view(B, L, 3, 16).unbind(2)
            q, k, v = (part.reshape(B, L, 4, 4).transpose(1, 2) for part in parts)
            x = x + out(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["split", "unbind"])
def test_layers_with_operators_of_several_results_run_once(cut: str) -> None:
    model, x = Packed(cut).eval(), torch.randn(2, 12, 16)
    last = attnopt.inspect(model, (x,)).sites[-1].name
    fast = attnopt.guidance(model, {last: SoftPAG([1], 0.5)}, (x,), scale=2.0)
    assert attentions(fast.graph_module.graph) == LAYERS
    assert sum("lstm" in str(n.target) for n in fast.graph_module.graph.nodes if n.op == "call_function") == 1
    assert sum(n.op == "call_module" for n in fast.graph_module.graph.nodes) <= 1  # the checks of the inputs
    oracle.assert_same(oracle.run(fast, (x,)), [branches(model, {last: SoftPAG([1], 0.5)}, (x,), 2.0, x).detach()])


class Around(nn.Module):
    """Attention between two functions."""

    def __init__(
        self, before: Callable[[Tensor], Tensor] = lambda x: x, after: Callable[[Tensor], Any] = lambda x: x
    ) -> None:
        super().__init__()
        self.before, self.inner, self.after = before, stack(), after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.inner(self.before(x)))


def checked(x: Tensor) -> Tensor:
    torch.ops.aten._assert_async.msg((x.abs() < 100).all(), "too large")
    return x


def counted(x: Tensor) -> Tensor:
    return x * (x > 0).nonzero().shape[0] / 100


def chosen(x: Tensor) -> Tensor:
    made: Tensor = torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("before", [checked, counted, chosen])
def test_law_guidance_of_models_that_check_and_branch(before: Callable[[Tensor], Tensor]) -> None:
    model, x, weak = Around(before), torch.randn(2, 12, 16), {"inner.layers.1": SoftPAG([1], 0.5)}
    fast = attnopt.guidance(model, weak, (x,), scale=1.5)
    for given in (x, -x):
        if before is not counted or torch.equal(given, x):
            oracle.assert_same(oracle.run(fast, (given,)), [branches(model, weak, (x,), 1.5, given).detach()])
    assert attentions(fast.graph_module.graph) == (4 if before is chosen else 2)  # what chooses may draw: it runs twice
    if before is checked:
        with pytest.raises(RuntimeError, match="too large"):
            fast(1e3 * x)


def test_complex_outputs_are_pushed() -> None:
    model, x = Around(after=lambda x: torch.complex(x, 2 * x)), torch.randn(2, 12, 16)
    fast = attnopt.guidance(model, SoftPAG([1], 0.5), (x,), scale=1.5)
    want = branches(model, SoftPAG([1], 0.5), (x,), 1.5, x).detach()
    oracle.assert_same([torch.view_as_real(fast(x).detach())], [torch.view_as_real(want)])


def test_sites_are_those_of_the_weak_branch(tmp_path: Path) -> None:
    """Also after loading: the model's own weights have the names that those of the weak branch had."""
    model, x, weak = stack(), torch.randn(2, 12, 16), ScaleHeads({1: 0.5})
    fast = attnopt.guidance(model, {"layers.1": weak}, (x,), scale=2.0)
    fast.save(tmp_path / "saved")
    alone = attnopt.optimize(model, {"layers.1": weak}, (x,)).sites[1]
    for site in (fast.sites[1], attnopt.load(tmp_path / "saved").sites[1]):
        out, want = (s.parameters[str(s.projections["out"].weight)] for s in (site, alone))
        torch.testing.assert_close(out, want)
        assert not torch.equal(out, model.layers[1].o.weight)


@pytest.mark.filterwarnings("ignore:the model's own output contains NaN")
def test_the_report_is_of_both_branches() -> None:
    model, x = stack(), torch.randn(2, 12, 16)
    model.layers[0].q.bias.data[0] = math.nan
    with pytest.warns(attnopt.AttnoptWarning, match="NaN or infinities in the weights"):
        fast = attnopt.guidance(model, SoftPAG([1], 0.5), (x,), scale=2.0)
    assert any("NaN or infinities in the weights" in told for told in fast.report.warnings)
    assert {"capture", "match", "rewrite", "lower", "verify"} <= fast.report.seconds.keys()


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
    with pytest.raises(RewriteError, match="writes to its state or to an input"):
        attnopt.guidance(Counting(True), SoftPAG(), (x,), scale=1.0)
    for drawing in (Around(torch.nn.Dropout(0.5)), Around(after=lambda x: x + torch.randn_like(x))):
        with pytest.raises(RewriteError, match="draws random numbers") as refused:
            attnopt.guidance(drawing, SoftPAG(), (x,), scale=1.0)
        assert refused.value.hint == "put it in evaluation mode, or give it its noise as an input"
    with pytest.raises(PolicyError, match="scale=nan"):
        attnopt.guidance(stack(), SoftPAG(), (x,), scale=math.nan)
    with pytest.raises(PolicyError, match="example inputs"):
        attnopt.guidance(stack(), SoftPAG(), scale=1.0)
    with pytest.raises(RewriteError, match="soft-pag"):
        attnopt.guidance(stack(), SoftPAG([9]), (x,), scale=1.0, strict=True)
    with pytest.raises(RewriteError, match="ONNX file"):
        attnopt.guidance("model.onnx", SoftPAG(), (x,), scale=1.0)  # type: ignore[arg-type]


def test_an_exported_program_is_a_model() -> None:
    model, x = stack(), torch.randn(2, 12, 16)
    fast = attnopt.guidance(torch.export.export(model, (x,)), SoftPAG([1], 0.5), (x,), scale=2.0)
    oracle.assert_same(oracle.run(fast, (x,)), [branches(model, SoftPAG([1], 0.5), (x,), 2.0, x).detach()])


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
