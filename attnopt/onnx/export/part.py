"""The rebuilt part of a file, from an optimized graph, as ONNX nodes."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, fx

from attnopt.base.call_inputs import CallInputs
from attnopt.base.sizes import is_static
from attnopt.capture.guards import least
from attnopt.capture.signature import Signature
from attnopt.compiler.origin import Origin
from attnopt.errors import ExportError
from attnopt.graph.evaluate import bounds
from attnopt.graph.nodes import ancestors, value
from attnopt.graph.record import recorded
from attnopt.onnx.export.correspondence import Change
from attnopt.onnx.export.mark import Marked, fastest, mark
from attnopt.onnx.export.older_opsets import WRITTEN
from attnopt.onnx.export.translate import expand, translated
from attnopt.report.report import Report

if TYPE_CHECKING:
    import onnx_ir as ir


GIVEN = "given_"  # how the inputs of a part are called, by number


@dataclass(frozen=True)
class Part:
    """Nodes that compute one value.  ``inputs``: a value of the file, or a node: a new weight or a value of another part.

    ``module``: what they compute, in torch."""

    module: fx.GraphModule
    model: ir.Model
    inputs: tuple[str | fx.Node, ...]
    output: str
    marked: tuple[Marked, ...]


def parts_of(gm: fx.GraphModule, origin: Origin, change: Change, opset: int, contrib: bool) -> list[Part]:
    """The nodes that compute each of ``change.made``, in the operators of ``opset``.  Raises ExportError.

    They are exported one by one: torch reads a size from any input that has it, and together they could form a cycle.
    """
    given: dict[fx.Node, str | fx.Node] = {
        **{n: n for n in change.made.values()},
        **change.read,
        **{w: w for w in change.weights},
    }
    values = recorded(gm, set(given), origin.inputs)
    return [
        _part(gm, name, node, {n: g for n, g in given.items() if n is not node}, values, opset, contrib)
        for name, node in change.made.items()
    ]


def _part(
    gm: fx.GraphModule,
    name: str,
    node: fx.Node,
    given: Mapping[fx.Node, str | fx.Node],
    values: Mapping[fx.Node, Tensor],
    opset: int,
    contrib: bool,
) -> Part:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from attnopt.onnx.export.peephole import settle
    from attnopt.onnx.export.size_checks import check_sizes
    from attnopt.onnx.export.write_form import write

    module, order = _cut(gm, node, given)
    inner = Origin(Report(sites=()), (), Signature((), (), ()), CallInputs(tuple(values[n] for n in order), {}))
    marked_gm, marked = mark(module, fastest(contrib, opset), takes_apart=False)
    model, held = translated(marked_gm, inner, max(opset, WRITTEN))
    _check_axes(model, order)
    expand(model.graph, marked, write, opset)
    settle(model, contrib, opset)
    check_sizes(model.graph, [text for text in held if not _is_assumed(text, order)])
    RemoveUnusedNodesPass()(model)
    return Part(module, model, tuple(given[n] for n in order), name, marked)


def _cut(
    gm: fx.GraphModule, node: fx.Node, given: Mapping[fx.Node, str | fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A module of the nodes between ``given`` and ``node``, and its inputs in order."""
    needed = set(ancestors(node, stop=given.__contains__))
    graph, table, order = fx.Graph(), dict[fx.Node, fx.Node](), list[fx.Node]()
    for n in gm.graph.nodes:
        if n in needed and n in given:
            table[n] = graph.placeholder(f"{GIVEN}{len(order)}")
            table[n].meta["val"] = value(n)
            order.append(n)
    for n in gm.graph.nodes:
        if n in needed and n not in table:
            table[n] = graph.node_copy(n, lambda n: table[n])
    graph.output((table[node],)).meta["val"] = (value(node),)
    return fx.GraphModule(gm, graph), order


def _is_assumed(relation: str, order: Sequence[fx.Node]) -> bool:
    """It is a least size that holds where every free size of the whole graph is at least 2, as torch assumes of all."""
    match ast.parse(relation, mode="eval").body:
        case ast.Compare(
            ast.Subscript(ast.Name(name), ast.Constant(int(axis))), [ast.GtE()], [ast.Constant(int(lower))]
        ):
            size = value(order[int(name.removeprefix(GIVEN))]).shape[axis]
            return not is_static(size) and least(size) < lower <= bounds(size)[0]
    return False


def _check_axes(model: ir.Model, order: Sequence[fx.Node]) -> None:
    """Dynamic axes of the graph are dynamic in its part."""
    for node, made in zip(order, model.graph.inputs, strict=True):
        for axis, size in enumerate(value(node).shape):
            if not is_static(size) and made.shape is not None and isinstance(made.shape[axis], int):
                raise ExportError(
                    f"the rewritten part of the file would be valid only for a size of {made.shape[axis]}",
                    hint="optimize with larger example inputs",
                )
