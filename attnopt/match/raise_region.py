"""From a recognised region to one canonical attention node with its spec."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from attnopt.base.sizes import is_static
from attnopt.graph.axes import Axis, resolve, resolve_all
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, dtype, shape, value
from attnopt.ir.linear_weights import LinearWeights
from attnopt.ir.operands import Operands, operands_of
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.weight_gains import WeightGains
from attnopt.match.fading import read_fading
from attnopt.match.head_operands import matrix_of
from attnopt.match.masks import bias_and_mask, hides_for_good, hides_what_is_zeroed, read_masks
from attnopt.match.mixed_operands import mixed_in
from attnopt.match.multiplicative_masks import hides_beside_flags
from attnopt.match.read_chain import Ratio
from attnopt.match.read_scores import Factor, Operand
from attnopt.match.rearrange import Arranger
from attnopt.match.region import Region
from attnopt.match.rejection import IN_ONE_ORDER, NotAttentionError, rejected, weights_changed
from attnopt.match.weight_factors import gains_of
from attnopt.patterns import Pattern
from attnopt.slicing.selector import Selector
from attnopt.slicing.sources import signature


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
    added: Tensor | None = None,
    score_map: Tensor | None = None,
    weight_map: Tensor | None = None,
) -> Tensor:
    """The canonical node: [B, H, L, D], [B, G, S, D], [B, G, S, Dv] -> [B, H, L, Dv].  Lowered before anything runs it."""
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@dataclass(frozen=True)
class Raised:
    """A site in canonical form: ``node`` calls ``attention``, ``out`` has the layout of the region's output.

    ``hides_for_good``: a fully masked query may see, in the model, keys hidden by a finite number.
    """

    region: Region
    spec: AttentionSpec
    node: fx.Node
    out: fx.Node
    hides_for_good: bool = False

    @property
    def operands(self) -> Operands[fx.Node]:
        return operands_of(self.node)


def raise_region(gm: fx.GraphModule, region: Region, name: str) -> Raised:
    """Insert the canonical form of ``region`` before its output, still unused.  Raises NotAttentionError."""
    emit = Emitter(gm.graph, region.out.node, {"site": name})
    at = Arranger(emit, region)
    r = region
    kv_atoms = {a for ax in (*r.k.axes, *r.v.axes) for a in resolve(ax)}
    kv_heads: Axis = tuple(a for a in r.heads if a in kv_atoms)
    q = at.arrange(r.q.node, r.q.axes, (r.batch, r.heads, r.queries, r.features), expand=True)
    k = at.arrange(r.k.node, r.k.axes, (r.batch, kv_heads, r.keys, r.features), expand=True)
    v = at.arrange(r.v.node, r.v.axes, (r.batch, kv_heads, r.keys, r.value_features), expand=True)
    q, k, zeroing = _with_factors(emit, at, r, q, k, kv_heads)
    q, k, v = _one_dtype(emit, q, k, v)
    _require_counted(r, q, k, v)
    if r.linear is None:
        read = _read(gm, emit, at, r, zeroing, q, k)
    else:
        q = _in_ratio(emit, q, r.linear.ratios)
        linear, pattern, mask, q, k = read_fading(gm, emit, at, r, zeroing, q, k, kv_heads)
        read = _Read(pattern, mask=mask, linear=linear)
    kv_of_head = _kv_of_head(r.heads, kv_heads)
    k, v, kv_of_head = _without_copies(emit, k, v, kv_of_head)
    keep, added = (None, None) if r.mixture is None else mixed_in(emit, at, r, r.mixture)
    maps = tuple(None if m is None else matrix_of(emit, r, m) for m in (r.score_map, r.weight_map))
    if r.weight_map is not None and r.weight_map.added is not None:
        added = _added_to_all(emit, at, r, Operand(r.weight_map.added, (r.weight_map.axis,)), k)
    more = (keep, added, *maps) if any(maps) else () if added is None else (keep, added)
    node = emit.call(attention, q, k, v, read.bias, read.mask, read.sinks, *more)
    node.name = f"attention_{node.name}"
    out = at.arrange(node, (r.batch, r.heads, r.queries, r.value_features), resolve_all(r.out.axes))
    if dtype(out) != dtype(r.out.node):
        out = emit.call(aten._to_copy.default, out, dtype=dtype(r.out.node))
    spec = AttentionSpec.of(
        shape(q)[1],
        shape(k)[1],
        shape(q)[3],
        shape(v)[3],
        scale=r.scale,
        kv_of_head=kv_of_head,
        pattern=read.pattern,
        softcap=r.softcap,
    )
    gains = _weight_gains(gm, at, r, q, k)
    spec = replace(
        spec,
        clamp=r.clamp,
        linear=read.linear,
        sends=r.sends,
        between_channels=r.between_channels,
        seen_as=read.seen,
        weight_gains=gains,
    )
    spec = spec.having(read.bias, read.mask, read.sinks, added, *maps)
    return Raised(region, spec, node, out, read.beside_flags or hides_for_good(gm, r, read.pattern))


def _require_counted(r: Region, *operands: fx.Node) -> None:
    """Raises NotAttentionError if an input's size changes the number of heads: they are merged with a batch."""
    counts = [value(x).shape[1] for x in operands]
    if (free := next((n for n in counts if not is_static(n)), None)) is not None:
        expected = "a number of heads that no input changes"
        raise rejected(r.out.node, "merged-heads", expected, f"{free} heads", IN_ONE_ORDER)


