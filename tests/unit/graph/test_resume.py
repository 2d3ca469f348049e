"""The rest of a graph with other values of a node: the same as running the whole, and no more is computed than depends on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_same
from torch import Tensor, fx, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.compiler.head_sweep import agree
from attnopt.graph import resume
from attnopt.graph.nodes import is_call
from attnopt.graph.ops import aten
from attnopt.graph.resume import Call, Part, Stacker, stacked


class Two(nn.Module):
    """A chain of layers, and another one of the same input that the chain's end is multiplied with."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.chain, self.beside = (nn.ModuleList(nn.Linear(3, 3) for _ in range(layers)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.chain:
            x = layer(x).tanh()
        for layer in self.beside:
            y = layer(y).sigmoid()
        return x * y


@pytest.fixture
def graph() -> tuple[fx.GraphModule, Tensor]:
    x = torch.randn(2, 3)
    return capture(Two(), CallInputs((x,), {})).module, x


def calls_of(gm: fx.GraphModule, operator: Any) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if is_call(n, operator)]


def ends(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in torch.utils._pytree.tree_leaves(gm.graph.output_node().args) if isinstance(n, fx.Node)]


def test_the_rest_is_that_of_the_whole(graph: tuple[fx.GraphModule, Tensor]) -> None:
    gm, x = graph
    for place, node in enumerate(calls_of(gm, aten.tanh.default)):
        part, call = Part(gm.graph, [node], ends(gm)), Call(gm, (x,), [node], ends(gm))
        call.up_to(node)
        assert_same(part.run(call.around(part), [call(node)]), [gm(x)])
        other = torch.randn(2, 3)
        rest = other
        for layer in list(gm.chain.children())[place + 1 :]:
            rest = layer_of(layer, rest)
        (got,) = part.run(call.around(part), [other])
        y = x
        for layer in gm.beside.children():
            y = (y @ layer.weight.T + layer.bias).sigmoid()
        assert_same([got], [rest * y])


def layer_of(layer: Any, x: Tensor) -> Tensor:
    return (x @ layer.weight.T + layer.bias).tanh()


def test_what_does_not_depend_on_it_is_computed_once(
    graph: tuple[fx.GraphModule, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, x = graph
    first, *_ = calls_of(gm, aten.tanh.default)
    part, call = Part(gm.graph, [first], ends(gm)), Call(gm, (x,), [first], ends(gm))
    assert not {*part.nodes} & {*calls_of(gm, aten.sigmoid.default)}
    call.up_to(first)
    call(first)
    around = call.around(part)
    seen: list[fx.Node] = []
    real = resume.run_call
    monkeypatch.setattr(resume, "run_call", lambda node, *given: (seen.append(node), real(node, *given))[1])
    for _ in range(3):
        part.run(around, [torch.randn(2, 3)])
    assert len(seen) == 3 * len(part.nodes) == 3 * (2 * 3 + 1)


def test_what_is_held_stops_the_change(graph: tuple[fx.GraphModule, Tensor]) -> None:
    gm, x = graph
    first, second, third, last = calls_of(gm, aten.tanh.default)
    part = Part(gm.graph, [first], ends(gm), [third])
    assert not part.is_reached
    assert part.nodes == []
    part = Part(gm.graph, [second], [third, last], [last])
    assert part.is_reached
    call = Call(gm, (x,), [second], ends(gm))
    call.up_to(second)
    call(second)
    held = torch.randn(2, 3)
    got = part.run(call.around(part, {last: held}), [torch.zeros(2, 3)])
    assert_same(got[1:], [held])
    assert_same(got[:1], [layer_of([*gm.chain.children()][2], torch.zeros(2, 3)).expand(2, 3)])


def test_values_die_after_their_last_use(graph: tuple[fx.GraphModule, Tensor]) -> None:
    gm, _ = graph
    first, *_ = calls_of(gm, aten.tanh.default)
    part = Part(gm.graph, [first], ends(gm))
    dead = [n for nodes in part.dying.values() for n in nodes]
    assert sorted(map(str, dead)) == sorted(str(n) for n in [first, *part.nodes] if n not in ends(gm))


def test_stacks_and_single_runs(graph: tuple[fx.GraphModule, Tensor]) -> None:
    gm, x = graph
    first, *_ = calls_of(gm, aten.tanh.default)
    part, call = Part(gm.graph, [first], ends(gm)), Call(gm, (x,), [first], ends(gm))
    call.up_to(first)
    call(first)
    around, given = call.around(part), [(torch.randn(2, 3),) for _ in range(7)]
    want = [part.run(around, one)[0] for one in given]
    for at_once in (1, 2, 3, 7, 100):
        got = [found for (found,) in Stacker(agree).each(part, around, iter(given), at_once)]
        assert_same(got, want)
    assert_same([found for (found,) in stacked(part, around, given)], want)
    assert list(Stacker(agree).each(part, around, iter(()), 3)) == []


def test_a_stack_that_differs_is_not_used(
    graph: tuple[fx.GraphModule, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    gm, x = graph
    first, *_ = calls_of(gm, aten.tanh.default)
    part, call = Part(gm.graph, [first], ends(gm)), Call(gm, (x,), [first], ends(gm))
    call.up_to(first)
    call(first)
    around, given = call.around(part), [(torch.randn(2, 3),) for _ in range(4)]
    want = [part.run(around, one)[0] for one in given]
    monkeypatch.setattr(resume, "stacked", lambda part, around, given: [[torch.zeros(2, 3)] for _ in given])
    stacker = Stacker(agree)
    assert_same([found for (found,) in stacker.each(part, around, iter(given), 2)], want)
    assert not stacker.is_able
