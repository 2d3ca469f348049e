"""One attention in the original graph, before it becomes a canonical node."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import fx

from attnopt.graph.axes import Atom, Axes, Axis, length, resolve_all
from attnopt.match.clamped_scores import Bounds
from attnopt.match.head_maps import HeadMap
from attnopt.match.mixture import Mixture
from attnopt.match.read_chain import ChainWeights
from attnopt.match.read_scores import Factor, Operand, Step
from attnopt.patterns.algebra import FULL, Pattern


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
    between_channels: bool = False  # queries and keys are features of the projections, and features are tokens
    sends: bool = False  # the softmax is over queries
    steps: tuple[Step, ...] = ()
    factors: tuple[Factor, ...] = ()
    wipes: tuple[Operand, ...] = ()
    clamp: Bounds | None = None  # of the scaled product
    softcap: float | None = None
    sinks: Operand | None = None
    sink_value: float | None = None  # a sink that is a number
    score_map: HeadMap | None = None  # across heads, before ``steps``
    weight_map: HeadMap | None = None  # across heads, after the softmax
    weight_factor: Operand | None = None  # of the weights, after the softmax
    mixture: Mixture | None = None  # of the weights and a map
    linear: ChainWeights | None = None  # there is no softmax
    sink_rate: float = 1.0
    top_left_causal: bool = False  # the fused operator's own flag: query i sees keys 0..i
    pattern: Pattern = FULL  # the fused operator's own, beside ``steps``
    nodes: tuple[fx.Node, ...] = ()  # from the product of queries and keys to the output
    escapes: tuple[fx.Node, ...] = ()
    frames: tuple[tuple[fx.Node, Axes], ...] = field(default=(), repr=False)
    anchor: fx.Node | None = None


def atoms_of(axes: Axes) -> set[Atom]:
    return {c for ax in resolve_all(axes) for c in ax}


def picked(o: Operand, atom: Atom, index: int) -> dict[int, tuple[int, ...]]:
    """Selection of one value of ``atom`` on the operand."""
    for i, axis in enumerate(resolve_all(o.axes)):
        if atom not in axis:
            continue
        inner = math.prod(c.size for c in axis[axis.index(atom) + 1 :])
        return {i: tuple(j for j in range(length(axis)) if j // inner % atom.size == index)}
    return {}