@dataclass(frozen=True)
class _Read:
    """What is done to the products of queries and keys."""

    pattern: Pattern
    seen: Pattern | None = None
    bias: fx.Node | None = None
    mask: fx.Node | None = None
    sinks: fx.Node | None = None
    beside_flags: bool = False
    linear: LinearWeights | None = None


def _read(
    gm: fx.GraphModule, emit: Emitter, at: Arranger, r: Region, zeroing: Sequence[Operand], q: fx.Node, k: fx.Node
) -> _Read:
    bias, mask, constant = bias_and_mask(emit, at, r)
    sinks = _sinks(emit, at, r)
    if sinks is not None and (constant or len(shape(sinks)) != 4):
        raise rejected(
            r.out.node, "sink-and-constant", "a sink without an added constant", "a constant added to the scores"
        )
    if sinks is not None and r.sink_rate != 1:
        sinks = emit.call(aten.mul.Tensor, sinks, r.sink_rate)
    beside_flags = False
    for factor in (*zeroing, *r.wipes):
        arranged = at.arrange(factor.node, factor.axes, (r.batch, r.heads, r.queries, r.keys))
        if hides_what_is_zeroed(gm, bias, arranged):
            continue
        if not hides_beside_flags(gm, bias, arranged):
            raise _multiplied(factor)
        beside_flags = True
    pattern, seen, bias, mask = read_masks(gm, r, bias, mask, q, k)
    return _Read(pattern, seen, bias, mask, sinks, beside_flags)


def _in_ratio(emit: Emitter, q: fx.Node, ratios: Iterable[Ratio]) -> fx.Node:
    for ratio in ratios:
        q = emit.call(aten.div.Tensor if ratio.divides else aten.mul.Tensor, q, ratio.node)
    return q


def _added_to_all(emit: Emitter, at: Arranger, r: Region, each: Operand, k: fx.Node) -> fx.Node:
    """A number for each head, as a map [1, H, 1, S]."""
    alone = at.arrange(each.node, each.axes, (r.batch, r.heads, r.queries, r.keys))
    return emit.call(aten.expand.default, alone, [-1, -1, -1, emit.size(k, 2)])


