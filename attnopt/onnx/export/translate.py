"""A graph translated into a model of ONNX, its attentions in the forms that were chosen."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnopt.base.quiet import quiet
from attnopt.capture.exported_program import exported
from attnopt.capture.guards import relations
from attnopt.compiler.origin import Origin
from attnopt.errors import ExportError
from attnopt.graph.nodes import ancestors, aten, inputs_of, is_call, is_state
from attnopt.ir.operands import Operands
from attnopt.onnx.export.choose_form import Form, OnnxSite
from attnopt.onnx.export.complex_as_real import in_pairs
from attnopt.onnx.export.dft_products import in_products
from attnopt.onnx.export.grouped_matmul import grouped_products
from attnopt.onnx.export.mark import DOMAIN, OP, Marked
from attnopt.onnx.export.promote_dtypes import promoted

if TYPE_CHECKING:
    import onnx_ir as ir

    from attnopt.onnx.export.builder import Builder


Write = Callable[["Builder", OnnxSite, Form, "Operands[ir.Value]"], "ir.Value"]


OPSETS = (23, 24, 25)  # below, there is no Attention; torch 2.13 silently writes opset 26 wrong


def translated(gm: fx.GraphModule, origin: Origin, opset: int) -> tuple[ir.Model, tuple[str, ...]]:
    """torch's export of a graph, which is modified so that torch can export it, and the relations between the sizes of its
    inputs at capture.  Raises ExportError."""
    from onnx_ir.passes.common import NameFixPass
    from onnxscript.optimizer import optimize_ir

    _drop_state(gm)
    try:
        with quiet():
            in_products(gm)
            in_pairs(gm)
            promoted(gm)
            program = exported(gm, origin.inputs)
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                output_names=_output_names(gm),
                custom_translation_table=grouped_products(gm),
                optimize=False,  # its rotary fusion creates a node that rejects tables with a batch of one
                verbose=False,
            )
            assert made is not None
            model: ir.Model = made.model
            NameFixPass()(model)  # two values may share a name, which breaks the optimizer
            optimize_ir(model)
            return model, relations(program, gm.forward, *origin.inputs)
    except Exception as e:
        if isinstance(e, OSError):
            raise
        raise ExportError(
            f"torch.onnx could not export the graph: {_first_cause(e)}",
            hint="the named operator has no ONNX equivalent in this opset",
        ) from e


def _drop_state(gm: fx.GraphModule) -> None:
    """An ONNX file has no state.  Raises ExportError if an output depends on state."""
    read = set(ancestors(gm.graph.output_node()))
    for node in list(gm.graph.nodes):
        if not is_state(node):
            continue
        if node in read:
            raise ExportError(
                f"the model carries state in {node.target} from call to call, which an ONNX file cannot",
                hint=f"make the model take {node.target} as an input and return it",
            )
        for writer in [u for u in node.users if is_call(u, aten.copy_.default)]:
            gm.graph.erase_node(writer)


def _output_names(gm: fx.GraphModule) -> list[str] | None:
    """The output names of the model: the fields of its result; None if unnamed.

    Beside a dict, as that of exposed taps, what has no name is an "output"."""
    spec = getattr(gm, "_out_spec", None)
    if spec is None:
        return None
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(leaves)[0]]
    names = ["_".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in p) for p in paths]
    if isinstance(leaves, tuple) and isinstance(leaves[-1], dict):
        names = [_named(p) for p in paths]
    taken = {n.name for n in inputs_of(gm.graph)}
    is_named = all(re.fullmatch(r"[A-Za-z_]\w*", n) and n not in taken for n in names)
    return names if is_named and len(set(names)) == len(names) else None


def _named(path: Sequence[object]) -> str:
    """The keys and fields of a path, as one word; places in tuples only where there is nothing else."""
    told = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
    numbers = [str(getattr(k, "idx", "")) for k in path[1:]]
    words = [re.sub(r"\W", "_", x) for x in told if x] or ["output", *(x for x in numbers if x)]
    return "_".join(words)


def _first_cause(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    text = re.sub("\x1b\\[[0-9;]*m", "", str(e))
    return f"{type(e).__name__}: " + " | ".join(line.strip() for line in text.splitlines() if line.strip())[:300]


def expand(graph: ir.Graph, marked: Sequence[Marked], write: Write, opset: int = OPSETS[0]) -> None:
    """Replace each placeholder by the form of its attention, from ``write``."""
    from attnopt.onnx.export.builder import SWAPPED, Builder, before_swap, is_swap

    for node in [n for n in graph if (n.domain, n.op_type) == (DOMAIN, OP)]:
        number = node.attributes["site"].as_int()
        builder = Builder(graph, f"attention_{number}", opset=opset)
        out = node.outputs[0]
        made = write(builder, marked[number].site, marked[number].form, Operands.of(node.inputs))
        made.name, made.shape, made.type = f"attention_{number}", out.shape, out.type
        graph.insert_before(node, builder.nodes)
        if (swapped := before_swap(made)) is not None:
            swapped.name = f"attention_{number}{SWAPPED}"
            for user in [n for n in out.consumers() if is_swap(n)]:
                _replace(graph, user.outputs[0], swapped)
        _replace(graph, out, made)
        graph.remove(node, safe=True)


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Use ``new`` everywhere; an output of the graph keeps its name."""
    import onnx_ir as ir

    maker = old.producer()
    if old.is_graph_output() and maker is not None:
        copy = ir.node("Identity", [new])
        named = copy.outputs[0]
        named.name, named.shape, named.type = old.name, old.shape, old.type
        graph.insert_after(maker, copy)
        new = named
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
