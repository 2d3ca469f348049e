"""Recognise an attention around a normaliser: which tensors are queries, keys, values and output, and what their axes are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import networkx as nx
import torch
from torch import fx

from attnopt.axes import Atom, Axes, Axis, broadcast, follow, fresh, length, reshape, resolve, resolve_all
from attnopt.contraction import Product, product_of
from attnopt.graph import (
    CASTS,
    RESHAPES,
    arg,
    aten,
    dtype,
    is_call,
    is_tensor,
    operand,
    opname,
    same_size,
    shape,
    source_line,
    value,
    wrap,
)
from attnopt.normaliser import Softmax
from attnopt.probing import inputs_behind
from attnopt.projections import lands_on_weights
from attnopt.refusal import Refusal
from attnopt.scores import Hide, NotScores, Operand, Scores, Step, Term, read_scores


@dataclass(frozen=True)
class Region:
    """One attention as it stands in the graph, before it becomes a canonical node.

    All axes are in terms of shared atoms; ``batch``, ``heads``, ``queries``, ``keys`` say which atoms play which role.
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
    factors: tuple[Operand, ...] = ()
    softcap: float | None = None
    sinks: Operand | None = None
    top_left_causal: bool = False  # the fused operator's own flag: query i sees keys 0..i
    nodes: tuple[fx.Node, ...] = ()  # from the product of queries and keys to the output
    weights: Operand | None = None  # the normalised scores, where something else uses them too
    escapes: tuple[fx.Node, ...] = ()
    frames: tuple[tuple[fx.Node, Axes], ...] = field(default=(), repr=False)
    anchor: fx.Node | None = None


class NotAttention(Exception):
    """What looked like an attention is none, or none that can be expressed; ``near``: it came close enough to be told."""

    def __init__(self, refusal: Refusal, near: bool = True) -> None:
        self.refusal, self.near = refusal, near
        super().__init__(str(refusal))


def recognise(anchor: Softmax | fx.Node) -> Region:
    """The attention whose normaliser is ``anchor``.  Raises NotAttention."""
    if isinstance(anchor, Softmax):
        return _assign_heads(_from_softmax(anchor))
    return _assign_heads(_from_fused(anchor))


# ---------------------------------------------------------------- softmax between two products
def _from_softmax(a: Softmax) -> Region:
    follows = _follow_weights(a)
    try:
        scores = read_scores(a.scores, a.axis)
    except NotScores as e:
        raise NotAttention(e.refusal, near=follows is not None) from None
    if follows is None:
        raise NotAttention(
            Refusal(
                "no-value-product",
                "weights that are multiplied with values",
                _first_use(a.weights),
                source_line(a.weights),
            ),
            near=True,
        )
    product, out, inner = follows
    keys = resolve(scores.axes[a.axis])
    scores = _orient(scores, keys, a)
    weights_axes = _through(inner, scores.axes)
    if weights_axes is None:
        raise _unreadable(inner[-1], "weights whose axes can be followed")
    _unify(product.left_axes, weights_axes, product.node)
    region = _assemble(a, scores, product, keys, out)
    return region


def _first_use(node: fx.Node) -> str:
    user = next(iter(node.users), None)
    return "no use" if user is None else f"{user.name} = {opname(user)}"


def _unreadable(node: fx.Node, expected: str) -> NotAttention:
    return NotAttention(Refusal("unreadable-layout", expected, f"{node.name} = {opname(node)}", source_line(node)))


_PASSIVE = (
    *RESHAPES,
    *CASTS,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.mT.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.squeeze.default,
)


def _follow_weights(a: Softmax) -> tuple[Product, fx.Node, tuple[fx.Node, ...]] | None:
    """(product with the values, oriented so that its left operand is the weights; the output; the nodes from the weights
    to the product), or None if no path leads to a product over the keys."""
    stack: list[tuple[fx.Node, ...]] = [(a.weights,)]
    masked: fx.Node | None = None
    while stack:
        path = stack.pop(0)
        for user in path[-1].users:
            product = product_of(user)
            if product is not None and product.addend is None:
                oriented = product if product.left is path[-1] else product.swapped()
                if inputs_behind(oriented.right) and oriented.left is not oriented.right:
                    out = _after_late_sum(a, user)
                    if out is not None:
                        return oriented, out, path
            if is_call(user, *_PASSIVE) and len(path) < 12:
                stack.append((*path, user))
            elif is_call(
                user, aten.mul.Tensor, aten.masked_fill.Scalar, aten.add.Tensor, aten.where.self, aten.cat.default
            ):
                masked = masked or user
    if masked is not None and _leads_to_product(masked):
        raise NotAttention(
            Refusal(
                "weights-changed",
                "weights that go straight to the values",
                f"{masked.name} = {opname(masked)} on the weights",
                source_line(masked),
                "weights that are masked, mixed or gated after the softmax are left as they are",
            )
        )
    return None


