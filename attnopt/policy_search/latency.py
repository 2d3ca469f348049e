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
from attnopt.policy_search.candidates import Alternative, Candidates, Place
from attnopt.policy_search.menu import Picks

ROUNDS = (5, 25)  # the least and the most calls of each model
SECONDS = 4.0  # of one comparison, if more rounds than the least fit
TOGETHER = 3  # models beside the original in one comparison: so many hold weights of their own at a time

Class = tuple[object, ...]  # equal for alternatives that take equal time


@dataclass(frozen=True)
class Latencies:
    """Milliseconds of the user's model, and what each alternative of each place adds to the original's graph, which takes
    ``graph``."""

    model: float
    graph: float
    changes: tuple[tuple[float, ...], ...]


def measured(
    model: nn.Module,
    made: Candidates,
    inputs: CallInputs,
    device: str,
    known: dict[str, float],
    told: Callable[[], None],
) -> Latencies:
    """Alternatives of attentions of one geometry cost the same: each such class is measured at all of its attentions at once,
    whose difference from the original is divided among them.

    ``known``: milliseconds by the name of what was measured, before and now; ``told`` is called after each comparison.
    """
    clock = Clock(device)
    original: Picks = (0,) * len(made.places)
    if "model" not in known:
        times = clock.compare({"model": model, "graph": made.model(original)}, inputs)
        known |= {name: times.median(name) * 1e3 for name in times.of}
        told()
    classes = _classes(made.places)
    missing = [c for c in classes if _name(c) not in known]
    for i in range(0, len(missing), TOGETHER):
        some = missing[i : i + TOGETHER]
        models: dict[str, nn.Module] = {"graph": made.model(original)}
        models |= {_name(c): made.model(_everywhere(made.places, classes[c])) for c in some}
        times = clock.compare(models, inputs)
        for c in some:
            more = (times.ratio(_name(c), "graph") - 1.0) * known["graph"]
            known[_name(c)] = more / len(dict(classes[c]))
        told()
    of = {at: _name(c) for c, members in classes.items() for at in members}
    changes = tuple(
        tuple(known[of[u, a]] if a else 0.0 for a in range(len(place.alternatives)))
        for u, place in enumerate(made.places)
    )
    return Latencies(known["model"], known["graph"], changes)


def check(made: Candidates, picks: Picks, inputs: CallInputs, device: str, graph: float) -> float:
    """Milliseconds of the whole model, by its ratio to the original's graph in the same rounds."""
    models = {"graph": made.model((0,) * len(made.places)), "picks": made.model(picks)}
    return Clock(device).compare(models, inputs).ratio("picks", "graph") * graph


@dataclass(frozen=True)
class Clock:
    """CPU time of one thread, or on a GPU the time until its work is done."""

    device: str

    def compare(self, models: Mapping[str, nn.Module], inputs: CallInputs) -> Times:
        """Seconds of the calls, which take turns."""
        calls = {name: self._call(model, inputs) for name, model in models.items()}
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

    def _call(self, model: nn.Module, inputs: CallInputs) -> Callable[[], object]:
        def call() -> object:
            made = model(*inputs.args, **inputs.kwargs)
            if self._is_gpu:
                torch.cuda.synchronize()
            return made

        return call


def _classes(places: Sequence[Place]) -> dict[Class, list[tuple[int, int]]]:
    """(place, alternative) by class."""
    found: dict[Class, list[tuple[int, int]]] = {}
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
                None if plan is None else (plan.backend.name, round(plan.rows, 2)),
                tuple(type(edit).__name__ for edit in (*after.before, *after.after)),
                tuple(p.name for p in alternative.passes),
            )
        )
    return tuple(parts)


def _name(of_class: Class) -> str:
    return repr(of_class)


def _everywhere(places: Sequence[Place], members: Sequence[tuple[int, int]]) -> Picks:
    """The members of a class at their places; of two at one place, the last."""
    at = dict(members)
    return tuple(at.get(u, 0) for u in range(len(places)))
