"""Activation patching: one run of a model with the output of one head from another run, for one head after another."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from attnopt.base.compile_lock import compiling
from attnopt.base.options import choice
from attnopt.base.progress import working
from attnopt.capture.calibration import Batch
from attnopt.compiler.chosen_sites import Sites
from attnopt.compiler.head_graph import head_graph
from attnopt.compiler.head_sweep import HeadSweep, with_each
from attnopt.intervene.metric import Metric, measured, require_callable
from attnopt.intervene.runs import DIRECTIONS, chosen_heads, two_runs
from attnopt.report.head_effects import HeadEffects

RUNS = ("clean", "corrupted")


@compiling()
def patch(
    model: nn.Module,
    clean: Batch,
    corrupted: Batch,
    *,
    metric: Metric,
    sites: Sites = "*",
    heads: Iterable[int] | None = None,
    direction: str = "denoising",
) -> HeadEffects:
    """Activation patching of every head: the metric of one run with the output of this head from the other run.

    ``clean``, ``corrupted``: inputs of the model, each a tensor, a tuple of args or a dict of kwargs, of the same shapes.
    ``metric``: the model's output -> a scalar, such as a difference of logits.  ``sites``: names, globs or ``Site`` objects;
    ``heads``: None for all.
    ``direction``: "denoising" puts outputs of the clean run into the corrupted run (causal tracing, arXiv:2202.05262), "noising"
    the reverse (arXiv:2309.16042 compares them).

    The output of a head is what it gives to the output projection, at all positions.  Everything after it is recomputed;
    everything before it is computed once for all heads of a site.  Returns ``HeadEffects``: the metric by site and head.
    Raises PolicyError for sites and heads that are not there, CalibrationError for inputs of different shapes and a metric that
    gives no finite number.
    """
    require_callable("patch", "metric", metric)
    choice("patch", "direction", direction, DIRECTIONS)
    analyzed, *both = two_runs(model, clean, corrupted)
    found = analyzed.findings.found
    chosen = chosen_heads("patch", found, sites, heads)
    sweep = HeadSweep(analyzed.program, head_graph(analyzed.program.module, found), chosen)
    base, other = both if direction == "noising" else reversed(both)
    place = {f.site.name: f.site.spec.heads.index for f in found}
    metrics: dict[str, tuple[float, ...]] = {}
    with torch.no_grad(), working("patching one head after another", len(chosen)) as step:
        ends = [measured(metric, sweep.output(x), f"in the {which} run") for x, which in zip(both, RUNS, strict=True)]
        here, there = sweep.call(base), sweep.call(other)
        for name, node in sweep.nodes.items():
            here.up_to(node)
            there.up_to(node)
            patched = with_each(here(node), there(node), map(place[name], chosen[name]))
            outputs = sweep.rest(name, here, base)(patched)
            metrics[name] = tuple(
                measured(metric, output, f"with head {h} of {name} patched")
                for h, output in zip(chosen[name], outputs, strict=True)
            )
            step()
    return HeadEffects(direction, ends[0], ends[1], metrics, chosen)
