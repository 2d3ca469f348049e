"""What candidates compute on pieces of the data."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.run_unchanged import cloned
from attnopt.compiler.decide import Decision
from attnopt.compiler.policy import Policy
from attnopt.compiler.rewritten_run import Other
from attnopt.model import OptimizedModel
from attnopt.policy_search.candidates import Candidates, Passes
from attnopt.policy_search.in_place import InPlace
from attnopt.policy_search.menu import Picks
from attnopt.policy_search.refits import REFITS, Refits


@dataclass(frozen=True)
class Candidate:
    """Picks, and the number in ``REFITS`` of what fits their output projections once more, if anything does."""

    picks: Picks
    refit: int | None = None


@dataclass
class Outputs:
    """``pieces``: in the form of the graph.  ``refits``: None where nothing can be fitted once more."""

    made: Candidates
    pieces: Sequence[CallInputs]
    refits: Refits | None
    seed: int
    known: dict[tuple[int, int], Sequence[Other | None]] = field(
        default_factory=dict, repr=False
    )  # by place and number
    last: tuple[Candidate, Sequence[Decision]] | None = None
    lowered: tuple[Candidate, OptimizedModel] | None = None

    @cached_property
    def in_place(self) -> InPlace:
        found = [f for f in self.made.found if f.site.name in self._place_of]
        return InPlace(self.made.compiled.program, found, self.pieces)

    def output(self, candidate: Candidate, piece: int) -> Any:
        """In the captured graph, or of a rewritten one where that is needed."""
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            keys, others = self._others(candidate)
            own = [other for other in others if other is not None]
            if len(own) == len(others):
                return self.in_place.output(piece, keys, own)
            args, kwargs = cloned(self.pieces[piece])
            return self.model(candidate)(*args, **kwargs)

    def model(self, candidate: Candidate) -> OptimizedModel:
        if self.lowered is None or self.lowered[0] != candidate:
            self.lowered = None  # two would hold weights of their own
            self.lowered = candidate, self.made.lowered(self.decisions(candidate), self.policy(candidate))
        return self.lowered[1]

    def policy(self, candidate: Candidate) -> Policy:
        return self.made.policy(candidate.picks, self.more(candidate))

    def more(self, candidate: Candidate) -> Passes:
        """What follows the passes of each pick."""
        return () if candidate.refit is None else (REFITS[candidate.refit],)

    @cached_property
    def _place_of(self) -> dict[str, int]:
        return {site: u for u, place in enumerate(self.made.places) for site in place.sites}

    def decisions(self, candidate: Candidate) -> Sequence[Decision]:
        """In the order of the attentions; none if the data are too few to fit to."""
        if candidate.refit is None:
            return self.made.decisions(candidate.picks)
        if self.last is None or self.last[0] != candidate:
            assert self.refits is not None
            self.last = None
            self.last = candidate, self.refits.decisions(candidate.picks, REFITS[candidate.refit]) or ()
        return self.last[1]

    def _others(self, candidate: Candidate) -> tuple[list[Hashable], list[Other | None]]:
        """In the order in which the attentions run, with equal keys where equal ones stand."""
        backends = self.made.job.backends
        if candidate.refit is not None:
            own = {d.found.site.name: d for d in self.decisions(candidate)}
            names = [p.found.site.name for p in self.in_place.places]
            return [(candidate, name) for name in names], [Other.of(own[name], backends) for name in names]
        for u, a in enumerate(candidate.picks):
            if (u, a) not in self.known:
                self.known[u, a] = [Other.of(d, backends) for d in self.made.places[u].alternatives[a].decisions]
        keys, others = list[Hashable](), list[Other | None]()
        for p in self.in_place.places:
            name = p.found.site.name
            u = self._place_of[name]
            keys.append((u, candidate.picks[u]))
            others.append(self.known[u, candidate.picks[u]][self.made.places[u].sites.index(name)])
        return keys, others
