"""Means of tokens moved up past projections: the mean of projected tokens is the projection of their mean.

For an average over pools of tokens, this is what ``pull`` is for selections.  Each rule is an exact identity of an affine map
that treats all tokens alike; without a rule, the tokens are averaged there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

from torch import Tensor, fx
from torch.fx.node import Target

from attnopt.base.sizes import same_size
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import arg, aten, calls, getitem_source, is_call, is_tensor, operand, shape, value, wrap
from attnopt.graph.ops import ADD, COPIES, DIV, MUL, SUB, Kind, of, rules
from attnopt.slicing.selection import kept_by_squeeze, order_of, regroup

_SPLITS = of(Kind.SPLIT)
_LINEAR = of(Kind.PRODUCT)
Place = tuple[fx.Node, int]  # a tensor, and the axis of its tokens
Below = tuple[Place, ...]  # tensors whose tokens are pooled instead
Build = Callable[[Emitter, list[fx.Node]], fx.Node]  # the pooled node, from those that are pooled
Moved = tuple[Below, Build]


def pool_tokens(emit: Emitter, node: fx.Node, axis: int, mean: Callable[[Tensor], Tensor]) -> fx.Node:
    """``node`` with the tokens along ``axis`` averaged by ``mean``, a function of [B, G, tokens, features]."""
    moves = _moves(node, axis)
    made: dict[Place, fx.Node] = {}
    for place in reversed(_in_order(moves, (node, axis))):
        moved = moves[place]
        if moved is None:
            made[place] = _mean(emit, place[0], mean)
        else:
            below, build = moved
            made[place] = build(emit, [made[x] for x in below])
    return made[node, axis]


def passes_projection(node: fx.Node, axis: int) -> bool:
    """The mean of the tokens along ``axis`` can move up past a projection."""
    moves = _moves(node, axis)
    ends = [place for place, moved in moves.items() if moved is None]
    fit = all(len(shape(n)) in (2, 3, 4) and a == len(shape(n)) - 2 for n, a in ends)
    return fit and any(calls(n, _LINEAR) for (n, _), moved in moves.items() if moved is not None)


def _moves(node: fx.Node, axis: int) -> dict[Place, Moved | None]:
    """Every tensor that is pooled instead; None where tokens are averaged.

    That is where no rule moves the mean, or above a projection where something else reads all tokens: they are then made in any
    case."""
    found: dict[Place, Moved | None] = {}
    pending = [(node, axis, False)]
    while pending:
        n, a, projected = pending.pop()
        if (n, a) in found:
            continue
        passed = {below for below, _ in found}
        is_read = projected and any(user not in passed for user in n.users)
        moved = None if is_read else _moved(n, a)
        found[n, a] = moved
        pending += [] if moved is None else [(x, at, projected or calls(n, _LINEAR)) for x, at in moved[0]]
    return found


def _in_order(moves: Mapping[Place, Moved | None], first: Place) -> list[Place]:
    """``first``, and each before what it is made from."""
    found: dict[Place, None] = {}
    pending = [first]
    while pending:
        place = pending.pop(0)
        found.pop(place, None)  # later, after this one, too
        found[place] = None
        moved = moves[place]
        pending += [] if moved is None else list(moved[0])
    return list(found)


def _mean(emit: Emitter, node: fx.Node, mean: Callable[[Tensor], Tensor]) -> fx.Node:
    missing = 4 - len(shape(node))

    def pooled(x: Tensor) -> Tensor:
        made = mean(x[(None,) * missing])
        return made.reshape(made.shape[missing:])

    return emit.inline(pooled, node)


def _moved(node: fx.Node, axis: int) -> Moved | None:
    rule = _RULES.get(node.target) if node.op == "call_function" else None
    return None if rule is None else rule(node, axis)


def _same_operator(node: fx.Node, below: Below) -> Moved:
    """The same call with other tensors."""

    def build(emit: Emitter, found: list[fx.Node]) -> fx.Node:
        table = {n: new for (n, _), new in zip(below, found, strict=True)}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: table.get(n, n))
        return emit.call(node.target, *args, **kwargs)

    return below, build


def _reshape(node: fx.Node, axis: int) -> Moved | None:
    """One whose axis of tokens is one before, too."""
    x = operand(node)
    groups = regroup(shape(node), shape(x)) or []
    at = next((theirs[0] for mine, theirs in groups if mine == [axis] and len(theirs) == 1), None)
    if at is None or not same_size(value(node).shape[axis], value(x).shape[at]):
        return None

    def build(emit: Emitter, found: list[fx.Node]) -> fx.Node:
        sizes = list(arg(node, 1))
        sizes[axis] = emit.size(found[0], at)
        return emit.call(aten.reshape.default, found[0], sizes)

    return ((x, at),), build


def _permute(node: fx.Node, axis: int) -> Moved:
    return _same_operator(node, ((operand(node), order_of(node)[axis]),))


def _unsqueeze(node: fx.Node, axis: int) -> Moved | None:
    at = wrap(arg(node, 1), len(shape(node)))
    return None if at == axis else _same_operator(node, ((operand(node), axis - (at < axis)),))


def _squeeze(node: fx.Node, axis: int) -> Moved | None:
    left = kept_by_squeeze(node)
    return None if left is None else _same_operator(node, ((operand(node), left[axis]),))


def _copy(node: fx.Node, axis: int) -> Moved:
    return _same_operator(node, ((operand(node), axis),))


def _slice(node: fx.Node, axis: int) -> Moved | None:
    x = operand(node)
    at = wrap(arg(node, 1, 0), len(shape(x)))
    if not is_call(node, aten.select.int):
        return None if at == axis else _same_operator(node, ((x, axis),))
    return _same_operator(node, ((x, axis + (at <= axis)),))


def _piece(node: fx.Node, axis: int) -> Moved | None:
    found = getitem_source(node)
    if found is None or not calls(found[0], _SPLITS):
        return None
    source, index = found
    x = operand(source)
    unbinds = is_call(source, aten.unbind.int)
    at = wrap(arg(source, 1 if unbinds else 2, source.kwargs.get("dim", 0)), len(shape(x)))
    if at == axis and not unbinds:
        return None
    above = axis + (at <= axis) if unbinds else axis

    def build(emit: Emitter, pooled: list[fx.Node]) -> fx.Node:
        pieces = emit.call(source.target, pooled[0], *source.args[1:], **source.kwargs)
        return emit.call(operator.getitem, pieces, index)

    return ((x, above),), build


def _cat(node: fx.Node, axis: int) -> Moved | None:
    parts = list(arg(node, 0))
    at = wrap(arg(node, 1, 0), len(shape(node)))
    if at == axis or any(len(shape(p)) != len(shape(node)) for p in parts):
        return None
    return _same_operator(node, tuple((p, axis) for p in dict.fromkeys(parts)))


def _repeat_interleave(node: fx.Node, axis: int) -> Moved | None:
    """Of heads, along another axis."""
    dim = arg(node, 2, node.kwargs.get("dim"))
    if not isinstance(dim, int) or wrap(dim, len(shape(node))) == axis:
        return None
    return _same_operator(node, ((operand(node), axis),))


def _expand(node: fx.Node, axis: int) -> Moved | None:
    x, at = operand(node), axis - (len(shape(node)) - len(shape(operand(node))))
    if at < 0 or not same_size(value(x).shape[at], value(node).shape[axis]):
        return None

    def build(emit: Emitter, found: list[fx.Node]) -> fx.Node:
        sizes = list(arg(node, 1))
        sizes[axis] = -1
        return emit.call(aten.expand.default, found[0], sizes)

    return ((x, at),), build


def _linear(node: fx.Node, axis: int) -> Moved | None:
    return None if axis == len(shape(node)) - 1 else _same_operator(node, ((operand(node), axis),))


def _addmm(node: fx.Node, axis: int) -> Moved | None:
    bias, x = arg(node, 0), arg(node, 1)
    if axis != 0 or len(shape(bias)) > 1 or node.kwargs:
        return None
    return _same_operator(node, ((x, 0),))


def _matmul(node: fx.Node, axis: int) -> Moved | None:
    x, w = arg(node, 0), arg(node, 1)
    fits = x is not w and len(shape(w)) == 2 and len(shape(x)) == len(shape(node)) and axis < len(shape(node)) - 1
    return _same_operator(node, ((x, axis),)) if fits else None


def _sum(node: fx.Node, axis: int) -> Moved:
    """Of tensors and numbers; those that are the same for all tokens stay."""
    return _same_operator(node, _of_tokens(node, axis))


def _product(node: fx.Node, axis: int) -> Moved | None:
    below = _of_tokens(node, axis)
    is_factor = len(below) == 1 and arg(node, 0) is not arg(node, 1)
    if not is_factor or (calls(node, DIV) and below[0][0] is not arg(node, 0)):
        return None
    return _same_operator(node, below)


def _of_tokens(node: fx.Node, axis: int) -> Below:
    """The operands that differ from token to token."""
    found = []
    for x in dict.fromkeys(n for n in node.all_input_nodes if is_tensor(n)):
        at = axis - (len(shape(node)) - len(shape(x)))
        if at >= 0 and not same_size(value(x).shape[at], 1):
            found.append((x, at))
    return tuple(found)


_RULES: dict[Target, Callable[[fx.Node, int], Moved | None]] = rules(
    {
        Kind.RESHAPE: _reshape,
        Kind.PERMUTE: _permute,
        "unsqueeze": _unsqueeze,
        "squeeze": _squeeze,
        COPIES: _copy,
        "select slice": _slice,
        "getitem": _piece,
        "cat": _cat,
        "repeat_interleave": _repeat_interleave,
        Kind.EXPAND: _expand,
        "linear": _linear,
        "addmm": _addmm,
        "matmul mm": _matmul,
        ADD | SUB: _sum,
        MUL | DIV: _product,
    }
)
