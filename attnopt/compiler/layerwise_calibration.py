"""Calibration batches on their way through a captured graph, from one attention to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.base.call_inputs import CallInputs
from attnopt.base.progress import watched
from attnopt.errors import CalibrationError
from attnopt.graph.interpreter import Forward, Interpreter, Schedule
from attnopt.ir.activations import Activations, withheld
from attnopt.ir.edited_parameters import edited_parameters
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.operands import OperandTensors
from attnopt.ir.peers import Peers
from attnopt.match.find import Found
from attnopt.match.prove import example_values

Values = dict[fx.Node, object]


class Stream:
    """All batches run together up to one attention, which is processed, then up to the next.

    The model runs once.  Of each batch only those values are kept that something later still reads, so the memory is that
    of one layer, regardless of model depth.  ``peers``: who have other batches.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        found: Sequence[Found],
        batches: Sequence[CallInputs],
        invented: Sequence[CallInputs] = (),
        peers: Peers | None = None,
    ) -> None:
        self.gm, self.batches, self.invented, self.peers = gm, batches, invented, peers
        self.schedule = Schedule(gm.graph, {f.raised.node: _read_by(f) for f in found})
        self.found = sorted(found, key=lambda f: self.schedule.place[f.raised.node])

    def sites(self) -> Iterator[tuple[Found, Activations]]:
        """Each site in execution order with its activations on the batches; their inputs
        live as long as the activations."""
        runs, others = ([self._run(batch) for batch in some] for some in (self.batches, self.invented))
        for f in watched(self.found, "calibrating one attention after another"):
            for run in (*runs, *others):
                run.up_to(f.raised.node)
            activations = self._activations(f, [run.values for run in runs])
            invented = self._activations(f, [run.values for run in others]) if self.invented else None
            yield f, replace(activations, invented=invented)

    def _run(self, batch: CallInputs) -> Forward:
        return Forward(self.gm, example_values(self.gm, *batch), self.schedule)

    def _activations(self, f: Found, environments: Sequence[Values]) -> Activations:
        read = _read_by(f)
        kept = [{n: values[n] for n in read if n in values} for values in environments]

        def operands(values: Values, new: Mapping[str, Tensor]) -> OperandTensors:
            t = f.raised.operands.map(lambda role, operand: self._anew(operand, f.dirty.get(role, ()), values, new))
            given = (t.q, t.k, t.v, t.bias, t.mask, t.sinks)
            return OperandTensors(*given, keep=t.keep, added=t.added, is_cross=f.site.is_cross)

        def compute(edits: Sequence[HeadWeights], first_alone: bool = False) -> list[OperandTensors]:
            new = edited_parameters(f.site, [e for e in edits if e.role != "out"])
            with torch.no_grad():
                return [operands(values, new) for values in kept[: 1 if first_alone else None]]

        found = compute(())
        for i, o in enumerate(found):
            if not all(bool(torch.isfinite(t).all()) for t in (o.q, o.k, o.v)):
                raise CalibrationError(
                    f"queries, keys or values are not finite on calibration batch {i}",
                    site=f.site.name,
                    hint="remove that batch, or fix the weights of the model",
                )
        made = Activations(f.site, tuple(found), compute)
        return made if self.peers is None else withheld(made, self.peers)

    def _anew(
        self, node: fx.Node, dirty: Sequence[fx.Node], values: Mapping[fx.Node, Any], new: Mapping[str, Tensor]
    ) -> Tensor:
        """The value of ``node`` with the parameters ``new``."""
        reached: set[fx.Node] = set()
        for n in sorted(_with_pieces(dirty), key=self.schedule.place.__getitem__):
            if str(n.target) in new if n.op == "get_attr" else reached & set(n.all_input_nodes):
                reached.add(n)
        if node not in reached:
            found: Tensor = values[node]
            return found
        known = {n: x for n, x in values.items() if n not in reached}
        result: Tensor = Interpreter(self.gm, known | {n: new[str(n.target)] for n in reached if n.op == "get_attr"})(
            node
        )
        return result


def _with_pieces(dirty: Sequence[fx.Node]) -> set[fx.Node]:
    """And what stands between two of them, as the list of pieces of a packed projection does."""
    known = set(dirty)
    return known | {above for n in dirty for above in n.all_input_nodes if known.intersection(above.all_input_nodes)}


def _read_by(f: Found) -> set[fx.Node]:
    """The inputs of the site's operands, with its own or other weights."""
    return {
        *f.raised.node.all_input_nodes,
        *(i for nodes in f.dirty.values() for n in nodes for i in n.all_input_nodes),
    }
