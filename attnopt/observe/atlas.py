"""An atlas of heads: what each of them does on data, in one view."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.notation import shortened
from attnopt.base.options import whole
from attnopt.base.progress import working
from attnopt.capture.calibration import Batch, Calibration
from attnopt.compiler.check import all_fitting
from attnopt.compiler.chosen_sites import matches, site_globs
from attnopt.compiler.graph_probe import GraphProbe
from attnopt.compiler.head_results import HeadImportance
from attnopt.compiler.importance import TOLD, several_scores
from attnopt.errors import CalibrationError, PolicyError
from attnopt.fit.importance_methods import importance
from attnopt.ir.importance import Importance, ModelImportance
from attnopt.ir.refusal import Refusal
from attnopt.ir.statistic import Statistic
from attnopt.observe.collect import Run, first_of, number_of, vary
from attnopt.observe.distance_mass import DistanceMass
from attnopt.observe.head_kinds import kinds_of
from attnopt.observe.map_grid import MeanMaps
from attnopt.observe.taps import MapBlocks, Question, Tap
from attnopt.onnx.load.model_or_file import opened
from attnopt.report.atlas import Atlas, HeadMaps, Missing
from attnopt.report.head_effects import HeadEffects
from attnopt.statistics.distance import Distance, Locality

What = str | Importance | Statistic[Any] | HeadImportance | HeadEffects
Numbers = Mapping[str, tuple[float, ...]]


def atlas(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    batches: Iterable[Batch] | Calibration,
    what: What | Sequence[What] = "locality",
    sites: object = "*",
    *,
    clusters: int = 6,
    cells: int = 32,
    distance: Distance | None = None,
    seed: int = 0,
) -> Atlas:
    """The mean attention map of every head, how far it looks, what kind of head it is, and numbers of it.

    ``batches``: as of ``attnopt.collect``, also a generator, and of any lengths.  ``what``: statistics by which the heads can
    be coloured and sorted: methods of ``attnopt.head_importance`` by name or as instances, or its results and those of
    ``attnopt.patch``, where they need a loss, a behaviour or other data.  ``sites``: names or globs.

    Maps are means over sequences, without padding.  Sequences of one length up to ``cells`` keep a row for each query and a
    column for each key; others are brought to ``cells`` rows and columns of the whole sequence.  ``distance``: how far apart
    tokens are, such as ``Distance(grid=(14, 14), prefix=1)`` of an image; by default in a row.  ``clusters``: into how many
    kinds of heads k-means divides the maps and profiles, at most; ``seed``: of its starts.

    Memory is that of one layer of one batch, and of the result.  Other statistics than "distance" and "locality" keep all
    batches.  What a statistic cannot measure of an attention is in ``missing``.
    Raises PolicyError for names that there are not, CalibrationError for no or unfit batches, CaptureError.
    """
    whole("atlas", "clusters", clusters, least=1)
    whole("atlas", "cells", cells, least=2)
    how = Distance() if distance is None else distance
    if not isinstance(how, Distance):
        raise PolicyError(
            f"atlas: invalid value distance={how!r}: expected an attnopt.statistics.Distance",
            hint="for instance Distance(grid=(14, 14), prefix=1)",
        )
    asked = _Asked.of(what, how)
    data = Calibration.of(batches) if asked.measured else batches
    stream, first = first_of("atlas", data)
    varying = vary((*data, *asked.more)) if isinstance(data, Calibration) else vary(data)
    with compiling():
        opened_model = model.module() if isinstance(model, ExportedProgram) else opened(model, first)
        question = Question("atlas", ("weights",))
        run = Run(opened_model, first, "auto" if varying else None, question, site_globs("atlas", sites), None)
    read: dict[str, _Read] = {}
    with working("reading attention maps", number_of(data)) as step:
        for number, batch in enumerate(stream):
            with compiling():
                for tap, values in run.on(batch, number):
                    assert isinstance(tap, Tap)
                    if tap.name not in read:
                        read[tap.name] = _Read.of(tap, run.numbers(tap)[0], how, cells)
                    read[tap.name].add(tap.map_blocks(run.program.module, values), number)
            step()
    with compiling():
        measured = _measured(run, list(read), asked, data, seed)
    return _made(run, read, asked, measured, clusters, seed)


@dataclass(frozen=True)
class _Asked:
    """Statistics by their names: those that the distances give, those to measure, and those that are results already."""

    of_distance: Mapping[str, bool]  # whether negated
    measured: Mapping[str, Importance]
    given: Mapping[str, tuple[Mapping[str, Sequence[int]], Numbers]]  # heads and numbers by site
    order: tuple[str, ...]

    @classmethod
    def of(cls, what: object, distance: Distance) -> _Asked:
        """Raises PolicyError."""
        single = isinstance(what, (str, Importance, Statistic, HeadImportance, HeadEffects))
        listed = [what] if single or not isinstance(what, Iterable) else list(what)
        of_distance: dict[str, bool] = {}
        measured: dict[str, Importance] = {}
        given: dict[str, tuple[Mapping[str, Sequence[int]], Numbers]] = {}
        order: list[str] = []
        for one in listed:
            if isinstance(one, (HeadImportance, HeadEffects)):
                name, found = _named(one)
                given[name] = found
                order.append(name)
                continue
            how = importance("atlas", "what", one)
            name = shortened(how.to_json(), TOLD)
            order.append(name)
            if how == distance or (how == Locality() and distance == Distance()):
                of_distance[name] = how != distance
                continue
            if isinstance(how, ModelImportance) and how.needs_loss:
                raise PolicyError(
                    f"atlas: {how.name!r} needs a loss",
                    hint="pass what attnopt.head_importance(model, batches, ..., loss=...) returns",
                )
            measured[name] = how
        if twice := next((name for name in order if order.count(name) > 1), None):
            raise PolicyError(f"atlas: two statistics in what have the name {twice!r}", hint="ask for each once")
        return cls(of_distance, measured, given, tuple(order))

    @property
    def more(self) -> tuple[CallInputs, ...]:
        """The batches that statistics bring."""
        return tuple(chain.from_iterable(_brought(how) for how in self.measured.values()))


def _named(found: HeadImportance | HeadEffects) -> tuple[str, tuple[Mapping[str, Sequence[int]], Numbers]]:
    if isinstance(found, HeadImportance):
        return found.method, (found.heads, found.scores)
    return f"{found.direction} {found.paths}".rstrip(), (found.heads, found.metrics)


def _brought(how: Importance) -> tuple[CallInputs, ...]:
    more = how.more if isinstance(how, ModelImportance) else ()
    return Calibration.of(more).batches if more else ()


@dataclass
class _Read:
    """What was read of one attention so far."""

    heads: tuple[int, ...]
    maps: MeanMaps
    reach: DistanceMass | None
    why: str  # there is no distance

    @classmethod
    def of(cls, tap: Tap, heads: tuple[int, ...], how: Distance, cells: int) -> _Read:
        refused = how.check(tap.found.site)
        reach = DistanceMass(how, tap.found.site) if refused is None else None
        return cls(heads, MeanMaps(cells), reach, "" if refused is None else _told(refused))

    def add(self, found: MapBlocks, number: int) -> None:
        self.maps.add(self._watched(found, number), found.real, found.seen)

    def _watched(self, found: MapBlocks, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for rows, weights in found.blocks:
            if not bool(torch.isfinite(weights).all()):
                raise CalibrationError(
                    f"atlas: attention weights are not finite on batch {number}",
                    hint="remove that batch, or fix the weights of the model",
                )
            if self.reach is not None:
                self.reach.add(rows, weights, found.real)
            yield rows, weights


def _measured(
    run: Run, names: Sequence[str], asked: _Asked, data: object, seed: int
) -> Mapping[str, Mapping[str, tuple[float, ...] | Refusal]]:
    """By statistic and site, of what neither distances nor results give."""
    if not asked.measured:
        return {}
    assert isinstance(data, Calibration)
    found = [f for f in run.findings.found if f.site.name in names]

    def fitted(batches: Iterable[CallInputs]) -> list[CallInputs]:
        return all_fitting(run.program, run.signature, batches)

    probe = GraphProbe(run.program, found, fitted(data), seed=seed)
    probed = [(how, replace(probe, more=fitted(_brought(how)))) for how in asked.measured.values()]
    return dict(zip(asked.measured, several_scores(probed), strict=True))


@dataclass
class _Numbers:
    """The statistics, and what they are missing of."""

    found: dict[str, dict[str, tuple[float, ...]]]
    missing: list[Missing] = field(default_factory=list)

    def add(self, method: str, site: str, numbers: tuple[float, ...] | str) -> None:
        if isinstance(numbers, str):
            self.missing.append(Missing(site, method, numbers))
        else:
            self.found[method][site] = numbers


def _made(
    run: Run,
    read: Mapping[str, _Read],
    asked: _Asked,
    measured: Mapping[str, Mapping[str, tuple[float, ...] | Refusal]],
    clusters: int,
    seed: int,
) -> Atlas:
    told = {site: r for site, r in read.items() if r.maps.sequences}
    if not told:
        raise CalibrationError("atlas: every token of the batches is padding", hint="pass batches of real inputs")
    curves = {site: None if r.reach is None else r.reach.curves() for site, r in told.items()}
    maps = {site: r.maps.mean() for site, r in told.items()}
    kinds = kinds_of(list(maps.values()), list(curves.values()), clusters, seed)
    numbers = _Numbers({method: {} for method in asked.order})
    own = zip(kinds.clusters, kinds.places, strict=True)
    sites: dict[str, HeadMaps] = {}
    for site, r in told.items():
        of_heads = [next(own) for _ in r.heads]
        queries, keys = r.maps.lengths
        own_clusters, own_places = (c for c, _ in of_heads), (place for _, place in of_heads)
        sites[site] = HeadMaps(r.heads, maps[site], queries, keys, curves[site], tuple(own_clusters), tuple(own_places))
        if r.reach is None:
            numbers.missing.append(Missing(site, "profile", r.why))
        for method, is_negated in asked.of_distance.items():
            numbers.add(method, site, _distances(r, is_negated))
        for method, scores in measured.items():
            one = scores[site]
            numbers.add(method, site, _told(one) if isinstance(one, Refusal) else one)
        for method, (heads, results) in asked.given.items():
            numbers.add(method, site, _given(heads.get(site), results.get(site), r.heads))
    near = [m for m in run.findings.near_misses if any(matches(glob, m.name) for glob in run.globs)]
    unread = [Missing(m.name, "map", f"no attention was recognised: {_told(m.refusal)}") for m in near]
    unread += [Missing(site, "map", "every token is padding") for site in read if site not in told]
    return Atlas(sites, numbers.found, (*numbers.missing, *unread), max(r.maps.sequences for r in told.values()))


def _distances(r: _Read, is_negated: bool) -> tuple[float, ...] | str:
    if r.reach is None:
        return r.why
    if r.reach.blind:
        return f"heads {', '.join(str(r.heads[p]) for p in r.reach.blind)} have no attention between the tokens"
    return tuple(-d if is_negated else d for d in r.reach.mean())


def _given(
    heads: Sequence[int] | None, numbers: Sequence[float] | None, wanted: Sequence[int]
) -> tuple[float, ...] | str:
    if heads is None or numbers is None:
        return "the result has no numbers of it"
    of = dict(zip(heads, numbers, strict=True))
    gone = [h for h in wanted if h not in of]
    return f"the result has no number of heads {', '.join(map(str, gone))}" if gone else tuple(of[h] for h in wanted)


def _told(refusal: Refusal) -> str:
    parts = (
        f"expected {refusal.expected}" if refusal.expected else "",
        f"found {refusal.found}" if refusal.found else "",
    )
    return ", ".join(p for p in parts if p) or refusal.code
