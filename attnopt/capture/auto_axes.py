"""``dynamic_shapes="auto"``: as many axes as the model lets vary, by steps from all of them down to none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import ROOM, difference, tolerance
from attnopt.base.sizes import is_static
from attnopt.capture.dynamic_axes import Auto, asked_shapes, axes_of_leaves, named_arguments, without
from attnopt.capture.second_example import Place, longer_axes, repeated, seeded_outputs, unread_axes
from attnopt.capture.signature import check_inputs
from attnopt.capture.valid_sizes import cannot_vary
from attnopt.errors import AttnoptError, CaptureError
from attnopt.graph.nodes import input_axes, inputs_of

if TYPE_CHECKING:
    from attnopt.capture.program import Program

LONGEST = 6000  # characters of torch's size expressions with all axes dynamic: beyond, each operator takes seconds
Captured = Callable[[CallInputs, object, bool], "Program"]  # inputs, shapes, whether to stop when it becomes expensive


class TooManyRelationsError(Exception):
    """torch notes more about the sizes than anybody can read."""


class Limited(TorchFunctionMode):
    """Gives a capture up that finds no end of relations between sizes.  Counted, not timed: the same at every run."""

    def __init__(self) -> None:
        super().__init__()
        self._env: Any = None
        self._seen = self._length = 0

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if self._env is None:
            fake = next((x for x in args if isinstance(x, FakeTensor)), None)
            self._env = None if fake is None else fake.fake_mode.shape_env
        if self._env is not None and len(self._env.guards) > self._seen:
            self._length += sum(len(str(g.expr)) for g in self._env.guards[self._seen :])
            self._seen = len(self._env.guards)
            if self._length > LONGEST:
                raise TooManyRelationsError(f"{self._seen} relations between sizes")
        return func(*args, **(kwargs or {}))


def captured_with_own(
    model: nn.Module, inputs: CallInputs, shapes: object, is_cheap: bool, captured: Captured
) -> Program:
    """Captured with dynamic axes of length 1 too, if the model allows; the user's example must still fit."""
    asked = axes_of_leaves(model.forward, *inputs, shapes)
    longer, unread = longer_axes(model, inputs, asked), unread_axes(model, inputs, asked)
    while longer or unread:
        try:
            program = captured(repeated(inputs, longer | unread), shapes, is_cheap)
        except CaptureError:
            break
        if takes(program, model, inputs):
            return replace(program, own=inputs)
        stuck = longer & _static(program.module)
        unread = unread if longer else frozenset()
        longer = longer - stuck if stuck else frozenset()
    return captured(inputs, shapes, is_cheap)


def with_most_dynamic_axes(model: nn.Module, inputs: CallInputs, auto: Auto, captured: Captured) -> Program:
    """Raises CaptureError if the model cannot be captured even with all axes static."""
    every = axes_of_leaves(model.forward, *inputs, asked_shapes(model, *inputs, Auto()))
    if auto.axes is None and (program := _with_every_axis(model, inputs, captured)) is not None:
        return replace(program, narrower=Auto(2))
    first = 2 if auto.axes is None else auto.axes
    fixed: Program | None = None
    for axes in range(first, 0, -1):
        try:
            shapes = asked_shapes(model, *inputs, Auto(axes))
            program = captured_with_own(model, inputs, shapes, False, captured)
            return replace(program.told(every), narrower=Auto(axes - 1))
        except CaptureError:
            fixed = fixed or captured(inputs, None, False)  # which reports the reason if that fails too
    return (fixed or captured(inputs, None, False)).told(every)


def _with_every_axis(model: nn.Module, inputs: CallInputs, captured: Captured) -> Program | None:
    """None if more than the first two axes of a tensor cannot be dynamic, or only at the expense of these."""
    shapes = asked_shapes(model, *inputs, Auto())
    asked = axes_of_leaves(model.forward, *inputs, shapes)
    try:
        program = captured_with_own(model, inputs, shapes, True, captured)
        stuck = cannot_vary(program)
        if not stuck:
            return program
        numbers = {place: number for number, (place, _) in enumerate(program.outside)}
        if any(axis < 2 or place not in numbers for place, axis in stuck):
            return None
        named, _ = named_arguments(model.forward, *inputs)
        fewer = without(shapes, named, {(numbers[place], axis) for place, axis in stuck})
        program = captured_with_own(model, inputs, fewer, True, captured)
        return None if cannot_vary(program) else program.told(asked)
    except AttnoptError:
        return None


def _static(module: fx.GraphModule) -> set[Place]:
    return {(i, axis) for i, _, axis, size in input_axes(inputs_of(module.graph)) if is_static(size)}


def takes(program: Program, model: nn.Module, own: CallInputs) -> bool:
    """The graph of another example is valid for the user's, too."""
    try:
        check_inputs(program.module, *own)
        got, want = (seeded_outputs(m, own) for m in (program.module, model))
        return difference(got, want) <= ROOM * tolerance(want)
    except Exception:
        return False
