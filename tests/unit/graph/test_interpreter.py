"""The one interpreter: on demand, with values given, and in the graph's order with the memory of what is still read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_same
from torch import Tensor, fx, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.graph.interpreter import COMPUTED, Forward, Interpreter, Schedule
from attnopt.graph.nodes import is_call
from attnopt.graph.ops import aten
from attnopt.graph.record import recorded


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        for layer in self.layers:
            x = layer(x).tanh()
        return x + self.count


@pytest.fixture
def graph() -> tuple[fx.GraphModule, Tensor]:
    x = torch.randn(2, 3)
    return capture(Layers(), CallInputs((x,), {})).module, x


def inputs(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def tanhs(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if is_call(n, aten.tanh.default)]


def test_values_are_computed_once_and_on_demand(graph: tuple[fx.GraphModule, Tensor]) -> None:
    gm, x = graph
    calls: list[str] = []

    class Counting(Interpreter):
        def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append(node.name)
            return super().call(node, args, kwargs)

    first, second, *_ = tanhs(gm)
    run = Counting(gm, dict(zip(inputs(gm), [x], strict=True)))
    run(second)
    assert len(calls) == 4  # two layers
    assert run(first) is run(first)
    assert len(calls) == 4


def test_a_leaf_is_given(graph: tuple[fx.GraphModule, Tensor]) -> None:
    gm, _ = graph
    first, second, *_ = tanhs(gm)

    class From(Interpreter):
        def leaf(self, node: fx.Node) -> Any:
            return torch.ones(2, 3) if node is first else super().leaf(node) if node.op == "get_attr" else COMPUTED

    layer = gm.get_submodule("layers.1")
    assert_same([From(gm)(second)], [torch.nn.functional.linear(torch.ones(2, 3), layer.weight, layer.bias).tanh()])


def test_an_input_that_is_not_given_is_named(graph: tuple[fx.GraphModule, Tensor]) -> None:
    gm, _ = graph
    with pytest.raises(ValueError, match="depends on the input x"):
        Interpreter(gm)(tanhs(gm)[0])


def test_the_memory_is_that_of_what_is_still_read(graph: tuple[fx.GraphModule, Tensor]) -> None:
    gm, x = graph
    stops = tanhs(gm)
    run = Forward(
        gm, dict(zip(inputs(gm), [x], strict=True)), Schedule(gm.graph, {n: n.all_input_nodes for n in stops})
    )
    for stop in run.schedule.stops:
        run.up_to(stop)
        made = {n for n in run.values if n.op == "call_function"}
        assert made == set(stop.all_input_nodes)
    assert_same([run(stops[-1])], [recorded(gm, stops, (x,))[stops[-1]]])


def test_recording_writes_no_state(graph: tuple[fx.GraphModule, Tensor]) -> None:
    gm, x = graph
    before = {name: b.clone() for name, b in gm.named_buffers()}
    (end,) = [n for n in gm.graph.nodes if n.op == "output"]
    (result,) = end.all_input_nodes[-1:]
    recorded(gm, {result}, (x,))
    assert before
    assert_same(list(dict(gm.named_buffers()).values()), list(before.values()))
