"""What a search is given: the candidates, what each choice costs, and how far a model with some of them diverges."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.capture.calibration import Calibration, shapes_of
from attnopt.compiler.choices import SiteChoices, site_choices
from attnopt.compiler.chosen_sites import no_such_site
from attnopt.compiler.compile import Compiled, carried_out
from attnopt.compiler.job import Job, Options, backends_of
from attnopt.compiler.policy import Policy
from attnopt.errors import AttnoptError, CalibrationError, PolicyError
from attnopt.intervene.metric import scalar
from attnopt.ir.peers import Peers
from attnopt.passes.fuse import Fuse
from attnopt.policy_search import latency
from attnopt.policy_search.budget import Budget
from attnopt.policy_search.candidates import Candidates, candidates
from attnopt.policy_search.costs import menu_of
from attnopt.policy_search.data import Judged, judged_on, last_module, real_tokens, resized, split
from attnopt.policy_search.default_choices import default_choices
from attnopt.policy_search.divergence import Divergence, kind_of
from attnopt.policy_search.judge import Judge, Part
from attnopt.policy_search.menu import Menu, Picks
from attnopt.policy_search.outputs import Candidate, Outputs
from attnopt.policy_search.refits import Refits
from attnopt.policy_search.state import State, data_mark, mark_of, model_mark
from attnopt.policy_search.targets import TOKEN

Evaluate = Callable[[nn.Module], Any]
T = TypeVar("T")


class FailedError(Exception):
    """A candidate could not be judged; the message names it."""


@dataclass(frozen=True)
class Task:
    """What ``search`` is asked for.  ``inputs``: the example of a call.  ``divergence``: "kl", "cosine" or "auto"."""

    model: nn.Module
    policy: object
    inputs: CallInputs
    data: Calibration
    budget: Budget
    evaluate: Evaluate | None = None
    divergence: str = "auto"
    dynamic_shapes: object = None
    seed: int = 0

    @property
    def counted(self) -> CallInputs:
        """Of the call whose cost is counted.  Raises PolicyError."""
        return resized(self.inputs, self.budget.sizes)

    def marks(self, made: Candidates, judged: Judged) -> dict[str, str]:
        """Of all that measurements depend on."""
        named = None if self.evaluate is None else getattr(self.evaluate, "__qualname__", type(self.evaluate).__name__)
        sizes = [getattr(x, "shape", x) for x in (*self.counted.args, *self.counted.kwargs.values())]
        return {
            "choices": mark_of(*((p.sites, list(map(str, p.alternatives)), p.allowed) for p in made.places)),
            "model": model_mark(self.model),
            "calibration data": data_mark([*self.data.batches, *judged.pieces]),
            "sizes of the call": mark_of(sizes),
            "device": f"{self.budget.device}, {self.budget.target}",
            "measure": mark_of(self.divergence, named, self.seed),
        }


@dataclass
class Problem:
    """``inputs``: of the call whose cost is counted.  ``judged``: what candidates are judged on.  ``kind``: "kl" or "cosine", of
    what is compared."""

    task: Task
    made: Candidates
    inputs: CallInputs
    judged: Judged
    state: State
    refits: Refits | None = None  # what fits output projections once more, if anything is fitted
    peers: Peers | None = None  # who judge the same candidates, on other pieces of the same data
    kind: str = field(init=False)
    menu: Menu = field(init=False)
    apart: Divergence | None = None

    def __post_init__(self) -> None:
        self.menu = self._menu()
        self.outputs = Outputs(self.made, self.judged.pieces, self.refits, self.task.seed)
        self.kind = self.task.divergence
        if self.task.evaluate is None and self.kind == "auto":
            output = self.outputs.output(self._unchanged, 0)
            self.kind = kind_of(output, last_module(self.made.compiled.program.module))

    @property
    def limits(self) -> dict[str, float]:
        return self.task.budget.limits(self.menu.original)

    @property
    def pieces(self) -> int:
        return 1 if self.task.evaluate is not None else len(self.judged.pieces)

    @property
    def uniform(self) -> list[Picks]:
        """The same passes at all places that have them; the others stay as they are, if they may."""
        places = self.made.places
        kinds = dict.fromkeys(a.kind for p in places for a in p.alternatives)
        found = [
            tuple(next((n for n in p.allowed if p.alternatives[n].kind == kind), p.allowed[0]) for p in places)
            for kind in kinds
        ]
        return list(dict.fromkeys(found))

    def measure(self, picks: Picks, pieces: Sequence[int], refit: int | None = None) -> list[Part]:
        """How far the model with these picks diverges on pieces of the data; infinitely where nothing can be fitted.

        Raises FailedError, CalibrationError."""
        own: dict[int, Part] | FailedError
        candidate = Candidate(picks, refit)
        if refit is not None and not self.outputs.decisions(candidate):
            return [(math.inf, 1.0) for _ in pieces]
        try:
            own = {piece: self._measured(candidate, piece) for piece in pieces if self._is_own(piece)}
        except FailedError as error:
            own = error
        found: dict[int, Part] = {}
        for told in self.everyone(own):
            if isinstance(told, FailedError):  # on all of them, so that all end here
                raise own if isinstance(own, FailedError) else told
            found |= told
        return [found[piece] for piece in pieces]

    def refit_judge(self, is_late: Callable[[], bool]) -> Judge | None:
        """Of the same picks with their output projections fitted once more, their last number one of ``REFITS``; None if nothing
        can be."""
        if self.refits is None:
            return None
        return Judge(self._refitted, self.pieces, self.state.refitted, is_late=is_late, saved=self.state.save)

    def _refitted(self, picks: Picks, pieces: Sequence[int]) -> list[Part]:
        """On random tokens as without the fit, which has seen such: what it gains there says nothing of other domains."""
        plain, refit = picks[:-1], picks[-1]
        texts = [piece for piece in pieces if piece in self.judged.texts]
        found = self.state.values[plain] | dict(zip(texts, self.measure(plain, texts, refit), strict=True))
        return [found[piece] for piece in pieces]

    def check(self, candidate: Candidate) -> float:
        """Milliseconds of the whole model, measured beside the original."""
        own = 0.0
        if self._is_first:
            model = self.outputs.model(candidate)
            own = latency.check(self.made, model, self.inputs, self._clock, self.state.times["graph"])
        return self.everyone(own)[0]

    # ------------------------------------------------------------ peers
    def everyone(self, told: T) -> list[T]:
        """What each process tells."""
        return [told] if self.peers is None else self.peers.everyone(told)

    def _is_own(self, piece: int) -> bool:
        return self.peers is None or piece % self.peers.count == self.peers.rank

    @property
    def _is_first(self) -> bool:
        """Whose clock counts."""
        return self.peers is None or self.peers.rank == 0

    # ------------------------------------------------------------ costs
    def _menu(self) -> Menu:
        """Without the alternatives that the target cannot run.  Raises PolicyError."""
        resources = list(self.task.budget.given)
        if "latency" not in resources:
            return menu_of(self.made, resources, None)
        found = self.everyone(self._latencies() if self._is_first else None)[0]
        assert found is not None, "of the first"
        self.made = self.made.without(found.refused)
        ahead = found.graph - found.model  # shares are of the user's model, and what changes is its graph
        changes = [list(own) for own in found.changes]
        changes[0] = [more + ahead for more in changes[0]]
        return menu_of(self.made, resources, (found.model, changes))

    def _latencies(self) -> latency.Latencies:
        state = self.state
        return latency.measured(self.task.model, self.made, self.inputs, self._clock, state.times, state.save)

    @property
    def _clock(self) -> latency.Clock:
        return latency.Clock(self.task.budget.device, self.task.budget.target)

    # ------------------------------------------------------------ judging
    @property
    def _unchanged(self) -> Candidate:
        return Candidate((0,) * len(self.made.places))

    def _measured(self, candidate: Candidate, piece: int) -> Part:
        if self.task.evaluate is not None:
            return self._by_user(self.task.evaluate, candidate)
        if self.apart is None:
            self.apart = self._original()
        try:
            return self.apart.of(piece, self.outputs.output(candidate, piece))
        except AttnoptError as error:
            raise FailedError(f"{self.made.told(candidate.picks)}: {error}") from error

    def _by_user(self, evaluate: Evaluate, candidate: Candidate) -> Part:
        module, told = self.outputs.model(candidate), self.made.told(candidate.picks)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.task.seed)
            try:
                return scalar(evaluate(module), "evaluate", f"with {told}"), 1.0
            except CalibrationError as error:
                raise FailedError(str(error).splitlines()[0]) from error
            except Exception as error:
                raise FailedError(f"evaluate failed with {told}: {type(error).__name__}: {error}") from error

    def _original(self) -> Divergence:
        """What outputs are compared with."""
        program, pieces = self.made.compiled.program, self.judged.pieces
        made = Divergence(self.kind, len(pieces), self.task.seed)
        own = [piece for piece in range(len(pieces)) if self._is_own(piece)]
        masks = real_tokens(program.module, self.made.found, [pieces[piece] for piece in own])
        for piece, real in zip(own, masks, strict=True):
            made.learn(piece, self.outputs.output(self._unchanged, piece), real)
        return made


def problem(task: Task, resume: str | os.PathLike[str] | None = None, peers: Peers | None = None) -> Problem:
    """Captured once, each alternative decided and fitted once, and its cost known.  ``resume``: a file of measurements;
    ``peers``: as of ``search``.

    Raises PolicyError, CalibrationError, SearchError."""
    made, judged, refits = _prepared(task)
    state = State(task.marks(made, judged), None if resume is None else Path(resume))
    if peers is None:
        state.read()
    else:
        state.share(peers)
    return Problem(task, made, task.counted, judged, state, refits if peers is None else None, peers)


@compiling()
def _prepared(task: Task) -> tuple[Candidates, Judged, Refits | None]:
    model, budget, batches, inputs = task.model, task.budget, task.data.batches, task.counted
    if not isinstance(model, nn.Module):
        raise PolicyError(f"search: expected an nn.Module, found {type(model).__name__}", hint="pass the model itself")
    if model.training:
        raise PolicyError("search: the model is in train mode, where its outputs are random", hint="call model.eval()")
    device = next((t.device.type for t in (*model.parameters(), *model.buffers())), "cpu")
    if device != torch.device(budget.device).type:
        hint = f"Budget(device={device!r})"
        raise PolicyError(f"search: the model is on {device}, and the budget is for {budget.device}", hint=hint)
    shapes, is_decoder = task.dynamic_shapes, budget.target == TOKEN
    if shapes is None and (is_decoder or len({shapes_of(b) for b in (inputs, *batches)}) > 1):
        shapes = "auto"
    job = Job(model, Policy.of("fuse"), inputs, shapes, batches, backends_of("auto"), Options(seed=task.seed))
    compiled = carried_out(replace(job, batches=()))
    if not compiled.findings.found:
        raise PolicyError("search: no attention was found", hint="attnopt.inspect tells why")
    open_policy = None if task.policy is None else Policy.of(task.policy)
    parts = split(batches, open_policy is None or any(p.calibrates for p in open_policy.passes))
    choices = _choices(open_policy, replace(job, batches=parts.fitted or parts.judged), compiled, budget)
    fitted, held = (replace(job, batches=own).arranged(compiled.program) for own in (parts.fitted, parts.judged))
    made = candidates(job, compiled, choices, fitted, (Fuse(),) if is_decoder else ())
    return made, judged_on(compiled, fitted, held, task.seed), Refits.of(made, fitted)


def _choices(policy: Policy | None, job: Job, compiled: Compiled, budget: Budget) -> Sequence[SiteChoices]:
    """The search space.  Raises PolicyError."""
    if policy is None:
        program = compiled.program
        return default_choices(program.module, compiled.findings.found, job.arranged(program), budget)
    names = [f.site.name for f in compiled.findings.found]
    if unknown := [glob for glob in policy.unmatched(names) if glob != "*"]:
        raise no_such_site("search", unknown[0], names)
    return site_choices(replace(job, policy=policy), compiled.program, compiled.findings)
