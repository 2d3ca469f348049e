"""Attention recall of blocks chosen at run time, measured on data."""

from __future__ import annotations

from dataclasses import replace

from attnopt.capture.program import Program
from attnopt.compiler.decide import Decision
from attnopt.compiler.job import Job
from attnopt.fit.attention_recall import measured, told
from attnopt.match.prove import example_values


def with_recall(job: Job, program: Program, decisions: list[Decision]) -> list[Decision]:
    """The attention recall of sites with blocks chosen at run time, as notes; of fitted choices the pass has told it."""
    specs = {
        d.found.raised.node: replace(d.found.raised.spec, selection=d.site.spec.selection)
        for d in decisions
        if d.plan is not None and d.site.spec.selection is not None and not d.site.spec.selection.fitted
    }
    if not specs:
        return decisions
    inputs = job.arranged(program) or [program.inputs]
    values = [list(example_values(program.module, *given).values()) for given in inputs]
    if not all(values):
        return decisions
    own = "the calibration data" if job.peers is None else "this process's share of the calibration data"
    data = own if job.batches else "the example inputs"
    found = measured(program.module, specs, values)
    notes = {node: told(mass, specs[node].heads, data) for node, mass in found.items()}
    return [replace(d, notes=(*d.notes, note)) if (note := notes.get(d.found.raised.node)) else d for d in decisions]
