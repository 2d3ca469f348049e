"""The attention calls of a lowered graph, each with the site and the spec that it computes.

Both stand at the node.  A graph may change after it was lowered: its weights are trained or cast, it is saved and loaded.
Whoever reads it then still needs the meaning of its masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from attnopt.backends.attention_operator import ATTENTION
from attnopt.graph.nodes import ancestors, is_call
from attnopt.graph.sdpa import SDPA
from attnopt.ir.spec import AttentionSpec

_META = "attnopt"  # of a node: "site", "passes", "spec"


@dataclass(frozen=True)
class Lowered:
    """``spec``, of ``site``, without map and edits: they follow the call."""

    site: str
    spec: AttentionSpec


def is_attention_call(node: fx.Node) -> bool:
    return is_call(node, SDPA, ATTENTION)


def attention_calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """In the order in which they run."""
    return filter(is_attention_call, graph.nodes)


def lowered_at(call: fx.Node) -> Lowered | None:
    """What the call computes; None if lowering did not write it."""
    noted = call.meta.get(_META, {})
    return Lowered(noted["site"], noted["spec"]) if "spec" in noted else None


def note(call: fx.Node, computed: Lowered) -> None:
    call.meta[_META] = {**call.meta.get(_META, {}), "site": computed.site, "spec": computed.spec}


def note_between(operands: Iterable[fx.Node], made: fx.Node, computed: Sequence[Lowered]) -> None:
    """Every attention call that computes ``made`` from ``operands``.  ``computed``: what is computed one after the other, each
    with as many calls; if that cannot be, nothing is noted."""
    given = set(operands)
    inside = set(ancestors(made, stop=given.__contains__)) - given
    calls = [node for node in attention_calls(made.graph) if node in inside]
    if len(calls) % len(computed):
        return
    for i, node in enumerate(calls):
        part = computed[i * len(computed) // len(calls)]
        note(node, Lowered(part.site, part.spec.bare))
