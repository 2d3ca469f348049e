"""The roles of the axes of a recognized attention (heads, queries, keys, batch), from their origin."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from attnopt.base.sizes import same_size
from attnopt.graph.axes import Atom, Axes, Axis, fresh, length, resolve, resolve_all, unfollow
from attnopt.graph.evaluate import inputs_behind
from attnopt.graph.nodes import arg, calls, is_call, is_tensor, operand, shape, value, wrap
from attnopt.graph.ops import Kind, named, of
from attnopt.graph.products import product_of
from attnopt.match.merged_heads import take_apart
from attnopt.match.read_scores import Operand, is_projected
from attnopt.match.region import Region, atoms_of, picked
from attnopt.match.rejection import rejected
from attnopt.slicing.sources import Source, chooses_weights, signature, slice_sources

_CUTS, _OF_PARTS = of(Kind.SPLIT, Kind.SLICE), of(Kind.SPLIT) - named("unbind")  # the latter: (x, parts, axis)


def assign_roles(r: Region) -> Region:
    frames = list(r.frames)
    for read in (r.q, r.k, r.v):
        frames += _walk_up(read)
    take_apart(r)
    frame = _ordered(r)
    not_queries = atoms_of(r.k.axes) | atoms_of(r.v.axes)
    heads = tuple(c for c in frame if is_feature(r.q, c))
    if not heads:  # a norm over all features hides the heads of the queries, not those of keys and values
        told = next((t for o in (r.k, r.v) if (t := {c for c in atoms_of(o.axes) if is_feature(o, c)})), set[Atom]())
        beside = _beside_features(r)
        copied = {c for c in frame if told and _is_copied(r.k, c) and _is_copied(r.v, c)}
        of_groups = {c for ax in resolve_all(r.q.axes) if told & set(ax) for c in ax if c not in not_queries}
        heads = tuple(c for c in frame if c in told | beside | copied | of_groups)
    channels = _are_channels(r)
    if channels:
        queries = _channel_queries(r, [c for c in frame if c not in not_queries])
        heads = tuple(c for c in heads if c not in queries)
    free = [c for c in frame if c not in heads]
    if not channels:
        queries = _query_atoms(r, [c for c in free if c not in not_queries])
    batch = [c for c in free if c not in queries]
    if not heads and not _is_projected(r):
        heads, batch = _guess_heads(r, batch, queries)
    return replace(
        r,
        between_channels=channels,
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
    """Atoms of the scores except keys, in the order of the output axes."""
    own = set(resolve(r.value_features))
    return [c for ax in resolve_all(r.out.axes) for c in ax if c not in own]


def is_feature(o: Operand, atom: Atom, behind: bool = False) -> bool:
    """Neighbours along the atom come from different weight rows, also at its end: the first token may be separate."""
    pairs = {(0, 1), (atom.size - 2, atom.size - 1)}
    return all(chooses_weights(o.node, picked(o, atom, a), picked(o, atom, b), behind) for a, b in pairs)


def is_of_weights(o: Operand, atom: Atom) -> bool:
    """The operand has the places along the atom from a weight or a constant alone, and not from the tokens of an input."""
    found = slice_sources(o.node, picked(o, atom, 0))
    return bool(found) and all(map(_is_of_weights, found))


def _is_of_weights(source: Source) -> bool:
    """A weight, or a product in which the operand with these places is one: a learned mixture of tokens."""
    product = product_of(source.node) if source.kind == "token" else None
    if product is None:
        return source.kind in ("weight", "constant") and not inputs_behind(source.node)
    chosen = {a for i in source.selection for a in product.axes[i]}
    sides = ((product.left, product.left_axes), (product.right, product.right_axes))
    return not any(inputs_behind(node) for node, axes in sides if chosen & atoms_of(axes))


def _is_projected(r: Region) -> bool:
    """Weights produce queries, keys or values with only a feature axis: there is one head."""
    told = ((r.q, r.features), (r.k, r.features), (r.v, r.value_features))
    return any(is_projected(o.node) or is_feature(o, f) for o, features in told for f in resolve(features))


def _is_copied(o: Operand, atom: Atom) -> bool:
    """The operand is constant along ``atom``: keys and values shared by several query heads."""
    if atom not in atoms_of(o.axes):
        return False
    return signature(o.node, picked(o, atom, 0)) == signature(o.node, picked(o, atom, 1))


def _beside_features(r: Region) -> set[Atom]:
    """Atoms of the queries that come from the same axis of a tensor as the features of a head: heads, split from it later."""

    def read(atom: Atom, index: int) -> dict[tuple[fx.Node, int], set[int]]:
        """For each axis of each source, the indices that one value of the atom depends on."""
        found: dict[tuple[fx.Node, int], set[int]] = {}
        for x in slice_sources(r.q.node, picked(r.q, atom, index)):
            for axis, size in enumerate(shape(x.node)):
                found.setdefault((x.node, axis), set()).update(x.selection.get(axis, range(size)))
        return found

    def sources(atom: Atom) -> set[tuple[fx.Node, int]]:
        """The axes along which the atom selects.  Neighbours may be rotated together, and then read the same indices."""
        first, last = read(atom, 0), read(atom, atom.size - 1)
        return {key for key in first.keys() & last if first[key] != last[key]}

    features = set(resolve(r.features))
    own = set[tuple[fx.Node, int]]().union(*map(sources, features))
    return {c for c in atoms_of(r.q.axes) - features if (found := sources(c)) and found <= own}


def _walk_up(o: Operand) -> list[tuple[fx.Node, Axes]]:
    """Axes of the tensors above an operand through layout changes and cuts: this splits a merged batch x heads axis."""
    found: list[tuple[fx.Node, Axes]] = []
    node, axes = o.node, resolve_all(o.axes)
    while True:
        above = unfollow(node, axes) or _before_piece(node, axes)
        if above is None:
            return found
        node, axes = above
        found.append(above)


def _before_piece(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """The tensor that ``node`` is cut from, along an axis that ``axes`` say nothing of."""
    cut = operand(node) if is_call(node, operator.getitem) else node
    if not calls(cut, _CUTS) or not is_tensor(arg(cut, 0)):
        return None
    whole = operand(cut)
    sizes = shape(whole)
    at = wrap(arg(cut, 2 if calls(cut, _OF_PARTS) else 1, 0), len(sizes))
    kept = axes[at:] if len(sizes) > len(axes) else axes[at + 1 :]
    (own,) = fresh((sizes[at],))
    return whole, (*axes[:at], own, *kept)


def _query_atoms(r: Region, candidates: list[Atom]) -> Axis:
    """Of the atoms that only queries have, those of the innermost axis: the others are a batch with shared keys."""
    if not candidates:
        return ()
    for axis in reversed(resolve_all(r.out.axes)):
        mine = tuple(c for c in axis if c in candidates)
        if mine:
            return mine
    return ()


def _guess_heads(r: Region, batch: list[Atom], queries: Axis) -> tuple[Axis, list[Atom]]:
    """Without a projection: by convention, heads are the axis before the queries, after at least one batch axis.

    An axis of length 1 there is a single head.
    """
    features = set(resolve(r.features))
    axes = [ax for ax in resolve_all(r.q.axes) if not set(ax) & features or not ax]
    place = axes.index(queries) if queries in axes else len(axes) - 1
    if place < 2 or not axes[place - 1] or not set(axes[place - 1]) <= set(batch):
        return (), batch
    heads = axes[place - 1]
    return heads, [c for c in batch if c not in heads]


def _are_channels(r: Region) -> bool:
    """The softmax is over features: attention between channels, whose own features are tokens.

    Token mixtures also come from a weight, but then its features are multiplied.  A norm over all features may hide those of
    the keys, and not those of the values.
    """
    keys = resolve(r.keys)
    if not any(is_feature(o, atom) for o in (r.k, r.v) for atom in keys):
        return False
    return not any(is_feature(r.k, f, behind=True) for f in resolve(r.features))


def _channel_queries(r: Region, candidates: list[Atom]) -> Axis:
    """Raises NotAttentionError if the queries are no channels, too."""
    queries = _query_atoms(r, candidates)
    if not queries or not all(is_feature(r.q, c) for c in queries):
        raise rejected(
            r.anchor or r.out.node,
            "channel-attention",
            "queries that are features of a projection, as the keys are",
            "a softmax over the features of a projection, of other queries",
        )
    return queries


def squares(r: Region) -> bool:
    """As many queries as keys, at all input sizes."""
    q, k = value(r.q.node), value(r.k.node)
    return same_size(_size(q, r.q.axes, r.queries), _size(k, r.k.axes, r.keys))


def _size(tensor: torch.Tensor, axes: Axes, wanted: Axis) -> int | torch.SymInt:
    if not wanted:
        return 1
    for size, axis in zip(tensor.shape, resolve_all(axes), strict=True):
        if axis == wanted:
            return size
    return -length(wanted)
