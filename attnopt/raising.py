"""From a recognised region to one canonical attention node with its spec."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.axes import Atom, Axes, Axis, follow, resolve, resolve_all
from attnopt.graph import Emitter, aten, dtype, is_call, is_static, same_size, shape, source_line, value
from attnopt.matching import NotAttention, Region, squares
from attnopt.patterns import Causal, Full, Pattern
from attnopt.probing import as_visible, evaluate, inputs_behind, is_plain, name_pattern, other_sizes, symbols
from attnopt.projections import signature
from attnopt.refusal import Refusal
from attnopt.scores import Hide, Multiply, Term
from attnopt.spec import AttentionSpec
from attnopt.surgery import Selector, Weights


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The canonical node: [B, H, L, D], [B, G, S, D], [B, G, S, Dv] -> [B, H, L, Dv].  Lowered before anything runs it."""
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@dataclass(frozen=True)
class Raised:
    """A site in canonical form: ``node`` calls ``attention``, ``out`` has the layout of the region's output."""

    region: Region
    spec: AttentionSpec
    node: fx.Node
    out: fx.Node

    @property
    def operands(self) -> dict[str, fx.Node | None]:
        names = ("q", "k", "v", "bias", "mask", "sinks")
        return dict(zip(names, self.node.args, strict=True))  # type: ignore[arg-type]


class _Arranger:
    """Brings tensors into given axes, with as few operators as it takes."""

    def __init__(self, emit: Emitter, region: Region) -> None:
        self.emit = emit
        self.alone: dict[Atom, tuple[fx.Node, int]] = {}
        self.inside: dict[Atom, tuple[fx.Node, int, Axis]] = {}
        for node, axes in region.frames:
            if len(value(node).shape) != len(axes):
                continue
            for i, axis in enumerate(resolve_all(axes)):
                if len(axis) == 1:
                    self.alone.setdefault(axis[0], (node, i))
                for atom in axis:
                    self.inside.setdefault(atom, (node, i, axis))

    def size(self, atom: Atom) -> int | fx.Node:
        if atom in self.alone:
            node, i = self.alone[atom]
            return self.emit.size(node, i)
        if atom not in self.inside:
            return atom.size
        node, i, axis = self.inside[atom]
        if is_static(value(node).shape[i]):
            return atom.size
        others = [self.size(a) for a in axis if a is not atom and a in self.alone]
        unknown = [a for a in axis if a is not atom and a not in self.alone]
        rest = self._times([*others, *(a.size for a in unknown)])
        return atom.size if unknown else self.emit.call(operator.floordiv, self.emit.size(node, i), rest)

    def _times(self, sizes: list[int | fx.Node]) -> int | fx.Node:
        known = math.prod(s for s in sizes if isinstance(s, int))
        total: int | fx.Node = known
        for s in (s for s in sizes if isinstance(s, fx.Node)):
            total = s if total == 1 else self.emit.call(operator.mul, s, total)
        return total

    def length(self, axis: Axis) -> int | fx.Node:
        return self._times([self.size(a) for a in axis])

    def arrange(self, node: fx.Node, axes: Axes, groups: Axes, expand: bool = False) -> fx.Node:
        """``node`` with one axis for each of ``groups``; atoms that it lacks are repeated if ``expand``, else length 1.

        A group of which only some atoms are there is always completed.
        """
        axes, groups = resolve_all(axes), resolve_all(groups)
        present = [a for ax in axes for a in ax]
        wanted = [tuple(a for a in g if a in present) for g in groups]
        missing = [bool(set(g) - set(w)) and (expand or bool(w)) for g, w in zip(groups, wanted, strict=True)]
        flat = [a for g, w, m in zip(groups, wanted, missing, strict=True) for a in (g if m else w)]
        if set(present) - set(flat):
            raise NotAttention(
                Refusal(
                    "unreadable-layout",
                    "axes that the attention has",
                    f"{node.name} with another axis",
                    source_line(node),
                )
            )
        order = [a for a in flat if a in present]
        blocks = _blocks(axes, order, groups)
        node = self.reshape(node, [self.length(b) for b in blocks])
        positions = sorted(range(len(blocks)), key=lambda i: order.index(blocks[i][0]))
        node = self.permute(node, positions)
        if any(missing):
            ones: list[int | fx.Node] = [self.size(a) if a in present else 1 for a in flat]
            node = self.reshape(node, ones)
            node = self.emit.call(aten.expand.default, node, [self.size(a) for a in flat])
        return self.reshape(node, [self.length(g if m else w) for g, w, m in zip(groups, wanted, missing, strict=True)])

    def permute(self, node: fx.Node, order: list[int]) -> fx.Node:
        """A permutation; none where it undoes the one that made ``node``."""
        if is_call(node, aten.transpose.int, aten.permute.default, aten.mT.default, aten.t.default):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            trial = tuple((Atom(i + 2),) for i in range(len(order)))
            moved = follow(node, trial)
            if moved is not None and tuple(moved[i] for i in order) == trial:
                return source
        return node if order == sorted(order) else self.emit.call(aten.permute.default, node, order)

    def reshape(self, node: fx.Node, sizes: list[int | fx.Node]) -> fx.Node:
        """A reshape; none where the node, or what it was reshaped from, has that shape already."""
        made = self.emit.call(aten.reshape.default, node, sizes)
        base = node
        while True:
            if len(value(base).shape) == len(sizes) and all(map(same_size, value(base).shape, value(made).shape)):
                return base
            if getattr(base, "target", None) is not aten.reshape.default:
                return made
            base = base.args[0]  # type: ignore[assignment]


