"""The time of a call with each alternative, measured in place: whole models that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.cpu_timing import Times, interleaved, one_thread
from attnopt.errors import ExportError, PolicyError
from attnopt.ir.refusal import Refusal
from attnopt.policy_search.candidates import Alternative, Candidates, Place
from attnopt.policy_search.targets import TARGETS, TOKEN, TORCH, Call, call_of, refusal, require_cache, why

ROUNDS = (5, 25)  # the least and the most calls of each model
SECONDS = 4.0  # of one comparison, if more rounds than the least fit
TOGETHER = 3  # models beside the original in one comparison: so many hold weights of their own at a time

Class = tuple[object, ...]  # equal for alternatives that take equal time
At = tuple[int, int]  # place, alternative


@dataclass(frozen=True)
class Latencies:
    """Milliseconds of the user's model, and what each alternative of each place adds to the original's graph, which takes
    ``graph``.  ``refused``: alternatives that the target cannot run."""

    model: float
    graph: float
    changes: tuple[tuple[float, ...], ...]
    refused: Mapping[At, Refusal]


@dataclass(frozen=True)
class Clock:
    """CPU time of one thread, or on a GPU the time until its work is done."""

    device: str
    target: str = TORCH

    def call(self, model: nn.Module, inputs: CallInputs) -> Call:
        """Raises ExportError."""
        return call_of(self.target, model, inputs, self.device)

    def compare(self, calls: Mapping[str, Call]) -> Times:
        """Seconds of the calls, which take turns."""
        threads: AbstractContextManager[None] = nullcontext() if self._is_gpu else one_thread()
        now = time.perf_counter if self._is_gpu else time.process_time
        with torch.inference_mode(), threads:
            for call in calls.values():
                call()
            start = time.perf_counter()
            for call in calls.values():
                call()
            once = time.perf_counter() - start
            rounds = int(min(max(SECONDS / max(once, 1e-9), ROUNDS[0]), ROUNDS[1]))
            return interleaved(calls, rounds, clock=now)

    @property
    def _is_gpu(self) -> bool:
        return self.device.startswith("cuda")


def measured(
    model: nn.Module,
    made: Candidates,
    inputs: CallInputs,
    clock: Clock,
    known: dict[str, float],
    told: Callable[[], None],
) -> Latencies:
    """Alternatives of attentions of one geometry cost the same: each such class is measured at all of its attentions at once,
    whose difference from the original is divided among them.

    ``known``: milliseconds by the name of what was measured, before and now; ``told`` is called after each comparison.
    Raises PolicyError for a model that the target cannot run.
    """
    classes = _classes(made.places)
    refused: dict[Class, Refusal] = {}
    missing = [c for c in classes if _name(c) not in known]
    if missing or "graph" not in known:
        graph = _original(made, inputs, clock)
    if "graph" not in known:
        models = {"model": clock.call(model, inputs)} if clock.target == TORCH else {}
        times = clock.compare({**models, "graph": graph})
        known |= {name: times.median(name) * 1e3 for name in times.of}
        told()
    for i in range(0, len(missing), TOGETHER):
        calls: dict[Class, Call] = {}
        for c in missing[i : i + TOGETHER]:
            try:
                calls[c] = _everywhere(made, classes[c], inputs, clock)
            except ExportError as error:
                refused[c] = refusal(clock.target, error)
        if not calls:
            continue
        times = clock.compare({"graph": graph, **{_name(c): call for c, call in calls.items()}})
        for c in calls:
            more = (times.ratio(_name(c), "graph") - 1.0) * known["graph"]
            known[_name(c)] = more / len(dict(classes[c]))
        told()
    of = {at: c for c, members in classes.items() for at in members}
    changes = tuple(
        tuple(known.get(_name(of[u, a]), 0.0) if a else 0.0 for a in range(len(place.alternatives)))
        for u, place in enumerate(made.places)
    )
    lost = {at: refused[c] for at, c in of.items() if c in refused}
    return Latencies(known.get("model", known["graph"]), known["graph"], changes, lost)


def check(made: Candidates, model: nn.Module, inputs: CallInputs, clock: Clock, graph: float) -> float:
    """Milliseconds of a whole rewritten model, by its ratio to the original's graph in the same rounds."""
    calls = {"graph": _original(made, inputs, clock), "model": clock.call(model, inputs)}
    return clock.compare(calls).ratio("model", "graph") * graph


def _original(made: Candidates, inputs: CallInputs, clock: Clock) -> Call:
    try:
        return clock.call(made.model((0,) * len(made.places)), inputs)
    except ExportError as error:
        raise PolicyError(
            f"search: the model cannot run in {TARGETS[clock.target]}: {why(error)}", hint=error.hint
        ) from error


def _everywhere(made: Candidates, members: Sequence[At], inputs: CallInputs, clock: Clock) -> Call:
    """The model with these members at their places; of two at one place, the last.  Raises ExportError."""
    at, places = dict(members), range(len(made.places))
    if clock.target == TOKEN:  # layers that are all alike may share a cache which one of them alone does not fit
        require_cache(made.model(tuple(at[u] if u == min(at) else 0 for u in places)))
    return clock.call(made.model(tuple(at.get(u, 0) for u in places)), inputs)


def _classes(places: Sequence[Place]) -> dict[Class, list[At]]:
    found: dict[Class, list[At]] = {}
    for u, place in enumerate(places):
        for a, alternative in enumerate(place.alternatives):
            if a:
                found.setdefault(_class(alternative), []).append((u, a))
    return found


def _class(alternative: Alternative) -> Class:
    """What the time depends on: the sizes before and after, and how much of the map is computed by what."""
    parts: list[object] = []
    for d in alternative.decisions:
        site, before, after = d.found.site, d.found.site.spec, d.site.spec
        widths = tuple(
            tuple(site.parameters[p.weight].shape) for _, p in sorted(site.projections.items()) if p.weight is not None
        )
        density = after.pattern.density(site.q_len, site.kv_len, num_heads=after.num_heads)
        plan = d.plan
        parts.append(
            (
                (before.num_heads, before.num_kv_heads, before.head_dim, before.value_dim, before.features),
                (site.q_len, site.kv_len, site.batch, widths),
                (after.num_heads, after.num_kv_heads, round(density, 2), after.features, after.is_constant),
                after.visible_pattern.look_back,
                None if plan is None else (plan.backend.name, round(plan.rows, 2)),
                tuple(type(edit).__name__ for edit in (*after.before, *after.after)),
                tuple(p.name for p in alternative.passes),
            )
        )
    return tuple(parts)


def _name(of_class: Class) -> str:
    return repr(of_class)
