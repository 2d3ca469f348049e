"""Attention recall of blocks chosen at run time, measured on data."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from attnopt.capture.program import Program
from attnopt.compiler.decide import Decision
from attnopt.compiler.job import Job
from attnopt.fit.attention_recall import measured
from attnopt.match.prove import example_values


def with_recall(job: Job, program: Program, decisions: list[Decision]) -> list[Decision]:
    """The attention recall of sites with blocks chosen at run time, as notes."""
    specs = {
        d.found.raised.node: replace(d.found.raised.spec, selection=d.site.spec.selection)
        for d in decisions
        if d.plan is not None and d.site.spec.selection is not None
    }
    if not specs:
        return decisions
    inputs = job.arranged(program) or [program.inputs]
    values = [list(example_values(program.module, *given).values()) for given in inputs]
    if not all(values):
        return decisions
    data = "calibration data" if job.batches else "example inputs"
    found = measured(program.module, specs, values)
    return [
        replace(d, notes=(*d.notes, _kept(found[d.found.raised.node], data))) if d.found.raised.node in found else d
        for d in decisions
    ]


def _kept(mass_H: Tensor, data: str) -> str:
    least = int(mass_H.argmin())
    return f"{mass_H.mean():.1%} attention recall on the {data}, lowest in head {least}: {mass_H[least]:.1%}"
