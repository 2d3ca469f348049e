"""Calibration batches on their way through the original model and, beside it, through the model as it is rewritten so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, fx

from attnopt.base.call_inputs import CallInputs
from attnopt.base.progress import watched
from attnopt.compiler.decide import Decision
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.compiler.residual_sum import ResidualSum, residual_sum
from attnopt.compiler.rewritten_run import Other, Place, RewrittenRun, schedule_of
from attnopt.graph.interpreter import Forward
from attnopt.ir.activations import Activations
from attnopt.ir.interfaces import Backend
from attnopt.match.find import Found
from attnopt.match.prove import example_values


class FollowedStream(Stream):
    """Asymmetric calibration (GPTAQ, arXiv:2504.02692): an attention is fitted to what the original model gives, from what
    the rewritten one brings to it.

    After each attention, ``follow`` tells what was decided.  An attention that shares its weights with others, or that only a
    whole rewritten graph computes, stays in the stream as it is in the model.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        found: Sequence[Found],
        batches: Sequence[CallInputs],
        invented: Sequence[CallInputs],
        backends: Sequence[Backend],
    ) -> None:
        self.backends = backends
        own = {f.site.name: Other.of(Decision(f, f.site), backends) for f in found}
        self.others = {name: other for name, other in own.items() if other is not None}  # that stand in the stream
        self.places = {f.site.name: Place.of(gm, f) for f in found if f.site.name in self.others}
        sums = {name: residual_sum(gm, place.found, place.end) for name, place in self.places.items()}
        self.sums: dict[str, ResidualSum] = {name: s for name, s in sums.items() if s is not None}
        super().__init__(gm, found, batches, invented)
        self.rewritten = schedule_of(gm, [*self.places.values()], {f.raised.node: self.reads(f) for f in found})

    def reads(self, f: Found) -> set[fx.Node]:
        place, s = self.places.get(f.site.name), self.sums.get(f.site.name)
        wanted = {*place.reads} if place else set[fx.Node]()
        return super().reads(f) | wanted | ({s.stream, *s.part.reads} if s else set())

    def follow(self, d: Decision) -> None:
        """What was decided for the attention to which the stream has come."""
        name, other = d.found.site.name, Other.of(d, self.backends)
        if other is not None and name in self.others:
            self.others[name] = other

    def sites(self) -> Iterator[tuple[Found, Activations]]:
        runs, others = ([self._run(batch) for batch in some] for some in (self.batches, self.invented))
        now, beside = ([self._rewritten(batch) for batch in some] for some in (self.batches, self.invented))
        for f in watched(self.found, "calibrating one attention after another"):
            for run in (*runs, *others, *now, *beside):
                run.up_to(f.raised.node)
            activations = self._activations(f, [run.values for run in runs])
            followed, invented = self._followed(f, activations, runs, now), None
            if self.invented:
                invented = self._activations(f, [run.values for run in others])
                followed = replace(followed, invented=self._followed(f, invented, others, beside))
            yield f, replace(activations, invented=invented, rewritten=followed)
            for rewritten in (*now, *beside) if f.site.name in self.places else ():
                rewritten.put(self.places[f.site.name], self.others[f.site.name])

    def _rewritten(self, batch: CallInputs) -> RewrittenRun:
        return RewrittenRun(self.gm, example_values(self.gm, *batch), self.rewritten)

    def _followed(
        self, f: Found, original: Activations, runs: Sequence[Forward], now: Sequence[RewrittenRun]
    ) -> Activations:
        made = self._activations(f, [run.values for run in now])
        return replace(made, first=original, drift=self._drift(f, original, runs, now))

    def _drift(
        self, f: Found, original: Activations, runs: Sequence[Forward], now: Sequence[RewrittenRun]
    ) -> tuple[Tensor, ...]:
        """What the residual stream has lost before this attention, which its output projection may add again."""
        s = self.sums.get(f.site.name)
        if s is None:
            return ()
        layout, o_BHLD = self.places[f.site.name].layout, original.given[0]
        (out,) = layout.run({n: runs[0](n) for n in layout.reads}, [o_BHLD])
        if not s.holds(runs[0], f, out, o_BHLD):
            return ()
        return tuple(a.values[s.stream] - b.values[s.stream] for a, b in zip(runs, now, strict=True))
