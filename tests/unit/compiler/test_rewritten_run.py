"""Attentions that are others where they stand in the captured graph compute what the lowered model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stacks import batches, stack
from torch import Tensor, nn
from torch.nn import functional as F

from attnopt import Budget, Choice
from attnopt.base.call_inputs import CallInputs
from attnopt.capture.calibration import Calibration
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, ScaleHeads
from attnopt.policy_search.outputs import Candidate
from attnopt.policy_search.problem import Problem, Task, problem

DATA = batches(4, 4)


class Packed(nn.Module):
    """Packed projections, SDPA, a bias by position, and a sum before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.ModuleList(), nn.ModuleList()
        for _ in range(3):
            self.qkv.append(nn.Linear(16, 48))
            self.out.append(nn.Linear(16, 16, bias=False))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        bias = -(at[:, None] - at).abs().float() * torch.tensor([0.1, 0.5, 0.0, 1.0])[:, None, None]
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
            o = F.scaled_dot_product_attention(2 * q, k, v, attn_mask=bias)
            x = self.norm(x + out(o.transpose(1, 2).flatten(2)))
        return x


class ByEinsum(nn.Module):
    """Weights [H, E, D], einsum throughout, and keys of pairs of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = (nn.Parameter(torch.randn(2, 4, 16, 4) / 2) for _ in range(2))
        self.k, self.v = (nn.Parameter(torch.randn(2, 2, 16, 4) / 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for wq, wk, wv, wo in zip(self.q, self.k, self.v, self.out, strict=True):
            q = torch.einsum("ble,hed->bhld", x, wq)
            k, v = (torch.einsum("ble,hed->bhld", x, w).repeat_interleave(2, 1) for w in (wk, wv))
            weights = torch.einsum("bhld,bhsd->bhls", q, k).softmax(-1)
            x = x + torch.einsum("bhld,hed->ble", torch.einsum("bhls,bhsd->bhld", weights, v), wo)
        return x


MODELS = {"packed": Packed, "einsum": ByEinsum, "stack": lambda: stack(3)}


def asked(model: nn.Module, dynamic_shapes: Any = None) -> Problem:
    alternatives = [
        None,
        LocalWindow(2, sinks=1),
        PruneHeads(heads=[1, 2]),
        ScaleHeads([1, 0.5, 2, 0]),
        GroupedQuery(1),
    ]
    more = [[PruneHeads(0.5, budget="site"), LocalWindow(1, heads=[0, 3])]]
    task = Task(
        model, Choice(*alternatives, *more), CallInputs((DATA[0],), {}), Calibration.of(DATA), Budget(flops=0.9),
        divergence="cosine", dynamic_shapes=dynamic_shapes,
    )  # fmt: skip
    return problem(task)


@pytest.mark.parametrize("name", [pytest.param("packed", marks=pytest.mark.slow), "einsum", "stack"])
def test_it_computes_what_the_lowered_model_does(name: str) -> None:
    torch.manual_seed(0)
    of = asked(MODELS[name]().eval())
    places, count = of.menu.places, len(of.made.places[0].alternatives)
    assert count >= 4
    tried = [tuple((a + u) % count for u in range(places)) for a in range(count)] + [(0,) * places]
    changed, known = set[float](), dict[Candidate, Tensor]()
    for picks in (*tried, *reversed(tried)):  # from runs that are kept, too
        for refit in (None, 0) if of.refits is not None else (None,):
            candidate = Candidate(picks, refit)
            if candidate not in known:
                known[candidate] = of.outputs.model(candidate)(DATA[-1]).detach()
            torch.testing.assert_close(of.outputs.output(candidate, 0), known[candidate], rtol=1e-4, atol=1e-4)
            changed.add(round(float(known[candidate].double().cos().sum()), 5))
            if refit is not None and not any(picks):  # nothing changes where nothing was changed
                assert all(d.plan is None or not d.plan.edits for d in of.outputs.decisions(candidate))
    assert len(changed) >= len({*tried})


def test_what_comes_before_the_first_difference_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.graph import interpreter

    of, seen, below = asked(stack(3)), list[str](), interpreter.run_call
    for picks in ((0, 0, 0), (0, 1, 0)):
        of.outputs.output(Candidate(picks), 0)

    def run(node: Any, args: Any, kwargs: Any) -> Any:
        seen.append(node.name)
        return below(node, args, kwargs)

    monkeypatch.setattr(interpreter, "run_call", run)
    of.outputs.output(Candidate((0, 1, 1)), 0)
    last = sum("linear" in name for name in seen)
    seen.clear()
    of.outputs.output(Candidate((2, 1, 1)), 0)
    assert 1 <= last <= 4  # the last output projection, and at most the projections of that layer
    assert sum("linear" in name for name in seen) > 2 * 4


def test_little_room_keeps_fewer_runs_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.policy_search import in_place

    wanted, order = list[Tensor](), [(0, 0, 0), (0, 2, 1), (0, 2, 3), (1, 2, 3)]
    for held in (in_place.HELD, 100_000, 1):
        monkeypatch.setattr(in_place, "HELD", held)
        of = asked(stack(3))
        got = torch.stack([of.outputs.output(Candidate(picks), 0) for picks in order])
        wanted.append(got)
        kept = sum(len(t.states) for t in of.outputs.in_place.trails[0])
        assert (kept == 0) == (held == 1)
    assert torch.equal(wanted[0], wanted[1])
    assert torch.equal(wanted[0], wanted[2])


def test_new_weights_reach_what_lies_behind_an_operator_of_several_tensors() -> None:
    """Queries, keys and values of one packed projection, taken apart by ``unbind``: fits saw the old ones."""
    from attnopt.compiler.analyze import analyze_in_eval
    from attnopt.compiler.layerwise_calibration import Stream
    from attnopt.ir.head_weights import HeadWeights

    model, inputs = Packed().eval(), CallInputs((DATA[0],), {})
    analyzed = analyze_in_eval(model, inputs)
    first = analyzed.findings.found[0]
    (_, activations), *_ = Stream(analyzed.program.module, [first], [inputs]).sites()
    edited = activations.edited([HeadWeights("k", 1, torch.zeros(4, 16), torch.arange(4.0))]).batches[0]
    before = activations.batches[0]
    assert torch.equal(edited.k[:, 1], torch.arange(4.0).expand_as(edited.k[:, 1]))
    assert torch.equal(edited.k[:, [0, 2, 3]], before.k[:, [0, 2, 3]])
    assert torch.equal(edited.q, before.q)
    assert torch.equal(edited.v, before.v)