def _blocks(axes: Axes, order: list[Atom], groups: Axes) -> list[Axis]:
    """Runs of atoms that stay together from the source's axes to the groups, in the source's order."""
    group_of = {a: i for i, g in enumerate(groups) for a in g}
    blocks: list[list[Atom]] = []
    for axis in axes:
        last: Atom | None = None
        for atom in axis:
            joined = (
                last is not None and group_of[last] == group_of[atom] and order.index(atom) == order.index(last) + 1
            )
            if joined:
                blocks[-1].append(atom)
            else:
                blocks.append([atom])
            last = atom
    return [tuple(b) for b in blocks]


def raise_region(gm: fx.GraphModule, region: Region, name: str) -> Raised:
    """Put the canonical form of ``region`` before its output; nothing uses it yet.  Raises NotAttention."""
    emit = Emitter(gm.graph, region.out.node, {"site": name})
    at = _Arranger(emit, region)
    r = region
    kv_atoms = {a for ax in (*r.k.axes, *r.v.axes) for a in resolve(ax)}
    kv_heads: Axis = tuple(a for a in r.heads if a in kv_atoms)
    q = at.arrange(r.q.node, r.q.axes, (r.batch, r.heads, r.queries, r.features), expand=True)
    k = at.arrange(r.k.node, r.k.axes, (r.batch, kv_heads, r.keys, r.features), expand=True)
    v = at.arrange(r.v.node, r.v.axes, (r.batch, kv_heads, r.keys, r.value_features), expand=True)
    q, k = _with_factors(emit, at, r, q, k, kv_heads)
    q, k, v = _one_dtype(emit, q, k, v)
    bias, mask, constant = _bias_and_mask(emit, at, r)
    sinks = None if r.sinks is None else at.arrange(r.sinks.node, r.sinks.axes, (r.batch, r.heads, r.queries, ()))
    if sinks is not None and (constant or len(shape(sinks)) != 4):
        raise NotAttention(
            Refusal("sink-and-constant", "a sink beside plain scores", "a constant added to them", _line(r))
        )
    pattern, seen, bias, mask = _read_masks(gm, r, bias, mask, q, k)
    kv_of_head = _kv_of_head(r.heads, kv_heads)
    k, v, kv_of_head = _without_copies(gm, emit, k, v, kv_of_head)
    node = emit.call(attention, q, k, v, bias, mask, sinks)
    node.name = f"attention_{node.name}"
    out = at.arrange(node, (r.batch, r.heads, r.queries, r.value_features), resolve_all(r.out.axes))
    if dtype(out) != dtype(r.out.node):
        out = emit.call(aten._to_copy.default, out, dtype=dtype(r.out.node))
    spec = AttentionSpec(
        heads=tuple(range(shape(q)[1])),
        kv_heads=tuple(range(shape(k)[1])),
        kv_of_head=kv_of_head,
        head_dim=shape(q)[3],
        value_dim=shape(v)[3],
        scale=r.scale,
        pattern=pattern,
        has_bias=bias is not None,
        has_mask=mask is not None,
        has_sinks=sinks is not None,
        softcap=r.softcap,
        seen_as=seen,
    )
    return Raised(region, spec, node, out)