def _leads_to_product(node: fx.Node) -> bool:
    frontier = [node]
    for _ in range(8):
        frontier = [u for n in frontier for u in n.users]
        if any(product_of(u) is not None for u in frontier):
            return True
    return False


def _after_late_sum(a: Softmax, product: fx.Node) -> fx.Node | None:
    """The output: the product itself, or its quotient by the sum of exponentials where that comes late."""
    if a.late_sum is None:
        return product
    for user in product.users:
        if is_call(user, aten.div.Tensor) and arg(user, 0) is product:
            total = arg(user, 1)
            while is_call(total, *_PASSIVE):
                total = arg(total, 0)
            if total is a.late_sum:
                return user
    return None


def _through(path: tuple[fx.Node, ...], axes: Axes) -> Axes | None:
    """Axes at the end of ``path``, whose first node has ``axes``.  A slice that drops a sink's column is passed."""
    for node in path[1:]:
        if is_call(node, aten.slice.Tensor) and shape(node) == tuple(length(x) for x in resolve_all(axes)):
            continue
        found = follow(node, axes)
        if found is None:
            return None
        axes = found
    return resolve_all(axes)


def _unify(product_axes: Axes, axes: Axes, node: fx.Node) -> None:
    """Make the fresh atoms of a product's operand the atoms that are already known."""
    for new, old in zip(product_axes, resolve_all(axes), strict=True):
        if not new and not old:
            continue
        if len(new) != 1 or new[0].size != length(old):
            raise _unreadable(node, "weights whose axes fit the values")
        if new != old:
            new[0].parts = old


def _orient(scores: Scores, keys: Axis, a: Softmax) -> Scores:
    """Make the right operand the one that has the keys."""
    p = scores.product
    left, right = ({c for ax in resolve_all(x) for c in ax} for x in (p.left_axes, p.right_axes))
    if not keys:
        raise NotAttention(
            Refusal("one-key", "more than one key", "a softmax over a single element", source_line(a.weights)),
            near=False,
        )
    if set(keys) <= right and not set(keys) & left:
        return scores
    if set(keys) <= left and not set(keys) & right:
        return replace(scores, product=p.swapped())
    raise NotAttention(
        Refusal(
            "softmax-axis",
            "a softmax over the keys of one operand",
            "an axis that both operands share",
            source_line(a.weights),
        )
    )


def _atoms(axes: Axes) -> set[Atom]:
    return {c for ax in resolve_all(axes) for c in ax}


def _assemble(a: Softmax, scores: Scores, product: Product, keys: Axis, out: fx.Node) -> Region:
    p = scores.product
    frame = _atoms(scores.axes)
    features = [c for ax in resolve_all(p.left_axes) for c in ax if c not in frame]
    v_atoms, weights = _atoms(product.right_axes), _atoms(product.left_axes)
    contracted = weights & v_atoms - _atoms(product.axes)
    if contracted != set(keys):
        raise NotAttention(
            Refusal(
                "value-axis", "values summed over the keys", "a product over another axis", source_line(product.node)
            )
        )
    value_features = [c for ax in resolve_all(product.axes) for c in ax if c not in weights]
    shared = v_atoms & weights
    queries_only = frame - _atoms(p.right_axes)
    if shared & queries_only and not _atoms(p.right_axes) - set(keys) - set(features):
        queries_only -= shared
    path = (*scores.path, *_between(scores.path[-1], out))
    escapes = _escaping(path, out)
    late = a.late_sum is not None
    frames = (
        *scores.frames,
        (p.left, p.left_axes),
        (p.right, p.right_axes),
        (product.right, product.right_axes),
        (product.node, product.axes),
    )
    return Region(
        q=Operand(p.left, resolve_all(p.left_axes)),
        k=Operand(p.right, resolve_all(p.right_axes)),
        v=Operand(product.right, resolve_all(product.right_axes)),
        out=Operand(out, resolve_all(product.axes)),
        scale=scores.scale,
        batch=(),
        heads=(),
        queries=(),
        keys=resolve(keys),
        features=tuple(features),
        value_features=tuple(value_features),
        steps=scores.steps,
        factors=scores.factors,
        softcap=scores.softcap,
        sinks=scores.sinks,
        nodes=path,
        weights=None if late else Operand(a.weights, resolve_all(scores.axes)),
        escapes=escapes,
        frames=frames,
        anchor=a.weights,
    )


