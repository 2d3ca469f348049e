"""Verification of a converted model: its outputs, and its decoding compared with the original model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import ROOM, difference, tolerance
from attnopt.capture.run_unchanged import outputs_of
from attnopt.compiler.resized_inputs import resized
from attnopt.conversion.decoding_check import decoding_error
from attnopt.conversion.partial_capture import Part
from attnopt.errors import AttnoptError


class Decoding:
    """A converted model must decode from its cache as well as the original does."""

    def __init__(self, model: nn.Module, inputs: CallInputs) -> None:
        self.inputs = inputs
        self.allowed = ROOM * tolerance([p for p in model.parameters() if p.is_floating_point()])
        before = decoding_error(model, inputs)
        self.matters = before is not None and before <= self.allowed

    def works(self, model: nn.Module) -> bool:
        if not self.matters:
            return True
        after = decoding_error(model, self.inputs)
        return after is not None and after <= self.allowed


class Judge:
    """Compares models with graphs of their parts, on the example inputs and at another size if a graph allows it,
    and reads the example text token by token."""

    def __init__(self, graphs: Sequence[tuple[Part, fx.GraphModule]], decoding: Decoding) -> None:
        self.decoding = decoding
        self.wanted = [(part, inputs, wanted) for part, graph in graphs for inputs, wanted in _answers(part, graph)]

    def agrees(self, model: nn.Module) -> bool:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                for part, inputs, wanted in self.wanted:
                    if not difference(outputs_of(part.of(model), inputs), wanted) <= ROOM * tolerance(wanted):
                        return False
                return self.decoding.works(model)
            except AttnoptError:
                raise
            except Exception:  # numbers of heads that do not fit the weights fail in many ways
                return False


def _answers(part: Part, graph: fx.GraphModule) -> Iterator[tuple[CallInputs, list[Tensor]]]:
    program, found = part.made.program, 0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for inputs in (*program.examples, *resized(program.module, program.inputs, program.fixed_axes)):
            try:
                yield inputs, outputs_of(graph, inputs)
            except Exception:
                if not found:
                    raise
                continue  # a size that the graph has no room for
            found += 1
            if found == 2:
                return
