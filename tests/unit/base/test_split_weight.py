"""Weights that are gathered where they are read, here from one process, which counts."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
from parallel_models import VOCABULARY, Model, Style, inputs, model
from torch import Tensor, nn

import attnopt
from attnopt.base.call_inputs import CallInputs
from attnopt.base.split_weight import Part, SplitWeight, has_split, keeping_whole, split_like
from attnopt.capture.capture import capture
from attnopt.capture.stand_ins import StandIns
from attnopt.compiler.compile import compiled
from attnopt.compiler.job import Options
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.errors import CaptureError
from attnopt.match.find import find
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads

STYLES = (
    Style(kv_heads=2, rope=True, padding=True, layers=1),
    Style(causal=False, relative=True, layers=1),
    Style(alibi=True, sinks=True, layers=1),
)


@dataclass(frozen=True, eq=False)
class Here(Part):
    held: Tensor
    name: str = ""
    asked: Counter[str] = field(default_factory=Counter)

    @property
    def form(self) -> Tensor:
        return self.held

    def gather(self) -> Tensor:
        self.asked[self.name] += 1
        return self.held.clone()

    def of(self, x: Tensor) -> Here:
        return replace(self, held=x.detach(), name=f"new {self.name}")


def split(user: nn.Module) -> tuple[nn.Module, Counter[str]]:
    """The model with split weights, and how often each is gathered."""
    asked: Counter[str] = Counter()
    for name, p in list(user.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        part = Here(p.detach(), name, asked)
        user.get_submodule(owner)._parameters[leaf] = nn.Parameter(SplitWeight(part), p.requires_grad)
    return user, asked


def batches(count: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (6, 12), generator=random) for _ in range(count)]


@pytest.mark.parametrize("style", STYLES, ids=["grouped", "relative", "sinks"])
def test_results_are_those_of_whole_weights(style: Style) -> None:
    given, policy = inputs(style, 12), [LocalWindow(left=4), PruneHeads(heads=[1])]
    whole = attnopt.optimize(model(style), policy, given)
    fast = attnopt.optimize(split(model(style))[0], policy, given)
    assert has_split(fast)
    assert not any(type(p) is nn.Parameter for p in fast.parameters()), "new weights are split, too"
    with torch.no_grad():
        torch.testing.assert_close(fast(*given), whole(*given))


@pytest.mark.slow
def test_fits_are_those_of_whole_weights() -> None:
    given = (batches(1)[0],)
    style = Style(layers=1)
    for policy in (PruneHeads(0.5), GroupedQuery(2)):
        whole, parted = (
            compiled(user, policy, CallInputs(given, {}), [CallInputs((b,), {}) for b in batches(3)], Options(), None)
            for user in (model(style), split(model(style))[0])
        )
        edits = [e for d in parted.decisions if d.plan is not None for e in d.plan.edits]
        assert edits
        assert all(isinstance(e.weight, SplitWeight) for e in edits), "whole ones of all sites would be held"
        with torch.no_grad():
            torch.testing.assert_close(parted.module(*given), whole.module(*given))


def test_all_batches_share_what_is_gathered_for_a_layer() -> None:
    found: list[Counter[str]] = []
    for count in (1, 5):
        user, asked = split(model(Style()))
        program = capture(user, CallInputs((batches(1)[0],), {}))
        findings = find(program)
        asked.clear()
        for _ in Stream(program.module, findings.found, [CallInputs((b,), {}) for b in batches(count)]).sites():
            pass
        found.append(Counter(asked))
    assert found[0] == found[1]
    assert found[0]["mlps.0.0.weight"] == 1
    assert not found[0]["mlps.1.0.weight"], "nothing reads it before the last attention"


def test_form_is_read_without_gathering() -> None:
    asked: Counter[str] = Counter()
    w = nn.Parameter(SplitWeight(Here(torch.randn(3, 5), "w", asked)))
    assert (w.shape, w.dtype, w.nbytes, w.requires_grad, w.device.type) == ((3, 5), torch.float32, 60, True, "cpu")
    assert isinstance(w.detach(), SplitWeight)
    assert "(3, 5)" in repr(w)
    assert not asked
    with pytest.raises(RuntimeError, match="deepcopy"):  # which would be whole
        copy.deepcopy(w)
    asked.clear()
    with torch.no_grad(), keeping_whole():
        made = torch.randn(2, 5) @ w.detach().T + w.sum(1)
    assert type(made) is Tensor
    assert asked["w"] == 1
    assert type(w.detach() + 1) is Tensor
    assert asked["w"] == 2
    plain = torch.ones(2)
    assert split_like(plain, plain) is plain
    assert isinstance(split_like(plain, w), SplitWeight)


def test_a_weight_that_tracing_copied_is_refused() -> None:
    stand_ins, user = StandIns(), nn.Linear(3, 5)
    split(user)
    weight, bias = user.weight, user.bias
    traced = stand_ins.placed(user)
    assert traced.weight.untyped_storage().size() == 0
    stand_ins.restore(traced)
    assert user.weight is weight
    assert user.bias is bias
    stand_ins.placed(user)
    user.register_buffer("other", user.weight.detach())
    with pytest.raises(CaptureError, match="tracing copied other, which is split"):
        stand_ins.restore(user)


def test_the_user_keeps_split_weights() -> None:
    user, _ = split(model(Style(layers=1)))
    before = dict(user.named_parameters())
    fast = attnopt.optimize(user, "fuse", (batches(1)[0],))
    assert isinstance(user, Model)
    assert all(p is before[name] for name, p in user.named_parameters())
    assert fast.graph_module.get_parameter("mlps.0.0.weight") is before["mlps.0.0.weight"]
