"""Candidates computed in the captured graph, without lowering any; what comes before their first difference is computed once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.program import Program
from attnopt.compiler.graph_output import leaves_of, output_of
from attnopt.compiler.rewritten_run import Other, Place, RewrittenRun, schedule_of
from attnopt.match.find import Found
from attnopt.match.prove import example_values

TRAILS = 3  # candidates whose runs are kept, for each piece of the data
HELD = 1 << 28  # bytes that they may hold together


@dataclass
class _Trail:
    """``states``: of a run with these choices, by the number of the attention to which it has come."""

    keys: tuple[Hashable, ...]
    states: dict[int, RewrittenRun] = field(default_factory=dict)

    def shared(self, keys: Sequence[Hashable]) -> int:
        """The last attention at which there is a state and before which ``keys`` are the same; -1 if there is none."""
        same = next((i for i, (a, b) in enumerate(zip(self.keys, keys, strict=True)) if a != b), len(keys))
        return max((i for i in self.states if i <= same), default=-1)


class InPlace:
    """``pieces``: of the data, in the form of the graph.  ``found``: the attentions that may be others."""

    def __init__(self, program: Program, found: Sequence[Found], pieces: Sequence[CallInputs]) -> None:
        self.program, self.pieces = program, pieces
        gm = program.module
        self.places = [Place.of(gm, f) for f in sorted(found, key=lambda f: f.raised.node)]
        self.end = gm.graph.output_node()
        self.ends = [n for n in dict.fromkeys(leaves_of(gm.graph)) if isinstance(n, fx.Node)]
        self.schedule = schedule_of(gm, self.places, {self.end: self.ends})
        self.trails: dict[int, list[_Trail]] = {}
        self.step: int | None = None  # attentions from one state that is kept to the next; known after the first run

    def output(self, piece: int, keys: Sequence[Hashable], others: Sequence[Other]) -> Any:
        """Of the model on a piece with ``others`` in their places, as they run; equal ``keys``: equal others."""
        trails, made = self.trails.setdefault(piece, []), _Trail(tuple(keys))
        old = max(trails, key=lambda t: t.shared(keys), default=_Trail(tuple(keys)))
        start = old.shared(keys)
        if start < 0:
            start, run = 0, RewrittenRun(self.gm, example_values(self.gm, *self.pieces[piece]), self.schedule)
        else:
            trails.remove(old)
            trails.append(old)  # of use: it stays longer than the others
            run = old.states[start].copied()
            made.states = {i: s for i, s in old.states.items() if i <= start}
        for i, place in enumerate(self.places[start:], start):
            run.up_to(place.found.raised.node)
            if i % (self.step or 1) == 0:
                made.states[i] = run.copied()
            run.put(place, others[i])
        run.up_to(self.end)
        self._keep(trails, made)
        return output_of(self.program, self.gm.graph, {n: run(n) for n in self.ends}, self.pieces[piece])

    @property
    def gm(self) -> fx.GraphModule:
        return self.program.module

    def _keep(self, trails: list[_Trail], made: _Trail) -> None:
        if self.step is None:
            self.step = max(1, math.ceil(TRAILS * len(self.pieces) * _bytes(made) / HELD))
            made.states = {i: s for i, s in made.states.items() if i % self.step == 0}
        if self.step <= len(self.places):
            trails.append(made)
            del trails[:-TRAILS]


def _bytes(trail: _Trail) -> int:
    """Of what is computed, each tensor once."""
    values = [(n, x) for run in trail.states.values() for n, x in run.values.items()]
    held = {id(x): x.nbytes for n, x in values if isinstance(x, Tensor) and n.op == "call_function"}
    return sum(held.values())
