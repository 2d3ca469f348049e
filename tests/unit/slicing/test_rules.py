"""Each rule is an exact identity: a selection before an operator gives what it gives after it, and zeros before it stay away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same
from torch import Tensor, fx, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.graph.emitter import Emitter
from attnopt.graph.interpreter import Interpreter
from attnopt.slicing.pull import pull
from attnopt.slicing.push import push
from attnopt.slicing.selector import Selector

Layout = Callable[[Tensor], Tensor]

# Of [2, 4, 6]: the operator, and an axis and indices of its result whose selection has a rule.
PULLED: dict[str, tuple[Layout, int, tuple[int, ...]]] = {
    "reshape": (lambda x: x.reshape(2, 2, 2, 6), 1, (1,)),
    "permute": (lambda x: x.permute(2, 0, 1), 0, (0, 5)),
    "mT": (lambda x: x.mT, 1, (1, 3, 4)),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), 2, (2, 0)),
    "detach": (lambda x: x.detach(), 2, (0, 3)),
    "cast": (lambda x: x.to(torch.float64), 1, (3,)),
    "expand": (lambda x: x[:, :1].expand(2, 3, 6), 2, (1, 2)),
    "select": (lambda x: x[:, 1], 1, (0, 4)),
    "slice": (lambda x: x[:, 1:, 2:], 2, (1, 3)),
    "chunk": (lambda x: x.chunk(2, 2)[1], 2, (2,)),
    "unbind": (lambda x: x.unbind(1)[2], 1, (0, 2)),
    "cat": (lambda x: torch.cat([x, x * 2], 2), 2, (1, 8)),
    "stack": (lambda x: torch.stack([x, -x], 1), 1, (1,)),
    "repeat": (lambda x: x.repeat(1, 2, 1), 1, (0, 5)),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), 1, (2, 7)),
    "roll": (lambda x: x.roll(1, 2), 1, (0, 2)),
    "flip": (lambda x: x.flip(2), 1, (0, 2)),
    "pad": (lambda x: F.pad(x, (1, 0)), 1, (3,)),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2)))), 1, (2,)),
    "reduction": (lambda x: x.amin(2, keepdim=True), 1, (1, 2)),
    "softmax": (lambda x: x.softmax(2), 1, (1, 2)),
    "log_softmax": (lambda x: x.log_softmax(2), 1, (1, 2)),
    "erf": (torch.erf, 2, (5,)),
    "mish": (F.mish, 2, (5,)),
    "hardswish": (F.hardswish, 1, (1,)),
    "atan2": (lambda x: torch.atan2(x, x[:, :1]), 1, (0, 3)),
    "clamp by a tensor": (lambda x: torch.clamp(x, x[:, :, :1]), 2, (0, 3)),
    "lerp": (lambda x: torch.lerp(x, x * x, 0.3), 2, (0, 3)),
}


def program(layout: Layout) -> tuple[fx.GraphModule, fx.Node, fx.Node, Tensor]:
    """The graph, its input, what it returns, and a value of the input."""

    class Made(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return layout(x)

    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    gm = capture(Made(), CallInputs((x,), {})).module
    given, *_, end = gm.graph.nodes
    result = end.args[0]
    return gm, given, result[0] if isinstance(result, (tuple, list)) else result, x


@pytest.mark.parametrize("name", PULLED)
def test_a_selection_moves_up(name: str) -> None:
    layout, axis, places = PULLED[name]
    gm, given, node, x = program(layout)
    assert pull(node, {axis: places}) is not None
    end = next(iter(reversed(gm.graph.nodes)))
    made = Selector(Emitter(gm.graph, end), None).select(node, {axis: places})
    got = Interpreter(gm, {given: x})(made)
    assert_same([got], [layout(x).index_select(axis, torch.tensor(places))], name)


# Zeros along an axis of [2, 4, 6], and whether a factor may move past the operator, too.
PUSHED: dict[str, tuple[Layout, int, bool]] = {
    "reshape": (lambda x: x.reshape(2, 4, 2, 3), 1, True),
    "mT": (lambda x: x.mT, 1, True),
    "squeeze": (lambda x: x[:1].squeeze(0).reshape(1, 4, 6), 1, True),
    "cast": (lambda x: x.to(torch.float64), 2, True),
    "detach": (lambda x: x.detach(), 2, True),
    "neg": (torch.neg, 1, True),
    "erf": (torch.erf, 1, False),
    "leaky_relu": (F.leaky_relu, 1, False),
    "scaled": (lambda x: x / 3, 1, True),
    "product": (lambda x: x * torch.arange(6.0), 2, True),
    "linear": (lambda x: F.linear(x, torch.arange(18.0).reshape(3, 6)), 2, True),
}


@pytest.mark.parametrize("name", PUSHED)
def test_zeros_move_down(name: str) -> None:
    layout, axis, linear = PUSHED[name]
    gm, given, _, x = program(layout)
    kept = torch.tensor((0, 3))
    user, *_ = [n for n in given.users if n.op == "call_function"]
    zeroed = torch.zeros_like(x).index_copy(axis, kept, x.index_select(axis, kept))
    pushed = push(user, given, {axis: (0, 3)})
    assert pushed is not None
    assert pushed.linear is linear
    end = next(iter(reversed(gm.graph.nodes)))
    emit = Emitter(gm.graph, end)
    select = Selector(emit, None)
    smaller = select.select(given, {axis: (0, 3)})
    target, args, kwargs = pushed.build(smaller, [select.select(n, s) for n, s in pushed.demands])
    run = Interpreter(gm, {given: x})
    want = Interpreter(gm, {given: zeroed})(user)
    for a, places in (pushed.selection or {}).items():
        want = want.index_select(a, torch.tensor(places))
    assert_same([run(emit.call(target, *args, **kwargs))], [want], name)


def test_a_division_that_rounds_is_no_factor() -> None:
    _, given, node, _ = program(lambda x: torch.div(x, 2.0, rounding_mode="floor"))
    assert push(node, given, {1: (0, 3)}) is None


def test_numbers_read_from_the_same_bytes_stop_a_selection() -> None:
    """``x.view(dtype)`` shares no more than its name with ``x.view(sizes)``."""
    _, _, node, _ = program(lambda x: x.view(torch.int32))
    assert pull(node, {1: (0,)}) is None
