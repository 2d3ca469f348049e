"""The operands of every attention in one call, and what each outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from attnopt.backends.reference import Reference
from attnopt.base.call_inputs import CallInputs
from attnopt.compiler.analyze import Analyzed
from attnopt.errors import CaptureError
from attnopt.graph.interpreter import Interpreter
from attnopt.ir.operands import Operands
from attnopt.ir.plugin_calls import attention_of
from attnopt.ir.spec import AttentionSpec
from attnopt.match.prove import example_values


@dataclass(frozen=True)
class Attended:
    """One attention in one call: canonical operands, and the output [B, H, L, Dv] that they give."""

    spec: AttentionSpec
    operands: Operands[Tensor]
    output: Tensor


def traced(analyzed: Analyzed, call: CallInputs, given: Mapping[int, Tensor] | None = None) -> list[Attended]:
    """In the order of the sites.  ``given``: outputs that later layers get in the place of a site's own, so that a difference
    in one attention is none in the next."""
    gm = analyzed.program.module
    values = example_values(gm, *call)
    if not values:
        raise CaptureError("the captured graph takes other inputs than the model", hint="pass tensors, not caches")
    run = Interpreter(gm, values)
    found: list[Attended] = []
    for i, site in enumerate(analyzed.findings.found):
        raised = site.raised
        operands: Operands[Tensor] = raised.operands.map(lambda _, node: run(node))
        output = attended(raised.spec, operands)
        found.append(Attended(raised.spec, operands, output))
        other = None if given is None else given.get(i)
        run.values[raised.node] = output if other is None or other.shape != output.shape else other.to(output.dtype)
        run.values[raised.region.out.node] = run(raised.out)
        _forget(run, raised.region.nodes, raised.region.out.node)
    return found


def attended(spec: AttentionSpec, t: Operands[Tensor]) -> Tensor:
    made: Tensor = attention_of(Reference(), spec)(t.q, t.k, t.v, **t.others)
    return made


def _forget(run: Interpreter, inside: tuple[fx.Node, ...], out: fx.Node) -> None:
    """The scores and weights of one layer are not kept while the next ones run."""
    for node in inside:
        if node is not out:
            run.values.pop(node, None)
