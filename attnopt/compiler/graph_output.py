"""The output of the user's model, put together from values of a captured graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.flat_call import Taken, put_together
from attnopt.capture.program import Program


def leaves_of(graph: fx.Graph) -> list[object]:
    """Of the output: nodes and numbers."""
    return pytree.tree_leaves(graph.output_node().args[0])


def output_of(program: Program, graph: fx.Graph, known: Mapping[fx.Node, Any], batch: CallInputs) -> Any:
    """``graph``: of ``program``, or a copy of it.  ``known``: the values of its leaves in a call with ``batch``, which is in the
    form of the graph."""
    leaves = [known[x] if isinstance(x, fx.Node) else x for x in leaves_of(graph)]
    output, form = graph.process_outputs(leaves), program.form
    if form is None:
        return output
    *_, build, given = put_together(form.inputs, *batch, clones=True)
    objects = tuple(build.made[i] for i in range(len(form.inputs.nodes)))
    return form.give(output, Taken(batch, objects, tuple(given)))