def _sinks(emit: Emitter, at: Arranger, r: Region) -> fx.Node | None:
    """[B|1, H|1, L|1, 1], before their rate."""
    if r.sink_value is not None:
        return emit.constant(torch.full((1, 1, 1, 1), r.sink_value, dtype=torch.float32, device=value(r.q.node).device))
    return None if r.sinks is None else at.arrange(r.sinks.node, r.sinks.axes, (r.batch, r.heads, r.queries, ()))


def _weight_gains(gm: fx.GraphModule, at: Arranger, r: Region, q: fx.Node, k: fx.Node) -> WeightGains | None:
    """Raises NotAttentionError."""
    if r.weight_factor is None:
        return None
    factor = at.arrange(r.weight_factor.node, r.weight_factor.axes, (r.batch, r.heads, r.queries, r.keys))
    found = gains_of(gm, factor, (value(q).shape[2], value(k).shape[2]), shape(q)[1])
    if found is None:
        raise weights_changed(r.weight_factor.node)
    return found


def _with_factors(
    emit: Emitter, at: Arranger, r: Region, q: fx.Node, k: fx.Node, kv_heads: Axis
) -> tuple[fx.Node, fx.Node, list[Factor]]:
    """Tensors that multiply the scores, moved to the side whose axes they have; those that vary over both are returned."""
    both: list[Factor] = []
    for factor in r.factors:
        applied = aten.div.Tensor if factor.divides else aten.mul.Tensor
        atoms = {a for ax in resolve_all(factor.axes) for a in ax}
        if not atoms & set(r.keys):
            q = emit.call(applied, q, at.arrange(factor.node, factor.axes, (r.batch, r.heads, r.queries, ())))
        elif not atoms & (set(r.queries) | (set(r.heads) - set(kv_heads))):
            k = emit.call(applied, k, at.arrange(factor.node, factor.axes, (r.batch, kv_heads, r.keys, ())))
        elif factor.divides:
            raise _multiplied(factor)
        else:
            both.append(factor)
    return q, k, both


def _multiplied(factor: Operand) -> NotAttentionError:
    return rejected(
        factor.node,
        "scores-multiplied",
        "a factor that depends on queries or keys alone, or a 0/1 mask with a matching bias",
        f"{factor.node.name}, which depends on both",
    )


def _one_dtype(emit: Emitter, *nodes: fx.Node) -> tuple[fx.Node, ...]:
    common = dtype(nodes[0])
    for n in nodes[1:]:
        common = torch.promote_types(common, dtype(n))
    return tuple(n if dtype(n) == common else emit.call(aten._to_copy.default, n, dtype=common) for n in nodes)


def _kv_of_head(heads: Axis, kv_heads: Axis) -> tuple[int, ...]:
    """Which K/V head each query head reads, from their common atoms."""
    total = math.prod(a.size for a in heads)
    found: list[int] = []
    for h in range(total):
        rest, place = h, {}
        for atom in reversed(heads):
            rest, place[atom] = divmod(rest, atom.size)
        g = 0
        for atom in kv_heads:
            g = g * atom.size + place[atom]
        found.append(g)
    return tuple(found)


def _without_copies(
    emit: Emitter, k: fx.Node, v: fx.Node, kv_of_head: tuple[int, ...]
) -> tuple[fx.Node, fx.Node, tuple[int, ...]]:
    """Keys and values without the copies of shared heads."""
    seen: dict[object, int] = {}
    first: list[int] = []
    group: list[int] = []
    for g in range(shape(k)[1]):
        mark = (signature(k, {1: (g,)}), signature(v, {1: (g,)}))
        if mark not in seen:
            seen[mark] = len(first)
            first.append(g)
        group.append(seen[mark])
    if len(first) == shape(k)[1]:
        return k, v, kv_of_head
    select = Selector(emit, None)  # verification uses the outputs of projections
    kept = {1: tuple(first)}
    return select.select(k, kept), select.select(v, kept), tuple(group[g] for g in kv_of_head)
