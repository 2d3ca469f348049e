"""``attnopt.search``: the entry point."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnopt.api import optimize
from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.options import choice, number, whole
from attnopt.base.user_warning import warn
from attnopt.capture.calibration import Batch, Calibration, shapes_of
from attnopt.capture.run_unchanged import cloned
from attnopt.compiler.choices import SiteChoices
from attnopt.compiler.compile import carried_out
from attnopt.compiler.job import Job, Options, backends_of
from attnopt.compiler.policy import Policy
from attnopt.errors import AttnoptError, CalibrationError, PolicyError, SearchError
from attnopt.intervene.metric import require_callable, scalar
from attnopt.model import OptimizedModel
from attnopt.policy_search import latency as latencies
from attnopt.policy_search.budget import Budget
from attnopt.policy_search.candidates import Candidates, candidates
from attnopt.policy_search.costs import menu_of
from attnopt.policy_search.data import Split, last_module, real_tokens, resized, split
from attnopt.policy_search.default_choices import default_choices
from attnopt.policy_search.divergence import KINDS, Divergence, kind_of
from attnopt.policy_search.engine import Engine
from attnopt.policy_search.judge import Judge, Part
from attnopt.policy_search.menu import Menu, Picks
from attnopt.policy_search.result import FrontPoint, Search
from attnopt.policy_search.state import State, data_mark, mark_of, model_mark
from attnopt.report.policy_search import SearchReport, Tried

Evaluate = Callable[[nn.Module], Any]
APART = 0.05  # relative difference of measured and predicted latency that a warning tells


@dataclass(frozen=True)
class Progress:
    """What a search is at: its stage, how many evaluations are done, and the best value within the budget so far."""

    stage: str
    evaluations: float
    best: float | None
    costs: Mapping[str, float]


def search(
    model: nn.Module,
    policy: object = None,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    calibration: Iterable[Batch] | Calibration,
    budget: Budget,
    evaluate: Evaluate | None = None,
    divergence: str = "auto",
    dynamic_shapes: object = None,
    evaluations: int = 200,
    minutes: float | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    seed: int = 0,
) -> Search:
    """The policy within ``budget`` with which the model diverges least from itself.

    ``policy``: one with choices; None: windows, fewer key/value heads and fewer heads, wherever they apply.
    ``args``, ``kwargs``: example inputs, as of ``optimize``; costs are those of a call of their sizes, or of ``budget.at``.
    ``calibration``: batches; a quarter is held back to judge on, and the choices are fitted to the rest.  Without a choice that
    is fitted, all are judged on.
    ``evaluate``: a function of a rewritten model that returns one number, LOWER is better (return minus the score of a metric
    that grows); by default the divergence of the outputs.  ``divergence``: "kl" between logits, "cosine" distance of
    embeddings, or "auto": "kl" for an output that the model calls logits.
    ``evaluations``: about how many times a model is judged on all held-back data; ``minutes``: the time for the search.
    ``resume``: a file that keeps all measurements: a search that was ended goes on from there.
    ``progress`` is called after each step.  ``seed``: the same seed and measurements give the same result.

    Uniform policies that fit always compete.  Raises PolicyError for a budget that no policy meets, which names the least
    possible, and for choices that every site refuses; SearchError if ``evaluate`` raises or returns no finite number, with
    what was found so far in ``partial``.
    """
    start = time.monotonic()
    _check(budget, evaluate, divergence, evaluations, minutes, args, kwargs)
    batches = Calibration.of(calibration).batches
    inputs = CallInputs.of(args, kwargs)
    costed = resized(inputs, budget.sizes)
    made, parts = _prepared(model, policy, costed, batches, dynamic_shapes, budget, seed)
    run = _Run(model, made, budget, parts, evaluate, divergence, seed, costed, start)
    run.open(resume, batches)
    run.told = progress
    deadline = float("inf") if minutes is None else start + 60 * minutes

    def build(chosen: Policy) -> OptimizedModel:
        return optimize(
            model, chosen, args, kwargs, dynamic_shapes=dynamic_shapes, calibration=Calibration(batches), seed=seed
        )

    return run.run(evaluations, deadline, build)


def _check(
    budget: object,
    evaluate: object,
    divergence: str,
    evaluations: object,
    minutes: object,
    args: object,
    kwargs: object,
) -> None:
    if not isinstance(budget, Budget):
        raise PolicyError(f"search: budget is a {type(budget).__name__}, expected attnopt.Budget(...)")
    if evaluate is not None:
        require_callable("search", "evaluate", evaluate)
    choice("search", "divergence", divergence, KINDS)
    whole("search", "evaluations", evaluations, least=1)
    if minutes is not None and number("search", "minutes", minutes) <= 0:
        raise PolicyError(f"search: invalid value minutes={minutes!r}: expected a number above 0")
    if not (args or kwargs):
        raise PolicyError("search needs example inputs", hint="pass args or kwargs")


@compiling()
def _prepared(
    model: nn.Module, policy: object, inputs: CallInputs, batches: Sequence[CallInputs], shapes: object, budget: Budget, seed: int
) -> tuple[Candidates, Split]:  # fmt: skip
    """Captured once, and each alternative decided and fitted once."""
    if not isinstance(model, nn.Module):
        raise PolicyError(f"search: expected an nn.Module, found {type(model).__name__}")
    device = next((t.device.type for t in (*model.parameters(), *model.buffers())), "cpu")
    if device != torch.device(budget.device).type:
        raise PolicyError(
            f"search: the model is on {device}, and the budget is for {budget.device}",
            hint=f"Budget(device={device!r})",
        )
    if shapes is None and len({shapes_of(b) for b in (inputs, *batches)}) > 1:
        shapes = "auto"
    job = Job(model, Policy.of("fuse"), inputs, shapes, batches, backends_of("auto"), Options(seed=seed))
    compiled = carried_out(replace(job, batches=()))
    if not compiled.findings.found:
        raise PolicyError("search: no attention was found", hint="attnopt.inspect tells why")
    choices = choices_of(policy, compiled.findings.found, budget)
    learns = any(p.calibrates for c in choices for passes in c.alternatives for p in passes)
    parts = split(batches, learns)
    fitted = replace(job, batches=parts.fitted).arranged(compiled.program)
    return candidates(job, compiled, choices, fitted), parts


def choices_of(policy: object, found: Sequence[Any], budget: Budget) -> list[SiteChoices]:
    """The search space.  Raises PolicyError if there is none."""
    if policy is None:
        return default_choices(found, budget.given)
    if isinstance(policy, (list, tuple)) and policy and all(isinstance(c, SiteChoices) for c in policy):
        return list(policy)
    plain = Policy.of(policy)
    return [SiteChoices(f.site.name, (plain.passes_for(f.site.name),)) for f in found]


class _FailedError(Exception):
    """A candidate could not be judged."""


@dataclass
class _Run:
    model: nn.Module
    made: Candidates
    budget: Budget
    parts: Split
    evaluate: Evaluate | None
    kind: str
    seed: int
    inputs: CallInputs
    start: float
    told: Callable[[Progress], None] | None = None
    state: State = field(default_factory=lambda: State({}))
    stage: str = "compiling"
    judge: Judge = field(init=False)
    last: tuple[Picks, OptimizedModel] | None = None

    def open(self, resume: str | os.PathLike[str] | None, batches: Sequence[CallInputs]) -> None:
        """The state file, if there is one.  Raises SearchError."""
        named = None if self.evaluate is None else getattr(self.evaluate, "__qualname__", type(self.evaluate).__name__)
        marks = {
            "choices": mark_of(*((p.sites, list(map(str, p.alternatives)), p.allowed) for p in self.made.places)),
            "model": model_mark(self.model),
            "calibration data": data_mark(batches),
            "sizes of the call": mark_of(
                [getattr(x, "shape", x) for x in (*self.inputs.args, *self.inputs.kwargs.values())]
            ),
            "device": str(self.budget.device),
            "measure": mark_of(self.kind, named, self.seed),
        }
        self.state = State(marks, None if resume is None else Path(resume))
        self.state.read()

    # ------------------------------------------------------------ the steps
    def run(self, evaluations: int, deadline: float, build: Callable[[Policy], OptimizedModel]) -> Search:
        try:
            measure = self._by_user if self.evaluate is not None else self._by_outputs()
            pieces = 1 if self.evaluate is not None else len(self.parts.judged)
            menu = self._menu()
            self.judge = Judge(measure, pieces, self.state.values, evaluations, deadline, self.state.save)
            engine = Engine(menu, self.judge, self.budget.limits(menu.original), self._uniform(), self.seed)
            engine.stage = partial(self._tell, engine)
            self.judge.told = partial(self._tell, engine)
            try:
                is_complete = engine.run()
            except _FailedError as error:
                so_far = self._result(engine, menu, build, False)
                raise SearchError(
                    f"search: ended after {len(self.judge.full)} policies: {error}",
                    hint="what was found is in the error's partial"
                    + ("" if self.state.path is None else f"; {self.state.path} keeps all measurements"),
                    partial=so_far,
                ) from error.__cause__
            return self._result(engine, menu, build, is_complete)
        finally:
            self.state.save(at_once=True)

    def _tell(self, engine: Engine, stage: str | None = None) -> None:
        if self.told is None:
            return
        self.stage = stage or self.stage
        best = engine.best(engine.limits)
        costs = {} if best is None else engine.menu.costs(best)
        self.told(Progress(self.stage, self.judge.spent, None if best is None else self.judge.full[best], costs))

    def _menu(self) -> Menu:
        found = None
        if "latency" in self.budget.given:
            found = latencies.measured(
                self.model, self.made, self.inputs, self.budget.device, self.state.times, self.state.save
            )
        table = None if found is None else (found.graph, found.changes)
        menu = menu_of(self.made, list(self.budget.given), table)
        if found is not None:  # shares are of the user's model, which is not that of its graph
            menu = replace(menu, original={**menu.original, "latency": found.model})
            ahead = found.graph - found.model
            changes = [list(own) for own in menu.changes["latency"]]
            changes[0] = [more + ahead for more in changes[0]]
            menu = replace(menu, changes={**menu.changes, "latency": tuple(map(tuple, changes))})
        return menu

    def _uniform(self) -> list[Picks]:
        """The same passes at all places that have them; the others stay as they are, if they may."""
        texts = dict.fromkeys(str(a) for p in self.made.places for a in p.alternatives)
        found: list[Picks] = []
        for text in texts:
            own = [
                next((n for n in p.allowed if str(p.alternatives[n]) == text), p.allowed[0]) for p in self.made.places
            ]
            found.append(tuple(own))
        return list(dict.fromkeys(found))

    # ------------------------------------------------------------ judging
    def _candidate(self, picks: Picks) -> OptimizedModel:
        if self.last is None or self.last[0] != picks:
            self.last = None
            self.last = (picks, self.made.model(picks))
        return self.last[1]

    def _by_user(self, picks: Picks, piece: int) -> Part:
        assert self.evaluate is not None
        module = self._candidate(picks)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            try:
                return scalar(self.evaluate(module), "evaluate", f"with {self.made.told(picks)}"), 1.0
            except Exception as error:
                told = (
                    str(error).splitlines()[0]
                    if isinstance(error, CalibrationError)
                    else f"{type(error).__name__}: {error}"
                )
                raise _FailedError(f"evaluate failed with {self.made.told(picks)}: {told}") from error

    def _by_outputs(self) -> Callable[[Picks, int], Part]:
        """Compare outputs with the original's, which are computed here."""
        original: Picks = (0,) * len(self.made.places)
        module, judged = self._candidate(original), self.parts.judged
        program = self.made.compiled.program
        with compiling():
            arranged = replace(self.made.job, batches=judged).arranged(program)
        first = self._output(module, judged[0])
        kind = kind_of(first, last_module(program.module)) if self.kind == "auto" else self.kind
        self.kind = kind
        made = Divergence(kind, len(judged), self.seed)
        for piece, masks in enumerate(real_tokens(program.module, self.made.found, arranged)):
            made.learn(piece, first if piece == 0 else self._output(module, judged[piece]), masks)

        def measure(picks: Picks, piece: int) -> Part:
            try:
                return made.of(piece, self._output(self._candidate(picks), judged[piece]))
            except AttnoptError as error:
                raise _FailedError(f"{self.made.told(picks)}: {error}") from error

        return measure

    def _output(self, module: nn.Module, batch: CallInputs) -> Any:
        args, kwargs = cloned(batch)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return module(*args, **kwargs)

    # ------------------------------------------------------------ the result
    def _result(
        self, engine: Engine, menu: Menu, build: Callable[[Policy], OptimizedModel], is_complete: bool
    ) -> Search:
        limits, full = engine.limits, self.judge.full
        best = engine.best(limits)
        uniform = [p for p in engine.uniform if p in full and menu.fits(p, limits)]
        front = engine.front()
        predicted: dict[str, float] = {}
        if best is not None and "latency" in limits:
            (ms,) = latencies.check(self.made, [best], self.inputs, self.budget.device, self.state.times["graph"])
            predicted = {"predicted": menu.cost("latency", best), "measured": ms}
        report = SearchReport(
            budget=str(self.budget),
            measure=self._measure_text(),
            limits=dict(limits),
            original=dict(menu.original),
            best=None if best is None else self._tried(menu, best),
            uniform=None if not uniform else self._tried(menu, min(uniform, key=lambda p: full[p])),
            front=tuple(self._tried(menu, p) for p in front),
            evaluations=self.judge.spent,
            policies=len(full),
            seconds=time.monotonic() - self.start,
            is_complete=is_complete,
            latency=predicted,
            refused=tuple((site, passes, str(why)) for site, passes, why in self.made.refused),
            notes=tuple(self._notes(full, engine.original, predicted)),
        )
        for note in report.notes:
            warn(f"search: {note}")
        points = tuple(FrontPoint(menu.costs(p), full[p], self.made.policy(p)) for p in front)
        return Search(report, points, None if best is None else self.made.policy(best), build)

    def _measure_text(self) -> str:
        if self.evaluate is not None:
            return f"evaluate ({getattr(self.evaluate, '__name__', type(self.evaluate).__name__)}), lower is better"
        return {"kl": "KL divergence of the logits", "cosine": "cosine distance of the outputs"}[self.kind]

    def _tried(self, menu: Menu, picks: Picks) -> Tried:
        choices = {
            site: str(place.alternatives[a])
            for place, a in zip(self.made.places, picks, strict=True)
            for site in place.sites
        }
        return Tried(menu.costs(picks), self.judge.full[picks], choices)

    def _notes(self, full: Mapping[Picks, float], original: Picks, latency: Mapping[str, float]) -> Iterable[str]:
        others = [v for p, v in full.items() if p != original]
        if self.evaluate is not None and original in full and others and full[original] > max(others):
            yield (
                f"evaluate gives {full[original]:.4g} for the original and less for all {len(others)} others: lower is better; "
                "return minus the score of a metric that grows"
            )
        if latency and abs(latency["measured"] / latency["predicted"] - 1) > APART:
            yield (
                f"the whole model takes {latency['measured']:.4g} ms, and the sum of its parts is {latency['predicted']:.4g} ms"
            )
