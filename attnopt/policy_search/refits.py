"""Picks with their output projections fitted once more, each to what the rewritten model before it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.base.call_inputs import CallInputs
from attnopt.compiler.decide import Decision, decided_further
from attnopt.compiler.followed_calibration import FollowedStream
from attnopt.errors import CalibrationError
from attnopt.passes.refit import Refit
from attnopt.policy_search.candidates import Candidates
from attnopt.policy_search.menu import Picks

# The more is kept of today's weights, the less a fit gains at home, and the better it travels.
REFITS = (Refit(), Refit(ridge=5.0), Refit(ridge=25.0))


@dataclass(frozen=True)
class Refits:
    """``batches``: what is fitted to, in the form of the graph, and ``invented``, the same with random tokens."""

    made: Candidates
    batches: Sequence[CallInputs]
    invented: Sequence[CallInputs]

    @classmethod
    def of(cls, made: Candidates, batches: Sequence[CallInputs]) -> Refits | None:
        """None without data, and where attentions share weights, which each would fit for itself."""
        weights = [p.weight for f in made.found if (p := f.site.projections.get("out")) is not None]
        if not batches or len({*weights}) < len(weights):
            return None
        return cls(made, batches, made.job.invented(made.compiled.program, batches, made.found, [(Refit(),)]))

    def decisions(self, picks: Picks, refit: Refit) -> list[Decision] | None:
        """In the order of the attentions; None where the data are too few."""
        job, gm = self.made.job, self.made.compiled.program.module
        made = {d.found.site.name: d for d in self.made.decisions(picks)}
        places = {site for place in self.made.places for site in place.sites}
        found = [f for f in self.made.found if f.site.name in places]
        stream = FollowedStream(gm, found, self.batches, self.invented, job.backends)
        try:
            for f, activations in stream.sites():
                name = f.site.name
                made[name] = decided_further(made[name], [refit], job.backends, activations, job.options.decodes)
                stream.follow(made[name])
        except CalibrationError:
            return None
        return [made[f.site.name] for f in self.made.found]
