"""One attention in the original graph, before it becomes a canonical node."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from attnopt.graph.axes import Atom, Axes, Axis, resolve_all
from attnopt.graph.nodes import (
    opname,
    source_line,
)
from attnopt.ir.refusal import Refusal
from attnopt.match.read_scores import Factor, Operand, Step


@dataclass(frozen=True)
class Region:
    """One attention in the original graph, before it becomes a canonical node.

    All axes consist of shared atoms; ``batch``, ``heads``, ``queries``, ``keys`` give the role of the atoms.
    """

    q: Operand
    k: Operand
    v: Operand
    out: Operand
    scale: float
    batch: Axis
    heads: Axis
    queries: Axis
    keys: Axis
    features: Axis
    value_features: Axis
    steps: tuple[Step, ...] = ()
    factors: tuple[Factor, ...] = ()
    wipes: tuple[Operand, ...] = ()
    softcap: float | None = None
    sinks: Operand | None = None
    sink_rate: float = 1.0
    top_left_causal: bool = False  # the fused operator's own flag: query i sees keys 0..i
    nodes: tuple[fx.Node, ...] = ()  # from the product of queries and keys to the output
    escapes: tuple[fx.Node, ...] = ()
    frames: tuple[tuple[fx.Node, Axes], ...] = field(default=(), repr=False)
    anchor: fx.Node | None = None


class NotAttentionError(Exception):
    """A candidate is not an attention, or not representable; ``near``: close enough to report."""

    def __init__(self, refusal: Refusal, near: bool = True) -> None:
        self.refusal, self.near = refusal, near
        super().__init__(str(refusal))


def unreadable(node: fx.Node, expected: str) -> NotAttentionError:
    return NotAttentionError(Refusal("unreadable-layout", expected, f"{node.name} = {opname(node)}", source_line(node)))


def atoms_of(axes: Axes) -> set[Atom]:
    return {c for ax in resolve_all(axes) for c in ax}