def _line(r: Region) -> str:
    return source_line(r.out.node)


def _with_factors(
    emit: Emitter, at: _Arranger, r: Region, q: fx.Node, k: fx.Node, kv_heads: Axis
) -> tuple[fx.Node, fx.Node]:
    """Tensors that multiply the scores, moved to the side whose axes they have."""
    for factor in r.factors:
        atoms = {a for ax in resolve_all(factor.axes) for a in ax}
        if not atoms & set(r.keys):
            q = emit.call(aten.mul.Tensor, q, at.arrange(factor.node, factor.axes, (r.batch, r.heads, r.queries, ())))
        elif not atoms & (set(r.queries) | (set(r.heads) - set(kv_heads))):
            k = emit.call(aten.mul.Tensor, k, at.arrange(factor.node, factor.axes, (r.batch, kv_heads, r.keys, ())))
        else:
            raise NotAttention(
                Refusal(
                    "scores-multiplied",
                    "a factor of queries or of keys",
                    f"{factor.node.name}, which varies over both",
                    source_line(factor.node),
                )
            )
    return q, k


def _one_dtype(emit: Emitter, *nodes: fx.Node) -> tuple[fx.Node, ...]:
    common = dtype(nodes[0])
    for n in nodes[1:]:
        common = torch.promote_types(common, dtype(n))
    return tuple(n if dtype(n) == common else emit.call(aten._to_copy.default, n, dtype=common) for n in nodes)


def _bias_and_mask(emit: Emitter, at: _Arranger, r: Region) -> tuple[fx.Node | None, fx.Node | None, bool]:
    """The bias and the visible-mask that the steps amount to, and whether a constant was dropped from the scores."""
    bias: fx.Node | None = None
    mask: fx.Node | None = None
    constant = False
    groups: Axes = (r.batch, r.heads, r.queries, r.keys)
    if r.top_left_causal and not squares(r):
        mask = _top_left(emit, at, r)
    for step in r.steps:
        if isinstance(step, Multiply):
            if step.factor < 0 and mask is not None:
                raise NotAttention(
                    Refusal("negated-mask", "a positive factor after a mask", str(step.factor), _line(r))
                )
            bias = None if bias is None else emit.call(aten.mul.Tensor, bias, step.factor)
        elif isinstance(step, Term):
            constant = constant or step.operand is None
            bias = _plus(emit, at, bias, step, groups)
        else:
            condition = at.arrange(step.condition.node, step.condition.axes, groups)
            hidden = condition if step.when else emit.call(aten.bitwise_not.default, condition)
            if step.fill == -math.inf or _moderate(step):
                if step.fill != -math.inf and not _never_blind(gm_of(emit), hidden):
                    raise NotAttention(_moderate_mask(step, r))
                visible = emit.call(aten.bitwise_not.default, condition) if step.when else condition
                mask = visible if mask is None else emit.call(aten.bitwise_and.Tensor, mask, visible)
            else:
                bias = _filled(emit, bias, hidden, step.fill, dtype(r.q.node))
    return bias, mask, constant


def gm_of(emit: Emitter) -> fx.GraphModule:
    owner = emit.graph.owning_module
    assert isinstance(owner, fx.GraphModule)
    return owner


def _moderate(step: Hide) -> bool:
    """A fill that a score can still be seen beside: adding it is not the same as writing it."""
    return step.fill > -1e8


def _moderate_mask(step: Hide, r: Region) -> Refusal:
    return Refusal(
        "moderate-mask",
        "a mask of -inf or the dtype's minimum",
        f"{step.fill:g} written over scores, on rows that may be all hidden",
        source_line(step.condition.node) or _line(r),
        "mask with -inf or torch.finfo(dtype).min",
    )


def _never_blind(gm: fx.GraphModule, hidden: fx.Node) -> bool:
    """The condition is known without the inputs, and leaves each query a key."""
    if inputs_behind(hidden) or not is_plain(hidden):
        return False
    return all(bool((~evaluate(gm, hidden, sizes)).any(-1).all()) for sizes in other_sizes(symbols(gm.graph)))


def _plus(emit: Emitter, at: _Arranger, bias: fx.Node | None, step: Term, groups: Axes) -> fx.Node | None:
    if step.operand is None:
        return bias if bias is None else emit.call(aten.add.Tensor, bias, step.constant)
    term = at.arrange(step.operand.node, step.operand.axes, groups)
    if step.coefficient != 1.0:
        term = emit.call(aten.mul.Tensor, term, step.coefficient)
    return term if bias is None else emit.call(aten.add.Tensor, bias, term)