def _between(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Every node on a path from ``start`` to ``end``, both included: the convex region between them."""
    dag: nx.DiGraph[fx.Node] = nx.DiGraph()
    order = {n: i for i, n in enumerate(start.graph.nodes)}
    frontier, seen = [start], {start}
    while frontier:
        n = frontier.pop()
        for user in n.users:
            if order[user] <= order[end]:
                dag.add_edge(n, user)
                if user not in seen:
                    seen.add(user)
                    frontier.append(user)
    if end not in dag:
        return [end]
    inner = (nx.descendants(dag, start) | {start}) & (nx.ancestors(dag, end) | {end})
    return sorted(inner, key=lambda n: order[n])


def _escaping(path: Iterable[fx.Node], out: fx.Node) -> tuple[fx.Node, ...]:
    """Nodes inside the region that something outside uses."""
    inside = set(path)
    return tuple(
        n for n in dict.fromkeys(path) if n is not out and any(u not in inside and not _dead(u) for u in n.users)
    )


def _dead(node: fx.Node) -> bool:
    return node.op == "call_function" and not node.users and is_tensor(node)


# ---------------------------------------------------------------- the fused operator
def _from_fused(node: fx.Node) -> Region:
    q, k, v = arg(node, 0), arg(node, 1), arg(node, 2)
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    mask = arg(node, 3, node.kwargs.get("attn_mask"))
    dropout = arg(node, 4, node.kwargs.get("dropout_p", 0.0))
    causal = arg(node, 5, node.kwargs.get("is_causal", False))
    scale, grouped = node.kwargs.get("scale"), node.kwargs.get("enable_gqa", False)
    if dropout:
        raise NotAttention(
            Refusal(
                "active-dropout",
                "an attention without dropout",
                f"dropout of {dropout}",
                source_line(node),
                "call model.eval() first",
            )
        )
    sq, sk, sv = shape(q), shape(k), shape(v)
    ndim = len(sq)
    frame = fresh((*sq[:-1], sk[-2]))
    lead, rows, columns = list(frame[:-2]), frame[-2], frame[-1]
    (d,), (e,) = fresh((sq[-1],)), fresh((sv[-1],))
    kv_lead = [ax if s != 1 else () for s, ax in zip(sk[:-2], lead[ndim - len(sk) :], strict=True)]
    if grouped and sk[-3] != sq[-3]:
        group = reshape((lead[-1],), (sk[-3], sq[-3] // sk[-3]))
        assert group is not None
        kv_lead[-1] = group[0]
    if len(sk) != len(sv) or sk[:-2] != sv[:-2] or len(sk) > ndim:
        raise _unreadable(node, "keys and values with the same leading axes")
    scores: Axes = (*resolve_all(tuple(lead)), rows, columns)
    steps: tuple[Step, ...] = ()
    if isinstance(mask, fx.Node):
        axes = broadcast(mask, scores)
        if axes is None:
            raise _unreadable(node, "a mask that broadcasts to the scores")
        operand = Operand(mask, axes)
        steps = (Hide(operand, False, -math.inf) if dtype(mask) == torch.bool else Term(operand, 1.0),)
    axes_of = {q: (*lead, rows, d), k: (*kv_lead, columns, d), v: (*kv_lead, columns, e)}
    out_axes = (*lead, rows, e)
    return Region(
        q=Operand(q, axes_of[q]),
        k=Operand(k, (*kv_lead, columns, d)),
        v=Operand(v, (*kv_lead, columns, e)),
        out=Operand(node, out_axes),
        scale=float(scale) if isinstance(scale, (int, float)) else sq[-1] ** -0.5,
        batch=(),
        heads=(),
        queries=(),
        keys=columns,
        features=d,
        value_features=e,
        steps=steps,
        top_left_causal=bool(causal),
        nodes=(node,),
        anchor=node,
        frames=((q, (*lead, rows, d)), (k, (*kv_lead, columns, d)), (v, (*kv_lead, columns, e)), (node, out_axes)),
    )


# ---------------------------------------------------------------- which atoms are heads
def _assign_heads(r: Region) -> Region:
    frames = list(r.frames)
    for read in (r.q, r.k, r.v):
        frames += _walk_up(read)
    frame = _ordered(r)
    not_queries = _atoms(r.k.axes) | _atoms(r.v.axes)
    heads = tuple(c for c in frame if lands_on_weights(r.q.node, _pick(r.q, c)))
    if not heads:
        heads = tuple(c for c in frame if c in _atoms(r.k.axes) and lands_on_weights(r.k.node, _pick(r.k, c)))
    free = [c for c in frame if c not in heads]
    queries = _query_atoms(r, [c for c in free if c not in not_queries])
    batch = [c for c in free if c not in queries]
    if not heads:
        heads, batch = _guess_heads(r, batch)
    _refuse_channels(r)
    return replace(
        r,
        heads=heads,
        queries=queries,
        batch=tuple(batch),
        frames=tuple((n, resolve_all(a)) for n, a in frames),
        q=_resolved(r.q),
        k=_resolved(r.k),
        v=_resolved(r.v),
        out=_resolved(r.out),
        keys=resolve(r.keys),
        features=resolve(r.features),
        value_features=resolve(r.value_features),
    )


def _resolved(o: Operand) -> Operand:
    return Operand(o.node, resolve_all(o.axes))


def _ordered(r: Region) -> list[Atom]:
    """Atoms of the scores other than keys, in the order of the output's axes."""
    own = set(resolve(r.value_features))
    return [c for ax in resolve_all(r.out.axes) for c in ax if c not in own]


def _pick(o: Operand, atom: Atom) -> dict[int, tuple[int, ...]]:
    """Selection of the first of ``atom``'s values on the operand."""
    for i, axis in enumerate(resolve_all(o.axes)):
        if atom not in axis:
            continue
        inner = math.prod(c.size for c in axis[axis.index(atom) + 1 :])
        return {i: tuple(j for j in range(length(axis)) if j // inner % atom.size == 0)}
    return {}


def _walk_up(o: Operand) -> list[tuple[fx.Node, Axes]]:
    """Axes of the tensors above an operand as far as only layout changes: this is what cuts a merged batch x heads axis."""
    found: list[tuple[fx.Node, Axes]] = []
    node, axes = o.node, resolve_all(o.axes)
    while True:
        above = _unfollow(node, axes)
        if above is None:
            return found
        node, axes = above
        found.append(above)


def _unfollow(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """(input, its axes) of a layout operator whose result has ``axes``."""
    if node.op != "call_function" or not node.args or not is_tensor(arg(node, 0)):
        return None
    x = operand(node)
    if is_call(node, *RESHAPES):
        found = reshape(axes, shape(x))
        return None if found is None else (x, found)
    if is_call(node, *CASTS, aten.clone.default, aten.contiguous.default):
        return x, axes
    if is_call(node, aten.permute.default, aten.transpose.int, aten.mT.default, aten.t.default):
        trial = fresh(shape(x)) if 1 not in shape(x) else tuple((Atom(s),) for s in shape(x))
        moved = follow(node, trial)
        if moved is None:
            return None
        return x, tuple(axes[moved.index(ax)] for ax in trial)
    if is_call(node, aten.unsqueeze.default):
        at = wrap(arg(node, 1), len(axes))
        return x, (*axes[:at], *axes[at + 1 :])
    if is_call(node, aten.expand.default):
        shift = len(axes) - len(shape(x))
        return x, tuple(ax if s != 1 else () for s, ax in zip(shape(x), axes[shift:], strict=True))
    if is_call(node, aten.mul.Tensor, aten.div.Tensor) and not is_tensor(arg(node, 1)):
        return x, axes
    return None


def _query_atoms(r: Region, candidates: list[Atom]) -> Axis:
    """Of the atoms that only queries have, those of the innermost axis: the others are a batch that keys are shared over."""
    if not candidates:
        return ()
    for axis in reversed(resolve_all(r.out.axes)):
        mine = tuple(c for c in axis if c in candidates)
        if mine:
            return mine
    return ()


def _guess_heads(r: Region, batch: list[Atom]) -> tuple[Axis, list[Atom]]:
    """Where no projection tells: by convention heads are the axis before the queries, behind at least one batch axis."""
    rank = len(r.frames[0][1]) if r.frames else 0
    if rank < 4 or not batch:
        return (), batch
    axis_before = [ax for ax in resolve_all(r.q.axes) if ax and set(ax) <= set(batch)]
    if not axis_before or (len(axis_before) == 1 and 1 not in shape(r.q.node)[:-2]):
        return (), batch
    heads = axis_before[-1]
    return heads, [c for c in batch if c not in heads]


def _refuse_channels(r: Region) -> None:
    """A softmax over features attends between channels, not between tokens."""
    for atom in resolve(r.keys):
        if lands_on_weights(r.k.node, _pick(r.k, atom)):
            raise NotAttention(
                Refusal(
                    "channel-attention",
                    "keys that are tokens",
                    "a softmax over features that a projection makes",
                    source_line(r.anchor) if r.anchor is not None else "",
                    "attention between channels is left as it is",
                )
            )


def squares(r: Region) -> bool:
    """As many queries as keys, whatever the inputs' sizes."""
    q, k = value(r.q.node), value(r.k.node)
    return same_size(_size(q, r.q.axes, r.queries), _size(k, r.k.axes, r.keys))


def _size(tensor: torch.Tensor, axes: Axes, wanted: Axis) -> int | torch.SymInt:
    if not wanted:
        return 1
    for size, axis in zip(tensor.shape, resolve_all(axes), strict=True):
        if axis == wanted:
            return size
    return -length(wanted)
