"""A check of a rewritten model against behaviours that it has to keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import as_called, compiling
from attnopt.base.options import number
from attnopt.base.user_warning import warn
from attnopt.capture.calibration import Batch, Calibration, as_inputs
from attnopt.capture.run_unchanged import cloned, kept
from attnopt.compiler.analyze_batches import analyze_batches
from attnopt.compiler.head_graph import head_graph
from attnopt.compiler.head_sweep import HeadSweep, with_each
from attnopt.errors import PolicyError
from attnopt.intervene.metric import Metric, measured, require_callable, scalar
from attnopt.ir.head_edits import Scaled
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.match.find import Found
from attnopt.model import OptimizedModel

TOLD = 4  # heads in a warning


@dataclass(frozen=True)
class Behaviour:
    """What a model has to keep doing: ``metric`` of its output on ``inputs`` is a scalar, higher is better.

    ``allowed``: the largest fraction of it that may be lost.  Raises PolicyError."""

    name: str
    inputs: Batch = field(repr=False)
    metric: Metric = field(repr=False)
    allowed: float = 0.1

    def __post_init__(self) -> None:
        require_callable(f"behaviour {self.name}", "metric", self.metric)
        if number("Behaviour", "allowed", self.allowed) < 0:
            raise PolicyError(f"Behaviour: invalid value allowed={self.allowed!r}: expected a number of at least 0")


@dataclass(frozen=True)
class Kept:
    """A behaviour before and after the rewrite.  ``heads``: where more was lost than allowed, (site, head, the metric of the
    original with this head alone silenced) of the heads that the rewrite removes, replaces or restricts, the most needed
    first."""

    behaviour: str
    before: float
    after: float
    is_kept: bool
    heads: tuple[tuple[str, int, float], ...] = ()

    @property
    def drop(self) -> float:
        """The fraction of the metric that is lost; below 0 if it rose."""
        return (self.before - self.after) / max(abs(self.before), 1e-300)

    def __str__(self) -> str:
        told = f"{self.behaviour}: {self.before:.4g} before, {self.after:.4g} after ({-self.drop:+.0%})"
        each = ", ".join(f"head {h} of {site} (alone: {value:.4g})" for site, h, value in self.heads[:TOLD])
        return f"{told}; of the heads that were removed, replaced or restricted, it needs {each}" if each else told


def guard(model: nn.Module, fast: OptimizedModel, behaviours: Iterable[Behaviour]) -> tuple[Kept, ...]:
    """Measure ``behaviours`` of ``model`` and of ``fast``, its rewritten form, and warn of each that lost more than it may.

    The warning names the heads that the rewrite removes, replaces or restricts to fewer keys and whose absence alone costs the
    behaviour most: candidates for ``PruneHeads(protect=...)``, or for leaving them out of a window.  Returns a ``Kept`` for each
    behaviour.  Raises PolicyError if ``fast`` was made from another model, CalibrationError for a metric that gives no finite
    number.
    """
    asked = list(behaviours)
    if not asked:
        raise PolicyError("guard: no behaviour is given", hint="pass attnopt.Behaviour objects")
    found = _measured(model, fast, asked)
    for one in found:
        if not one.is_kept:
            warn(f"guard: {one}")
    return found


@compiling()
def _measured(model: nn.Module, fast: OptimizedModel, asked: Sequence[Behaviour]) -> tuple[Kept, ...]:
    inputs = [as_inputs(b.inputs, f"inputs of {b.name}") for b in asked]
    analyzed, batches = analyze_batches(model, Calibration(tuple(inputs)))
    changed = _changed(analyzed.findings.found, fast.sites)
    sweep = HeadSweep(analyzed.program, head_graph(analyzed.program.module, analyzed.findings.found), changed)
    made: list[Kept] = []
    with torch.no_grad():
        for b, given, batch in zip(asked, inputs, batches, strict=True):
            before = measured(b.metric, sweep.output(batch), f"of {b.name} in the model")
            after = _after(b, fast, given)
            is_kept = before - after <= b.allowed * abs(before)
            heads = () if is_kept else _needed(sweep, b, batch, before, changed)
            made.append(Kept(b.name, before, after, is_kept, heads))
    return tuple(made)


def _after(b: Behaviour, fast: OptimizedModel, given: CallInputs) -> float:
    args, kwargs = cloned(given)
    with kept(fast), as_called():
        return scalar(b.metric(fast(*args, **kwargs)), "metric", f"of {b.name} in the rewritten model")


def _changed(found: Sequence[Found], sites: Sequence[Site]) -> dict[str, list[int]]:
    """The heads that are gone, or that see other keys than before, by site."""
    now = {s.name: s.spec for s in sites}
    if unknown := [f.site.name for f in found if f.site.name not in now]:
        raise PolicyError(
            f"guard: the rewritten model has no attention {unknown[0]!r}", hint="pass the model that it was made from"
        )
    every = {f.site.name: _lost(f.site.spec, now[f.site.name]) for f in found}
    return {name: heads for name, heads in every.items() if heads}


def _lost(before: AttentionSpec, after: AttentionSpec) -> list[int]:
    """The heads that are gone or replaced, or that see fewer keys, whether these are known or chosen in each call."""
    new = [edit for edit in after.after if edit not in before.after]
    gone = {h for edit in new for h in edit.overwritten}
    gone |= {h for edit in new if isinstance(edit, Scaled) for h, gain in edit.gains if gain == 0}
    places = {h: i for i, h in enumerate(after.heads)}

    def sees_fewer(i: int, place: int) -> bool:
        pairs = None if after.segments is None else after.segments.pairs
        in_segments = after.segments is not None and (pairs is None or pairs[place] is not None)
        is_other = before.pattern.for_head(i) != after.pattern.for_head(place)
        return in_segments or is_other or after.selection != before.selection

    return [h for i, h in enumerate(before.heads) if h not in places or h in gone or sees_fewer(i, places[h])]


def _needed(
    sweep: HeadSweep, b: Behaviour, batch: CallInputs, before: float, changed: Mapping[str, Sequence[int]]
) -> tuple[tuple[str, int, float], ...]:
    lost: list[tuple[str, int, float]] = []
    for name, o, rest in sweep.sites(batch):
        silenced = with_each(o, torch.zeros_like(o), changed[name])
        tell = partial(measured, b.metric)
        lost += [
            (name, h, tell(output, f"of {b.name} without head {h} of {name}"))
            for h, output in zip(changed[name], rest(silenced), strict=True)
        ]
    return tuple(sorted((one for one in lost if one[2] < before), key=lambda one: one[2]))
