"""Calibration batches on their way through a captured graph, from one attention to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.base.progress import watched
from attnopt.capture.calibration import Inputs
from attnopt.errors import CalibrationError
from attnopt.graph.nodes import ancestors, get_attr, run_call
from attnopt.ir.activations import Activations
from attnopt.ir.edited_parameters import edited_parameters
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.operands import ROLES, Operands
from attnopt.match.find import Found
from attnopt.match.prove import example_values

Values = dict[fx.Node, Any]


class Stream:
    """All batches run together up to one attention, which is processed, then up to the next.

    The model runs once.  Of each batch only those values are kept that something later still reads, so the memory is that
    of one layer, regardless of model depth.
    """

    def __init__(self, gm: fx.GraphModule, found: Sequence[Found], batches: Sequence[Inputs]) -> None:
        self.gm, self.batches = gm, batches
        self.nodes: list[fx.Node] = list(gm.graph.nodes)
        self.place = {n: i for i, n in enumerate(self.nodes)}
        self.found = sorted(found, key=lambda f: self.place[f.raised.node])
        self.last_use = self._last_use()
        self.dying: dict[int, list[fx.Node]] = {}
        for n, last in self.last_use.items():
            self.dying.setdefault(last, []).append(n)

    def sites(self) -> Iterator[tuple[Found, Activations]]:
        """Each site in execution order with its activations on the batches; their inputs
        live as long as the activations."""
        at, environments = 0, [example_values(self.gm, *batch) for batch in self.batches]
        for f in watched(self.found, "calibrating one attention after another"):
            end = self.place[f.raised.node]
            with torch.no_grad():
                for values in environments:
                    self._run(values, at, end)
            at = end
            yield f, self._activations(f, environments)

    def _run(self, values: Values, start: int, end: int) -> None:
        for i in range(start, end):
            node = self.nodes[i]
            if node in self.last_use and node not in values:
                values[node] = self._evaluate(node, values)
            for n in self.dying.get(i, ()):
                values.pop(n, None)

    def _evaluate(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return get_attr(self.gm, str(node.target)).detach()
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        return run_call(node, args, kwargs)

    def _last_use(self) -> dict[fx.Node, int]:
        """For each node that the attentions need, the position of its last use."""
        last: dict[fx.Node, int] = {}
        for f in self.found:
            end = self.place[f.raised.node]
            for n in _read_by(f):
                last[n] = max(last.get(n, 0), end)
                for above in ancestors(n):
                    for i in above.all_input_nodes:
                        last[i] = max(last.get(i, 0), self.place[above])
        return last

    def _activations(self, f: Found, environments: Sequence[Values]) -> Activations:
        read = _read_by(f)
        kept = [{n: values[n] for n in read if n in values} for values in environments]

        def operands(values: Values, new: Mapping[str, Tensor]) -> Operands:
            q, k, v, bias, mask, sinks = (
                self._anew(operand, f.dirty.get(role, ()), values, new) if isinstance(operand, fx.Node) else None
                for role, operand in zip(ROLES, f.raised.node.args, strict=True)
            )
            assert q is not None
            assert k is not None
            assert v is not None
            return Operands(q, k, v, bias, mask, sinks)

        def compute(edits: Sequence[HeadWeights], first_alone: bool = False) -> list[Operands]:
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
        return Activations(f.site, tuple(found), compute)

    def _anew(
        self, node: fx.Node, dirty: Sequence[fx.Node], values: Mapping[fx.Node, Any], new: Mapping[str, Tensor]
    ) -> Tensor:
        """The value of ``node`` with the parameters ``new``."""
        reached: set[fx.Node] = set()
        for n in sorted(dirty, key=self.place.__getitem__):
            if str(n.target) in new if n.op == "get_attr" else reached & set(n.all_input_nodes):
                reached.add(n)
        if node not in reached:
            found: Tensor = values[node]
            return found
        made: Values = {}
        for n in sorted(reached, key=self.place.__getitem__):
            made[n] = new[str(n.target)] if n.op == "get_attr" else self._evaluate(n, {**values, **made})
        result: Tensor = made[node]
        return result


def _read_by(f: Found) -> set[fx.Node]:
    """The inputs of the site's operands, with its own or other weights."""
    return {
        *f.raised.node.all_input_nodes,
        *(i for nodes in f.dirty.values() for n in nodes for i in n.all_input_nodes),
    }
