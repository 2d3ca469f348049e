"""Token streams: the sequences of the queries and keys of an attention, and their position encodings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnopt.base.sizes import hint, same_size
from attnopt.graph.axes import FOLLOWED, Axes, Axis, follow, fresh, resolve, resolve_all
from attnopt.graph.nodes import (
    ancestors,
    arg,
    aten,
    calls,
    is_call,
    is_number,
    is_state,
    is_tensor,
    operand,
    shape,
    value,
    wrap,
)
from attnopt.graph.ops import Kind, is_pointwise, named, of
from attnopt.match.fused import FUSED
from attnopt.slicing.pull import pull

Relation = Literal["same", "assumed", "past", "apart", "inputs-apart", "other"]

_SOURCES = of(Kind.PRODUCT, Kind.CONVOLUTION, Kind.EMBEDDING, Kind.SOFTMAX) | FUSED
_CONVOLUTIONS, _LENGTHENS = of(Kind.CONVOLUTION), of(Kind.PAD) | named("slice")
# Besides elementwise operators; a softmax or a running sum over tokens would keep their number, too.
_OF_EACH_TOKEN = of(Kind.REDUCE, Kind.SPLIT, Kind.PIECE, Kind.COPY, Kind.CAST) | named(
    "linear layer_norm native_layer_norm rms_norm slice"
)


def relation(q: fx.Node, k: fx.Node, v: fx.Node, examples: Mapping[fx.Node, object]) -> Relation:
    """How the tokens of the canonical operands ``q`` and ``k`` are related.

    "same": one sequence.  "past": the keys of earlier tokens, then those of the queries.  "apart": one sequence,
    with different numbers of keys and queries.  "assumed": q, k and v are three inputs of equal length, which is all that
    is known.  "inputs-apart": such inputs with independent lengths.  "other": keys from another sequence.
    """
    q_len, kv_len = value(q).shape[2], value(k).shape[2]
    as_long = statically_known_true(q_len == kv_len)
    if _streams(q) & _streams(k):
        if as_long:
            return "same"
        return "past" if _has_past(q, k) else "apart"
    if hint(q_len) != hint(kv_len) or not _are_three_inputs((q, k, v), examples):
        return "other"
    return "assumed" if as_long else "inputs-apart"


def _are_three_inputs(operands: tuple[fx.Node, fx.Node, fx.Node], examples: Mapping[fx.Node, object]) -> bool:
    """Each operand comes from its own input, either all through projections or none.

    Keys and values from the same input, with different queries, are a memory.
    """
    streams = [_streams(n) for n in operands]
    inputs = [next(iter(found)) for found in streams if len(found) == 1]
    if len(set(inputs)) != 3 or any(n.op != "placeholder" for n in inputs):
        return False
    if len({any(map(_is_source, ancestors(n, stop=_ends))) for n in operands}) != 1:
        return False
    q, k, v = (examples.get(n) for n in inputs)
    return not _hold_same(k, v) or _hold_same(q, k)


def _hold_same(a: object, b: object) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a is b or (a.shape == b.shape and not a.is_meta and not b.is_meta and torch.equal(a, b))


def _has_past(q: fx.Node, k: fx.Node) -> bool:
    """The keys are concatenated from the caller's past and, at the end, one key per query, from its own token."""
    joins = _joins(k)
    return bool(joins) and all(_ends_with_own(q, join, axis) for join, axis in joins)


def _joins(k: fx.Node) -> list[tuple[fx.Node, int]]:
    """The concatenation of the keys along the key axis, with that axis; nothing if one projection produces them all."""
    found: list[tuple[fx.Node, int]] = []
    stack, seen = [(k, 2)], set[tuple[fx.Node, int]]()
    while stack:
        node, axis = place = stack.pop()
        if place in seen or node.op != "call_function" or not _streams(node):
            continue
        seen.add(place)
        if is_call(node, aten.cat.default) and wrap(arg(node, 1, 0), len(value(node).shape)) == axis:
            found.append(place)
            continue
        pulled = None if _is_source(node) else pull(node, {axis: (0,)})
        if pulled is None or pulled.across:
            return []
        stack += [(below, a) for below, chosen in pulled.demands for a in chosen]
    return found


def _ends_with_own(q: fx.Node, join: fx.Node, axis: int) -> bool:
    *earlier, own = arg(join, 0)
    as_long = statically_known_true(value(own).shape[axis] == value(q).shape[2])
    return as_long and bool(_streams(own) & _streams(q)) and all(map(_is_held, earlier))


