"""The models that a search chooses from: of each place its alternatives, each decided and fitted once."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.compiler.choices import SiteChoices
from attnopt.compiler.compile import Compiled
from attnopt.compiler.decide import Decision, decide
from attnopt.compiler.job import Job
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.compiler.policy import Policy
from attnopt.compiler.site_report import site_report
from attnopt.compiler.tied_weights import Group, jointly, of_all, tied
from attnopt.errors import PolicyError
from attnopt.ir.activations import Activations
from attnopt.ir.interfaces import Pass, SharesBudget
from attnopt.ir.refusal import Refusal
from attnopt.lower.fixed_operands import store_fixed_operands
from attnopt.lower.lower import lower
from attnopt.match.find import Found
from attnopt.model import OptimizedModel
from attnopt.policy_search.menu import Picks

Passes = tuple[Pass, ...]
COLLECTED = 8  # models between two collections of garbage


@dataclass(frozen=True)
class Alternative:
    """``decisions``: one for each site of the place."""

    passes: Passes
    decisions: tuple[Decision, ...]

    @property
    def changes_weights(self) -> bool:
        plans = [d.plan for d in self.decisions if d.plan is not None]
        return any(
            p.edits or p.out_bias is not None or (p.spec.heads, p.spec.kv_heads) != (s.heads, s.kv_heads)
            for p in plans
            for s in [p.found.site.spec]
        )

    @property
    def refusals(self) -> Mapping[str, Refusal]:
        return self.decisions[0].refusals

    @property
    def accepted(self) -> Alternative:
        """Without the passes that are refused, which do nothing."""
        names = [p.name for p in self.passes]
        if len({*names}) < len(names):
            return self
        return replace(self, passes=tuple(p for p in self.passes if p.name not in self.refusals))

    @property
    def kind(self) -> str:
        """Equal for alternatives that differ in the numbers of heads alone: those of a uniform policy."""
        return ", ".join(text_of(p, numbers=False) for p in self.passes)

    def __str__(self) -> str:
        return texts_of(self.passes) or "as it is"


@dataclass(frozen=True)
class Place:
    """Attentions that get the same, most often one: those that share weights which some alternative changes.

    Number 0 of ``alternatives`` leaves them as they are, or fuses them alone; ``allowed``: the numbers that may be chosen.
    """

    sites: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    allowed: tuple[int, ...]


@dataclass(frozen=True)
class Candidates:
    """The captured model, what is to be chosen, and what was refused: (site, passes, why)."""

    job: Job
    compiled: Compiled
    places: tuple[Place, ...]
    refused: tuple[tuple[str, str, Refusal], ...]
    uncollected: list[Policy] = field(default_factory=list, repr=False)

    def policy(self, picks: Picks, more: Passes = ()) -> Policy:
        """A plain policy that makes the same model; with ``more`` passes at every place."""
        passes = {
            site: (*place.alternatives[a].passes, *more)
            for place, a in zip(self.places, picks, strict=True)
            for site in place.sites
        }
        return Policy(tuple((f.site.name, own) for f in self.found if (own := passes.get(f.site.name, ()))))

    def without(self, refused: Mapping[tuple[int, int], Refusal]) -> Candidates:
        """What is left without these alternatives, given by place and number.  Raises PolicyError if nothing is."""
        if not refused:
            return self
        places = tuple(
            replace(p, allowed=tuple(a for a in p.allowed if (u, a) not in refused)) for u, p in enumerate(self.places)
        )
        told = [(self.places[u].sites[0], str(self.places[u].alternatives[a]), why) for (u, a), why in refused.items()]
        made = replace(self, places=places, refused=(*self.refused, *told))
        if any(not p.allowed for p in places) or not any(any(p.allowed) for p in places):
            raise nothing_to_choose(made.refused)
        return made

    @property
    def found(self) -> Sequence[Found]:
        return self.compiled.findings.found

    def decisions(self, picks: Picks) -> list[Decision]:
        """In the order of the attentions."""
        made = {
            d.found.site.name: d
            for place, a in zip(self.places, picks, strict=True)
            for d in place.alternatives[a].decisions
        }
        return [made.get(f.site.name) or Decision(f, f.site) for f in self.found]

    def model(self, picks: Picks) -> OptimizedModel:
        """The model with these picks, not yet verified: ``Search.optimize`` verifies.  Its report is that of the picks."""
        return self.lowered(self.decisions(picks), self.policy(picks))

    @compiling()
    def lowered(self, decisions: Sequence[Decision], policy: Policy) -> OptimizedModel:
        """The model of these decisions, which ``policy`` makes."""
        origin = self.compiled.origin
        module = lower(self.compiled.program.module, [d.plan for d in decisions if d.plan is not None])
        store_fixed_operands(module, trains=False)
        report = replace(origin.report, sites=tuple(map(site_report, decisions)), policy=policy.to_json(), warnings=())
        sites = tuple(replace(d.site, refusals=d.refusals) for d in decisions)
        self.uncollected.append(policy)
        if len(self.uncollected) >= COLLECTED:
            self.uncollected.clear()
            gc.collect()  # graphs refer to themselves: those before would keep their new weights alive
        return OptimizedModel(module, replace(origin, report=report, sites=sites)).eval()

    def told(self, picks: Picks) -> str:
        """The picks in words, for errors."""
        changed = [
            f"{', '.join(s or '(root)' for s in place.sites)}: {place.alternatives[a]}"
            for place, a in zip(self.places, picks, strict=True)
            if a
        ]
        return "; ".join(changed) or "no attention changed"


def texts_of(passes: Passes) -> str:
    return ", ".join(map(text_of, passes))


def text_of(p: Pass, numbers: bool = True) -> str:
    """ "local-window(left=64)": the options that are not the default.  ``numbers``: of heads, too."""
    if not is_dataclass(p):
        return p.name
    given = {f.name: getattr(p, f.name) for f in fields(p) if f.init}
    given = {name: v for name, v in given.items() if v != getattr(type(p), name, None)}
    told = [name if name == "heads" and not numbers else f"{name}={v!r}" for name, v in given.items()]
    return f"{p.name}({', '.join(told)})" if told else p.name


def nothing_to_choose(refused: Sequence[tuple[str, str, Refusal]]) -> PolicyError:
    why = f", the first by {refused[0][0] or '(root)'}: {refused[0][2]}" if refused else ""
    return PolicyError(
        f"search: there is nothing to choose: every attention refuses all of its choices{why}",
        hint="give other choices",
    )


def candidates(
    job: Job, compiled: Compiled, choices: Sequence[SiteChoices], batches: Sequence[CallInputs], least: Passes = ()
) -> Candidates:
    """``batches``: what alternatives are fitted to, in the form of the graph.  ``least``: the passes of attentions that are left
    as they are, exact ones.  Raises PolicyError."""
    wanted: dict[str, tuple[Passes, ...]] = {}
    if least:
        wanted = {f.site.name: (least,) for f in compiled.findings.found}
    wanted |= {
        c.site: tuple(dict.fromkeys(tuple(map(_alone, own)) or least for own in c.alternatives)) for c in choices
    }
    _check(wanted)
    places: list[Place] = []
    refused = [(c.site, texts_of(r.passes), r.refusal) for c in choices for r in c.refused]
    for group, activations in _groups(job, compiled, wanted, batches):
        for members, alternatives in _split(group, _decided(job, group, wanted[group[0].site.name], activations)):
            names = tuple(f.site.name for f in members)
            refused += [(names[0], str(a), next(iter(a.refusals.values()))) for a in alternatives if a.refusals]
            as_it_is = _decided(job, members, [least], None)[0]
            distinct = {a.passes or least: a for a in (a.accepted for a in alternatives)}
            others = tuple(a for passes, a in distinct.items() if passes != least)
            allowed = tuple(range(0 if least in distinct else 1, 1 + len(others)))
            places.append(Place(names, (as_it_is, *others), allowed))
    order = {f.site.name: n for n, f in enumerate(compiled.findings.found)}
    made = Candidates(job, compiled, tuple(sorted(places, key=lambda p: order[p.sites[0]])), tuple(refused))
    if not any(len(p.alternatives) > 1 for p in places):
        raise nothing_to_choose(refused)
    return made


def _check(wanted: Mapping[str, tuple[Passes, ...]]) -> None:
    for name, own in wanted.items():
        for p in (p for passes in own for p in passes):
            if p.inputs:
                raise PolicyError(
                    f"search: {p.name} at {name or '(root)'} reads an input of each call, which calibration data does not bring",
                    hint="search without it, and add it to the policy that is found",
                )


def _alone(p: Pass) -> Pass:
    """With a budget of its own: the search itself allots over the sites."""
    given: Any = p
    if not isinstance(p, SharesBudget) or not p.is_shared or "budget" not in {f.name for f in fields(given)}:
        return p
    made: Pass = replace(given, budget="site")
    return made


def _groups(
    job: Job, compiled: Compiled, wanted: Mapping[str, tuple[Passes, ...]], batches: Sequence[CallInputs]
) -> Iterator[tuple[Group, Activations | None]]:
    """The attentions that share weights together, with their activations if some alternative is fitted to them."""
    found = [f for f in compiled.findings.found if f.site.name in wanted]
    learning = [f for f in found if any(p.calibrates for own in wanted[f.site.name] for p in own)] if batches else []
    passes = (p for f in learning for p in wanted[f.site.name])
    invented = job.invented(compiled.program, batches, learning, passes)
    stream = Stream(compiled.program.module, learning, batches, invented)
    yield from jointly(stream, tied(learning, wanted))
    rest = [f for f in found if f not in learning]
    yield from ((group, None) for group in tied(rest, wanted))


def _decided(
    job: Job, group: Group, alternatives: Sequence[Passes], activations: Activations | None
) -> list[Alternative]:
    made: list[Alternative] = []
    for passes in alternatives:
        decision = decide(group[0], passes, job.backends, activations, job.options.decodes)
        made.append(Alternative(passes, tuple(of_all(group, decision))))
    return made


def _split(group: Group, alternatives: Sequence[Alternative]) -> Iterator[tuple[Group, list[Alternative]]]:
    """Where no alternative changes the shared weights, each attention is a place of its own."""
    if len(group) == 1 or any(a.changes_weights for a in alternatives):
        yield group, list(alternatives)
        return
    for n, f in enumerate(group):
        yield (f,), [Alternative(a.passes, (a.decisions[n],)) for a in alternatives]
