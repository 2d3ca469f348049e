"""A run of a captured graph in which attentions are others where they stand: nothing is lowered."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.backends.reference import Reference
from attnopt.compiler.decide import Decision
from attnopt.compiler.layerwise_calibration import anew, operands_of, read_by
from attnopt.graph.interpreter import Forward, Schedule
from attnopt.graph.resume import Part
from attnopt.ir.activations import of_heads
from attnopt.ir.attend import Attend
from attnopt.ir.edited_parameters import edited_parameters
from attnopt.ir.interfaces import Backend
from attnopt.ir.operands import OperandTensors
from attnopt.ir.plugin_calls import attention_of
from attnopt.ir.site_edit import SiteEdit
from attnopt.lower.choose_backend import choose
from attnopt.lower.lower import edits_for
from attnopt.match.find import Found
from attnopt.match.projections import weight_path

ROLES = ("q", "k", "v")


@dataclass(frozen=True)
class Place:
    """An attention in its graph.  ``layout``: from the outputs of its heads to what the model goes on with."""

    found: Found
    layout: Part

    @classmethod
    def of(cls, gm: fx.GraphModule, f: Found) -> Place:
        return cls(f, Part(gm.graph, [f.raised.node], [f.raised.out]))

    @property
    def end(self) -> fx.Node:
        """What the model goes on with."""
        return self.found.raised.region.out.node

    @property
    def reads(self) -> set[fx.Node]:
        """What another attention in this place is computed from."""
        return {*read_by(self.found), *self.layout.reads}


@dataclass(frozen=True)
class Other:
    """Another attention in one place: its heads and weights, and what computes it."""

    edit: SiteEdit
    attend: Attend

    @classmethod
    def of(cls, d: Decision, backends: Sequence[Backend]) -> Other | None:
        """What was decided; None if only a whole rewritten graph computes it."""
        edit = d.plan or SiteEdit(d.found.raised.spec)
        spec = edit.spec
        is_own = spec.has_own_maps and not spec.inputs and not spec.before and spec.extension is None
        if not is_own or (d.found.output_op is None and _of_output(edit)):
            return None
        chosen = choose(backends, d.found.site, d.found.site).backend if d.plan is None else d.plan.backend
        return cls(edit, attention_of(chosen or Reference(), spec))


def schedule_of(
    gm: fx.GraphModule, places: Sequence[Place], more: Mapping[fx.Node, Collection[fx.Node]] | None = None
) -> Schedule:
    """Of a run that stops at each place for another attention to be put there.  ``more``: further stops."""
    read: dict[fx.Node, Collection[fx.Node]] = {p.found.raised.node: p.reads for p in places}
    return Schedule(gm.graph, read | dict(more or {}), {p.end for p in places})


class RewrittenRun(Forward):
    """``weights``: of some operators, other values of operands."""

    def __init__(self, gm: fx.GraphModule, values: Mapping[fx.Node, object], schedule: Schedule) -> None:
        super().__init__(gm, values, schedule)
        self.weights: dict[fx.Node, dict[fx.Node, Tensor]] = {}

    def call(self, node: fx.Node, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        if (held := self.weights.get(node)) is not None:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: held[n] if n in held else self.values[n])
        return super().call(node, args, kwargs)

    def copied(self) -> RewrittenRun:
        """The same run, to go on from here another way."""
        made = RewrittenRun(self.gm, self.values, self.schedule)
        made.at, made.weights = self.at, dict(self.weights)
        return made

    @torch.no_grad()
    def put(self, place: Place, other: Other) -> None:
        """``other`` in this place, to which the run has come."""
        f, edit = place.found, other.edit
        t = of_heads(edit.spec, self._operands(f, edit))
        o_BHLD = other.attend(t.q, t.k, t.v, **t.others)
        known = {n: self(n) for n in place.layout.reads}
        (self.values[place.end],) = place.layout.run(known, [_among_all(f, edit, o_BHLD)])
        if _of_output(edit):
            assert f.output_op is not None
            self.weights[f.output_op] = self._output_weights(f, edit)

    def _operands(self, f: Found, edit: SiteEdit) -> OperandTensors:
        def operand(role: str, node: fx.Node) -> Tensor:
            new = edited_parameters(f.site, edits_for(f.site, edit.edits, role)) if role in ROLES else {}
            return anew(self.gm, node, f.dirty.get(role, ()), self.values, new)

        return operands_of(f, operand)

    def _output_weights(self, f: Found, edit: SiteEdit) -> dict[fx.Node, Tensor]:
        """By operand of the output projection."""
        assert f.output_op is not None
        made: dict[fx.Node, Tensor] = {}
        edits = [e for e in edit.edits if e.role == "out"]
        for name, new in edited_parameters(f.site, edits, edit.out_bias).items():
            path = weight_path(f.output_op, {name})
            made[path[0]] = Forward(self.gm, {path[-1]: new}, self.schedule)(path[0])
        return made


def _of_output(edit: SiteEdit) -> bool:
    """The output projection changes."""
    return edit.out_bias is not None or any(e.role == "out" for e in edit.edits)


def _among_all(f: Found, edit: SiteEdit, o_BHLD: Tensor) -> Tensor:
    """The outputs of all heads that the model has: zeros for those that are gone."""
    heads = edit.spec.heads
    if heads == f.raised.spec.heads:
        return o_BHLD
    B, _, L, D = o_BHLD.shape
    whole = o_BHLD.new_zeros(B, f.raised.spec.num_heads, L, D)
    whole[:, list(heads)] = o_BHLD
    return whole
