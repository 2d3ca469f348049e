"""One capture for all optimizations of a model in a test file: most of what an optimization of a small model takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.capture import capture as capturing
from attnopt.capture.program import Program
from attnopt.graph.copies import copy_program
from attnopt.graph.nodes import written


@contextmanager
def captured_once() -> Iterator[None]:
    """Inside, a model is captured once for the same inputs at fixed sizes; every later capture gets a copy of the graph.

    Not where sizes may vary (what is learned of a symbol belongs to one graph), nor where the graph writes its own state.
    """
    known: dict[object, tuple[Program, object]] = {}
    real = capturing._captured

    def once(model: nn.Module, is_auto: bool, inputs: Any, shapes: Any, is_cheap: bool) -> Program:
        if shapes is not None:
            return real(model, is_auto, inputs, shapes, is_cheap)
        key = (*_state(model), *_marks(inputs))
        if key not in known:
            program = real(model, is_auto, inputs, shapes, is_cheap)
            if written(program.module):
                return program
            known[key] = (program, (model, inputs))  # held, so that no other object gets their ids
        program, _ = known[key]
        return replace(program, module=copy_program(program.module)[0])

    with mock.patch.object(capturing, "_captured", once):
        yield


def _state(model: nn.Module) -> Iterator[object]:
    """Everything that a capture looks at: what is in a model by its identity, plain attributes by value."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield name, id(module), repr({k: v for k, v in vars(module).items() if _is_plain(v)})
        yield from ((k, id(t)) for k, t in (*module._parameters.items(), *module._buffers.items()))


def _marks(inputs: Any) -> Iterator[object]:
    leaves, form = pytree.tree_flatten(inputs)
    yield str(form)
    for leaf in leaves:
        yield (id(leaf), leaf._version) if isinstance(leaf, Tensor) else leaf if _is_plain(leaf) else id(leaf)


def _is_plain(leaf: object) -> bool:
    return leaf is None or isinstance(leaf, (bool, int, float, str))
