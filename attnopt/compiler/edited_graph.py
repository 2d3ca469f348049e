"""A captured graph in which something other than an attention was changed, as a model that can be saved and exported."""

from __future__ import annotations

import torch
from torch import fx, nn

from attnopt.capture.flex_attention import restore_calls
from attnopt.capture.program import Program
from attnopt.capture.run_unchanged import trains_otherwise
from attnopt.capture.signature import Signature
from attnopt.compiler.decide import Decision
from attnopt.compiler.origin import Origin
from attnopt.compiler.site_report import site_report
from attnopt.graph.cleanup import prune_unused_state, remove_unused_nodes
from attnopt.graph.nodes import stored
from attnopt.match.find import Findings
from attnopt.match.pair_sums import remove_products
from attnopt.report.report import Report
from attnopt.version import __version__


def cleaned(gm: fx.GraphModule) -> None:
    """Remove what finding the attentions left, and what nothing reads any more."""
    restore_calls(gm)
    remove_products(gm)
    remove_unused_nodes(gm)
    prune_unused_state(gm)
    gm.graph.lint()
    gm.recompile()


def report_of(program: Program, findings: Findings) -> Report:
    """Every attention as it is, unchanged."""
    return Report(
        sites=tuple(site_report(Decision(f, f.site)) for f in findings.found),
        near_misses=findings.near_misses,
        versions={"attnopt": __version__, "torch": torch.__version__},
        fixed_axes=program.fixed_axes,
    )


def origin_of(model: nn.Module, program: Program, findings: Findings, gm: fx.GraphModule, report: Report) -> Origin:
    live = stored(gm)
    return Origin(
        report=report,
        sites=tuple(f.site.stored_as(live) for f in findings.found),
        signature=Signature.of(model.forward, *program.inputs),
        inputs=program.inputs,
        shapes=program.shapes,
        trains_otherwise=trains_otherwise(model),
        form=program.form,
    )