def _filled(emit: Emitter, bias: fx.Node | None, hidden: fx.Node, fill: float, kind: torch.dtype) -> fx.Node:
    kind = kind if bias is None else dtype(bias)
    device = value(hidden).device
    written = emit.call(aten.full.default, [], fill, dtype=kind, device=device)
    return emit.call(
        aten.where.self, hidden, written, bias or emit.call(aten.full.default, [], 0.0, dtype=kind, device=device)
    )


def _top_left(emit: Emitter, at: _Arranger, r: Region) -> fx.Node:
    """The fused operator's causal flag where queries and keys differ in number: query i sees keys 0..i."""
    device = value(r.q.node).device
    rows = emit.call(aten.arange.default, at.length(r.queries), device=device)
    columns = emit.call(aten.arange.default, at.length(r.keys), device=device)
    visible = emit.call(
        aten.le.Tensor, emit.call(aten.unsqueeze.default, columns, 0), emit.call(aten.unsqueeze.default, rows, 1)
    )
    return emit.call(aten.unsqueeze.default, emit.call(aten.unsqueeze.default, visible, 0), 0)


def _read_masks(
    gm: fx.GraphModule, r: Region, bias: fx.Node | None, mask: fx.Node | None, q: fx.Node, k: fx.Node
) -> tuple[Pattern, Pattern | None, fx.Node | None, fx.Node | None]:
    """(static pattern, what it amounts to on unpadded inputs, bias operand, mask operand)."""
    pattern: Pattern = Causal() if r.top_left_causal and squares(r) else Full()
    lengths = (value(q).shape[2], value(k).shape[2])
    both = [n for n in (bias, mask) if n is not None]
    if not both:
        return pattern, None, None, None
    if (found := _named(gm, both, lengths, None)) is not None:
        return _and(pattern, found), None, None, None
    if mask is not None and (found := _named(gm, [mask], lengths, None)) is not None:
        return _and(pattern, found), None, bias, None
    if bias is not None and (found := _named(gm, [bias], lengths, None)) is not None:
        pattern, bias = _and(pattern, found), None
    seen = _named(gm, both, lengths, 1) if all(_from_flags(n) for n in both) else None
    return pattern, None if seen is None else _and(pattern, seen), bias, mask


def _and(a: Pattern, b: Pattern) -> Pattern:
    return b if isinstance(a, Full) or a == b else a if isinstance(b, Full) else a & b


def _from_flags(node: fx.Node) -> bool:
    """Made from integer or boolean inputs alone, as padding masks are."""
    return all(not value(n).dtype.is_floating_point for n in inputs_behind(node) if isinstance(value(n), Tensor))


def _named(gm: fx.GraphModule, nodes: list[fx.Node], lengths: tuple[Any, Any], fill: Any) -> Pattern | None:
    """The pattern that the nodes (biases and masks) together are, at the example sizes and others."""
    if any(not is_plain(n) or (fill is None and inputs_behind(n)) for n in nodes):
        return None
    found: list[Tensor] = []
    for sizes in other_sizes(symbols(gm.graph)):
        total: Tensor | None = None
        q_len, kv_len = (s if isinstance(s, int) else int(s.node.expr.subs(sizes)) for s in lengths)
        for node in nodes:
            try:
                visible = as_visible(evaluate(gm, node, sizes, fill))
            except (ValueError, RuntimeError, IndexError, TypeError):
                return None
            if visible is None:
                return None
            total = visible if total is None else total & visible
        assert total is not None
        found.append(total.expand(*total.shape[:-2], q_len, kv_len))
    return name_pattern(found)


def _kv_of_head(heads: Axis, kv_heads: Axis) -> tuple[int, ...]:
    """Which K/V head each query head reads, from the atoms that the two share."""
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
    gm: fx.GraphModule, emit: Emitter, k: fx.Node, v: fx.Node, kv_of_head: tuple[int, ...]
) -> tuple[fx.Node, fx.Node, tuple[int, ...]]:
    """Keys and values without the copies of a head that other heads share."""
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
    select = Selector(emit, Weights(gm))
    kept = {1: tuple(first)}
    return select.select(k, kept), select.select(v, kept), tuple(group[g] for g in kv_of_head)