def _is_held(node: fx.Node) -> bool:
    """Directly from an input or state, without a projection."""
    above = list(ancestors(node, stop=_ends))
    return not any(map(_is_source, above)) and any(
        is_tensor(n) and (n.op == "placeholder" or is_state(n)) for n in above
    )


def positions(q: fx.Node) -> tuple[str, ...]:
    """Rotary encodings show themselves as a sine and a cosine between the projection and the core."""
    made = {n.target for n in ancestors(q, stop=_ends)}
    turned = {aten.sin.default, aten.cos.default} <= made or aten.view_as_complex.default in made
    return ("rope",) if turned else ()


def _is_source(node: fx.Node) -> bool:
    return calls(node, _SOURCES)


def _ends(node: fx.Node) -> bool:
    """A projection; or a size, which says nothing about the tokens of its tensor."""
    return _is_source(node) or is_number(node)


def _streams(node: fx.Node) -> set[fx.Node]:
    """What feeds the first projection above ``node``: the nodes that write into that sequence."""
    found: set[fx.Node] = set()
    for first in ancestors(node, stop=_ends):
        if first.op == "placeholder":
            found.add(first)
        elif _is_source(first):
            found |= _fed_by(first)
    return found


def _fed_by(projection: fx.Node) -> set[fx.Node]:
    """Equal for the same projection; for two in series (low rank), the input of the first."""
    while True:
        found: set[fx.Node] = set()
        for x in projection.all_input_nodes:
            if not is_tensor(x) or x.op == "get_attr":
                continue
            above = list(ancestors(x, stop=_ends))
            streams = {n for n in above if _is_source(n) or (n.op == "placeholder" and is_tensor(n))}
            if not streams and is_call(projection, aten.linear.default) and x is arg(projection, 0):
                streams = {n for n in above if n.op == "get_attr"}  # only learned queries
            found |= streams
        if len(found) != 1:
            return found
        behind = next(iter(found))
        if not _keeps_tokens(behind, projection) and not _convolves_tokens(behind, projection):
            return found
        projection = behind


def _keeps_tokens(first: fx.Node, second: fx.Node) -> bool:
    """Between two projections, tokens are neither moved nor merged."""
    if not all(is_call(n, aten.linear.default) for n in (first, second)):
        return False
    above = set(ancestors(second, stop=lambda n: n is first))
    between, open_ends = {first}, [first]
    while open_ends:
        users = [n for n in open_ends.pop().users if n in above and n not in between]
        between.update(users)
        open_ends.extend(users)
    return all(_is_of_each_token(n, value(first).shape[:-1]) for n in between)


def _convolves_tokens(first: fx.Node, second: fx.Node) -> bool:
    """One of two projections is a convolution, along the tokens of the other."""
    if not any(calls(n, _CONVOLUTIONS) for n in (first, second)) or not all(map(_has_tokens, (first, second))):
        return False
    path, node = list[fx.Node](), operand(second)
    while node is not first:
        if not node.args or not is_tensor(arg(node, 0)):
            return False
        path.append(node)
        node = operand(node)
    axes = fresh(shape(first))
    tokens = _tokens(first, axes)
    for step in reversed(path):
        stays = calls(step, _LENGTHENS) or (_is_of_each(step) and shape(step) == shape(operand(step)))
        moved = follow(step, axes) if step.target in FOLLOWED else axes if stays else None
        if moved is None:
            return False
        axes = moved
    return bool(tokens) and resolve(tokens) == _tokens(second, axes)


def _is_of_each(node: fx.Node) -> bool:
    return calls(node, _OF_EACH_TOKEN) or is_pointwise(node.target)


def _has_tokens(projection: fx.Node) -> bool:
    return calls(projection, _CONVOLUTIONS) or is_call(projection, aten.linear.default)


def _tokens(projection: fx.Node, axes: Axes) -> Axis:
    """Those of an operand or the result of a projection, in their order."""
    of_tokens = axes[2:] if calls(projection, _CONVOLUTIONS) else axes[-2:-1]
    return tuple(a for axis in resolve_all(of_tokens) for a in axis)


def _is_of_each_token(node: fx.Node, tokens: tuple[int, ...]) -> bool:
    if not _is_of_each(node):
        return False
    if not is_tensor(node):
        return True
    sizes = value(node).shape
    return len(sizes) == len(tokens) + 1 and all(map(same_size, sizes, tokens))
