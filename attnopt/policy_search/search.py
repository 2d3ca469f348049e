"""``attnopt.search``: the entry point."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from torch import nn

from attnopt.api import optimize
from attnopt.base.call_inputs import CallInputs
from attnopt.base.options import choice, number, whole
from attnopt.base.user_warning import warn
from attnopt.capture.calibration import Batch, Calibration
from attnopt.compiler.policy import Policy
from attnopt.errors import PolicyError, SearchError
from attnopt.intervene.metric import require_callable
from attnopt.ir.peers import Peers
from attnopt.model import OptimizedModel
from attnopt.policy_search.budget import Budget
from attnopt.policy_search.candidates import texts_of
from attnopt.policy_search.data import length_of
from attnopt.policy_search.divergence import KINDS
from attnopt.policy_search.engine import Engine
from attnopt.policy_search.judge import Judge
from attnopt.policy_search.menu import Picks
from attnopt.policy_search.outputs import Candidate
from attnopt.policy_search.problem import Evaluate, FailedError, Problem, Task, problem
from attnopt.policy_search.refits import REFITS
from attnopt.policy_search.result import FrontPoint, Search
from attnopt.policy_search.state import data_mark, model_mark
from attnopt.report.policy_search import SearchReport, Tried

APART = 0.05  # relative difference of measured and predicted latency that a warning tells
SHORT = 0.5  # of the length whose costs count: data below that is told


@dataclass(frozen=True)
class Progress:
    """What a search is at: its stage, how many evaluations are done, and the best within the budget so far, with its costs."""

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
    peers: Peers | None = None,
) -> Search:
    """The policy within ``budget`` with which the model diverges least from itself.

    ``policy``: one that leaves choices open; None: windows, fewer key/value heads and fewer heads, wherever they apply.
    ``args``, ``kwargs``: example inputs, as of ``optimize``; costs are those of a call of their sizes, or of ``budget.at``.
    ``calibration``: batches; a quarter is held back to judge on, and the choices are fitted to the rest.  Without a choice that
    is fitted, all are judged on.  Encoders that read token ids are judged on as many batches of random tokens, too.
    ``evaluate``: a function of a rewritten model that returns one number; LOWER is better (return minus the score for a metric
    that grows).  By default the divergence of the outputs, by ``divergence``: "kl" between logits, "cosine" distance of
    embeddings, or "auto", which is "kl" for an output that the model calls logits.
    ``evaluations``: about how many times a model is judged on all held-back data; ``minutes``: when to
    end it; uniform policies are judged in any case.
    ``resume``: a file that keeps all measurements: a search that was ended goes on from there.
    ``progress`` is called after each step.  ``seed``: the same seed and measured times give the same result.
    ``peers``: ``attnopt.distributed.peers(mesh)``: processes that call this with the same arguments, all data included, and
    divide the judging; each gets the result of one alone.  The clock of the first counts, and only the first writes the state.

    Uniform policies that fit always compete.  Raises PolicyError for a budget that no policy meets, which names the least
    possible, and for choices that every attention refuses; SearchError if ``evaluate`` raises or returns no finite number, with
    what was found so far in ``partial``.
    """
    start = time.monotonic()
    with nullcontext() if peers is None else peers.working({}):  # then a mistake on one rank ends all
        _check(budget, evaluate, divergence, evaluations, minutes, args or kwargs)
        data = Calibration.of(calibration)
        given = {} if peers is None else _given(model, policy, data, budget, evaluations, seed)

    def build(chosen: Policy) -> OptimizedModel:
        return optimize(model, chosen, args, kwargs, dynamic_shapes=dynamic_shapes, calibration=data, seed=seed)

    with nullcontext() if peers is None else peers.working(given):
        inputs = CallInputs.of(args, kwargs)
        task = Task(model, policy, inputs, data, budget, evaluate, divergence, dynamic_shapes, seed)
        asked = problem(task, resume, peers)
        judge = Judge(asked.measure, asked.pieces, asked.state.values, evaluations, saved=asked.state.save)
        judge.together = 1 if peers is None else peers.count
        if minutes is not None:
            judge.is_late = partial(_is_late, asked, start + 60 * minutes)
        refits = asked.refit_judge(judge.is_late)
        engine = Engine(asked.menu, judge, asked.limits, asked.uniform, seed, refits=refits, fits=len(REFITS))
        if progress is not None:
            told = _Told(engine, progress)
            engine.stage, judge.told = told.at, told
        return _run(asked, engine, partial(_result, asked, engine, build, start))


def _run(asked: Problem, engine: Engine, result: Callable[[bool], Search]) -> Search:
    try:
        ended = engine.run()
        engine.recall()
        return result(ended)
    except FailedError as error:
        kept = "" if asked.state.path is None else f"; {asked.state.path} keeps all measurements"
        raise SearchError(
            f"search: ended after {len(engine.judge.full)} policies: {error}",
            hint=f"what was found is in the error's partial{kept}",
            partial=result(False),
        ) from error.__cause__
    finally:
        asked.state.save(at_once=True)


def _is_late(asked: Problem, deadline: float) -> bool:
    """By the clock of any process, so that all end together."""
    return any(asked.everyone(time.monotonic() >= deadline))


def _given(
    model: nn.Module, policy: object, data: Calibration, budget: Budget, evaluations: int, seed: int
) -> dict[str, object]:
    """What processes that judge together have to agree on."""
    return {
        "the policy": None if policy is None else Policy.of(policy).to_json(),
        "the budget": (budget, evaluations, seed),
        "the calibration data": data_mark(data),
        "the weights": model_mark(model),
    }


def _check(
    budget: object, evaluate: object, divergence: str, evaluations: object, minutes: object, given: object
) -> None:
    if not isinstance(budget, Budget):
        raise PolicyError(f"search: budget is a {type(budget).__name__}, expected attnopt.Budget(...)")
    if evaluate is not None:
        require_callable("search", "evaluate", evaluate)
    choice("search", "divergence", divergence, KINDS)
    whole("search", "evaluations", evaluations, least=1)
    if minutes is not None and number("search", "minutes", minutes) <= 0:
        raise PolicyError(f"search: invalid value minutes={minutes!r}: expected a number above 0")
    if not given:
        raise PolicyError("search needs example inputs", hint="pass args or kwargs")


@dataclass
class _Told:
    """Tells the user how far the search is."""

    engine: Engine
    progress: Callable[[Progress], None]
    stage: str = ""

    def at(self, stage: str) -> None:
        self.stage = stage
        self()

    def __call__(self) -> None:
        engine = self.engine
        best = engine.best(engine.limits)
        value, costs = (None, {}) if best is None else (engine.value(best), engine.menu.costs(best))
        self.progress(Progress(self.stage, engine.spent, value, costs))


# ------------------------------------------------------------ the result
def _result(
    asked: Problem, engine: Engine, build: Callable[[Policy], OptimizedModel], start: float, is_complete: bool
) -> Search:
    menu, limits, full = asked.menu, asked.limits, engine.judge.full
    best, front = engine.best(limits), engine.front()
    uniform = [p for p in engine.uniform if p in full and menu.fits(p, limits)]
    latency: dict[str, float] = {}
    if best is not None and "latency" in limits:
        latency = {"predicted": menu.cost("latency", best), "measured": asked.check(_candidate(engine, best))}
    report = SearchReport(
        budget=str(asked.task.budget),
        measure=_measure(asked),
        limits=dict(limits),
        original=dict(menu.original),
        best=None if best is None else _tried(asked, _candidate(engine, best), engine),
        uniform=None
        if not uniform
        else _tried(asked, min(map(Candidate, uniform), key=lambda c: full[c.picks]), engine),
        front=tuple(_tried(asked, _candidate(engine, p), engine) for p in front),
        evaluations=engine.spent,
        policies=engine.policies,
        seconds=time.monotonic() - start,
        is_complete=is_complete,
        latency=latency,
        refused=tuple((site, passes, str(why)) for site, passes, why in asked.made.refused),
        notes=tuple(_notes(asked, engine, latency)),
    )
    for note in report.notes:
        warn(f"search: {note}")
    policies = {p: asked.outputs.policy(_candidate(engine, p)) for p in ([] if best is None else [best]) + front}
    points = tuple(FrontPoint(menu.costs(p), engine.value(p), policies[p]) for p in front)
    return Search(report, points, None if best is None else policies[best], build)


def _candidate(engine: Engine, picks: Picks) -> Candidate:
    return Candidate(picks, engine.refit_of(picks))


def _measure(asked: Problem) -> str:
    if asked.task.evaluate is not None:
        return f"evaluate ({getattr(asked.task.evaluate, '__name__', type(asked.task.evaluate).__name__)}), lower is better"
    on = ", on texts and on random tokens" if asked.judged.has_random_tokens else ""
    return ("KL divergence of the logits" if asked.kind == "kl" else "cosine distance of the outputs") + on


def _tried(asked: Problem, candidate: Candidate, engine: Engine) -> Tried:
    picks = candidate.picks
    choices = {
        site: texts_of((*place.alternatives[a].passes, *asked.outputs.more(candidate))) or "as it is"
        for place, a in zip(asked.made.places, picks, strict=True)
        for site in place.sites
    }
    return Tried(asked.menu.costs(picks), engine.value_with(picks, candidate.refit), choices)


def _notes(asked: Problem, engine: Engine, latency: Mapping[str, float]) -> Iterator[str]:
    full, original = engine.judge.full, engine.original
    others = [v for p, v in full.items() if p != original]
    if asked.task.evaluate is not None and original in full and others and full[original] > max(others):
        yield (
            f"evaluate gives {full[original]:.4g} for the original and less for all {len(others)} others, and lower is better: "
            "return minus the score for a metric that grows"
        )
    longest, counted = max(map(length_of, asked.judged.pieces)), length_of(asked.inputs)
    if asked.task.evaluate is None and longest < SHORT * counted:
        yield (
            f"the calibration data has at most {longest} tokens in a sequence, and costs are those of {counted}: what hides only "
            "distant keys seems to change nothing; give longer texts, or Budget(at=...)"
        )
    if latency and abs(latency["measured"] / latency["predicted"] - 1) > APART:
        yield (
            f"the whole model takes {latency['measured']:.4g} ms, and the sum of its parts is {latency['predicted']:.4g} ms"
        )
