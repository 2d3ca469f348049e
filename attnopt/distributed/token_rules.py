"""Which part of its operands an operator needs for a part of its tokens: one rule for each operator that acts token by token.

A rule is asked for one axis of the result that holds the tokens, at the sizes of one call.  Its answer holds for any choice of
tokens, so a result that is computed from parts is a part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, fx
from torch.fx.node import Target

from attnopt.backends.attention_operator import ATTENTION, ATTENTION_WITH_LSE
from attnopt.graph.nodes import arg, calls, getitem_source, operand, wrap
from attnopt.graph.ops import Kind, Operators, is_pointwise, is_random, named, of, rules
from attnopt.graph.products import product_of
from attnopt.graph.sdpa import SDPA, call_arguments
from attnopt.patterns.algebra import FULL
from attnopt.patterns.registry import parse


@dataclass(frozen=True)
class Tokens:
    """Where tokens lie in a tensor: an axis, of ``outer`` times the length times ``inner`` elements."""

    axis: int
    outer: int = 1
    inner: int = 1

    def on(self, axis: int) -> Tokens:
        return Tokens(axis, self.outer, self.inner)


Needed = dict[fx.Node, Tokens | None]  # which tokens of an operand; None: all of it
Shape = tuple[int, ...]
ATTENTIONS: Operators = frozenset({SDPA, ATTENTION, ATTENTION_WITH_LSE})


@dataclass(frozen=True, eq=False)
class Call:
    """A node with the values of this call: tensors without data, numbers, or several of them."""

    node: fx.Node
    values: Mapping[fx.Node, Any]
    length: int

    def shape(self, node: fx.Node) -> Shape:
        return tuple(self.values[node].shape)

    @property
    def own(self) -> Shape:
        found = self.values[self.node]
        return tuple(found.shape) if isinstance(found, Tensor) else ()

    @property
    def tensors(self) -> list[fx.Node]:
        return [n for n in self.node.all_input_nodes if not isinstance(self.values[n], (int, float, bool))]

    def number(self, x: Any) -> Any:
        """The argument ``x`` with numbers in the place of nodes that compute them."""
        return fx.node.map_arg(x, lambda n: self.values[n] if not isinstance(self.values[n], Tensor) else n)


def needed(call: Call, at: Tokens) -> Needed | None:
    """What the tokens ``at`` of the result need; None if the operator does not act token by token along that axis."""
    rule = _RULES.get(call.node.target)
    if rule is None and is_pointwise(call.node.target):
        rule = _pointwise
    return None if rule is None or draws(call.node) else rule(call, at)


def draws(node: fx.Node) -> bool:
    """Whether it draws random numbers."""
    if calls(node, of(Kind.DROPOUT)):
        return bool(arg(node, 2, True)) and arg(node, 1) != 0.0
    if calls(node, ATTENTIONS):
        return bool(call_arguments(node).get("dropout_p"))
    return is_random(node.target)


def _alone(call: Call, at: Tokens | None) -> Needed:
    """Of the first operand; others are whole."""
    return {n: at if n is arg(call.node, 0) else None for n in call.tensors}


def _broadcast(call: Call, at: Tokens, operands: Iterable[fx.Node]) -> Needed | None:
    found: Needed = {}
    for n in operands:
        sizes = call.shape(n)
        axis = at.axis - len(call.own) + len(sizes)
        is_there = axis >= 0 and sizes[axis] != 1
        if is_there and sizes[axis] != call.own[at.axis]:
            return None
        found[n] = at.on(axis) if is_there else None
    return found


def _pointwise(call: Call, at: Tokens) -> Needed | None:
    return _broadcast(call, at, call.tensors)


def _reshaped(call: Call, at: Tokens) -> Needed | None:
    there = moved(at, call.own, call.shape(operand(call.node)), call.length)
    return None if there is None else _alone(call, there)


def moved(at: Tokens, sizes: Shape, others: Shape, length: int) -> Tokens | None:
    """The same tokens after a reshape from ``sizes`` to ``others``."""
    before, after = prod(sizes[: at.axis]) * at.outer, prod(sizes[at.axis + 1 :]) * at.inner
    for axis, size in enumerate(others):
        first, last = prod(others[:axis]), prod(others[axis + 1 :])
        if before % first or after % last:
            continue
        outer, inner = before // first, after // last
        if outer * length * inner == size:
            return Tokens(axis, outer, inner)
    return None


def _permuted(call: Call, at: Tokens) -> Needed:
    node, ndim = call.node, len(call.own)
    order = list(range(ndim))
    if calls(node, named("permute")):
        order = [wrap(int(d), ndim) for d in arg(node, 1)]
    else:
        i, j = (wrap(int(arg(node, k, -k)), ndim) for k in (1, 2)) if ndim > 1 else (0, 0)
        order[i], order[j] = order[j], order[i]
    return _alone(call, at.on(order[at.axis]))


def _expanded(call: Call, at: Tokens) -> Needed | None:
    return _broadcast(call, at, [operand(call.node)])


def _repeated(call: Call, at: Tokens) -> Needed | None:
    axis = at.axis - len(call.own) + len(sizes := call.shape(operand(call.node)))
    return _alone(call, at.on(axis)) if axis >= 0 and sizes[axis] == call.own[at.axis] != 1 else None


def _selected(call: Call, at: Tokens) -> Needed:
    dropped = wrap(int(call.number(arg(call.node, 1))), len(call.own) + 1)
    return _alone(call, at.on(at.axis + (dropped <= at.axis)))


def _sliced(call: Call, at: Tokens) -> Needed | None:
    sizes = call.shape(operand(call.node))
    along = wrap(int(arg(call.node, 1, 0)), len(sizes))
    return _alone(call, at) if along != at.axis or sizes == call.own else None


def _split(call: Call, at: Tokens) -> Needed | None:
    """Of the tensor that is split, along another axis; the tokens are those of each part."""
    along = _split_along(call)
    if calls(call.node, named("unbind")):
        return _alone(call, at.on(at.axis + (along <= at.axis)))
    return None if along == at.axis else _alone(call, at)


def _split_along(call: Call) -> int:
    node = call.node
    place = 1 if calls(node, named("unbind")) else 2
    return wrap(int(arg(node, place, node.kwargs.get("dim", 0))), len(call.shape(operand(node))))


def _piece(call: Call, at: Tokens) -> Needed | None:
    found = getitem_source(call.node)
    has_parts = of(Kind.SPLIT) | {ATTENTION_WITH_LSE}
    return {found[0]: at} if found is not None and calls(found[0], has_parts) else None


def _cat(call: Call, at: Tokens) -> Needed | None:
    along = wrap(int(arg(call.node, 1, call.node.kwargs.get("dim", 0))), len(call.own))
    parts, filled = call.tensors, [p for p in arg(call.node, 0) if 0 not in call.shape(p)]
    if len(filled) == 1:  # as behind an empty cache
        return {p: at if p is filled[0] else None for p in parts}
    if along == at.axis or any(len(call.shape(p)) != len(call.own) for p in parts):
        return None
    return dict.fromkeys(parts, at)


def _stack(call: Call, at: Tokens) -> Needed | None:
    along = wrap(int(arg(call.node, 1, call.node.kwargs.get("dim", 0))), len(call.own))
    return None if along == at.axis else dict.fromkeys(call.tensors, at.on(at.axis - (along < at.axis)))


def _linear(call: Call, at: Tokens) -> Needed | None:
    return _alone(call, at) if at.axis < len(call.own) - 1 else None


def _product(call: Call, at: Tokens) -> Needed | None:
    found = product_of(call.node)
    if found is None or found.left is found.right:
        return None
    atoms = found.axes[at.axis]
    if not atoms:
        return None
    needs: Needed = {}
    for n, axes in ((found.left, found.left_axes), (found.right, found.right_axes)):
        there = [i for i, axis in enumerate(axes) if axis == atoms]
        needs[n] = at.on(there[0]) if there else None
    if found.addend is not None:
        if found.addend in needs:
            return None
        needs |= _broadcast(call, at, [found.addend]) or {found.addend: None}
    return needs


def _embedding(call: Call, at: Tokens) -> Needed | None:
    indices = operand(call.node, 1)
    return {operand(call.node): None, indices: at} if at.axis < len(call.shape(indices)) else None


def _normed(call: Call, at: Tokens) -> Needed | None:
    return _alone(call, at) if at.axis < len(call.own) - len(call.number(arg(call.node, 1))) else None


def _batch_normed(call: Call, at: Tokens) -> Needed | None:
    return _alone(call, at) if at.axis != 1 and not arg(call.node, 5) else None


def _convolution(call: Call, at: Tokens) -> Needed | None:
    """With kernels of one element along the tokens, each at its place; a batch of sequences is a batch."""
    if at.axis == 0:
        return _alone(call, at)
    strides = call.number(arg(call.node, 3, 1))
    if any(s != 1 for s in (strides if isinstance(strides, (list, tuple)) else [strides])):
        return None
    kernel, x = call.shape(operand(call.node, 1)), call.shape(operand(call.node))
    as_long = at.axis > 1 and kernel[at.axis] == 1 and call.own[at.axis] == x[at.axis]
    return _alone(call, at) if as_long else None


def _softmax(call: Call, at: Tokens) -> Needed | None:
    return None if wrap(int(arg(call.node, 1)), len(call.own)) == at.axis else _alone(call, at)


def _reduced(call: Call, at: Tokens) -> Needed | None:
    node = call.node
    dims = arg(node, 2 if calls(node, named("linalg_vector_norm norm")) else 1)
    if isinstance(dims, bool) or not isinstance(dims, (int, list, tuple)) or dims in ([], ()):
        return None
    sizes = call.shape(operand(node))
    gone = {wrap(int(d), len(sizes)) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    kept = [i for i in range(len(sizes)) if i not in gone] if len(call.own) != len(sizes) else list(range(len(sizes)))
    axis = kept[at.axis]
    return None if axis in gone else _alone(call, at.on(axis))


def _looked_up(call: Call, at: Tokens) -> Needed | None:
    """Rows of a table: the indices are those of the tokens, or each row has all tokens."""
    node, table = call.node, operand(call.node)
    if calls(node, named("index_select")):
        along, indices = wrap(int(arg(node, 1)), len(call.own)), operand(node, 2)
        if along == at.axis:
            return {table: None, indices: at.on(0)} if table is not indices else None
        return {table: at, indices: None}
    if calls(node, named("gather")):
        along, indices = wrap(int(arg(node, 1)), len(call.own)), operand(node, 2)
        same = call.shape(table)[at.axis] == call.own[at.axis]
        return {table: at, indices: at} if along != at.axis and same else None
    given = arg(node, 1)
    if (
        len(given) != 1
        or not isinstance(given[0], fx.Node)
        or str(call.values[given[0]].dtype) in ("torch.bool", "torch.uint8")
    ):
        return None
    ndim = len(call.shape(given[0]))
    if at.axis < ndim:
        return {table: None, given[0]: at}
    return {table: at.on(at.axis - ndim + 1), given[0]: None}


def _pairs(call: Call, at: Tokens) -> Needed | None:
    return _alone(call, at) if at.axis < min(len(call.own), len(call.shape(operand(call.node)))) - 1 else None


def _moved(call: Call, at: Tokens) -> Needed | None:
    dims = arg(call.node, 1) if calls(call.node, named("flip")) else arg(call.node, 2, ())
    touched = {wrap(int(d), len(call.own)) for d in dims}
    return _alone(call, at) if dims and at.axis not in touched else None


def _padded(call: Call, at: Tokens) -> Needed | None:
    around = call.number(arg(call.node, 1))
    place = 2 * (len(call.own) - 1 - at.axis)
    return _alone(call, at) if not any(around[place : place + 2]) else None


def _attended(call: Call, at: Tokens) -> Needed | None:
    """Queries over keys that are whole, as those of another sequence, if no positions are compared."""
    given = call_arguments(call.node)
    chooses = any(given.get(name) is not None for name in ("selected", "wanted"))
    if at != Tokens(2) or given.get("is_causal") or chooses or parse(given.get("pattern", str(FULL))) != FULL:
        return None
    found: Needed = {}
    for name, n in given.items():
        if not isinstance(n, fx.Node) or not isinstance(call.values[n], Tensor):
            continue
        axis = _QUERIES.get(name, -1)
        need = Tokens(axis) if axis > 0 and call.shape(n)[axis] != 1 else None
        if found.setdefault(n, need) != need:
            return None
    return found


_QUERIES = {"q": 2, "query": 2, "attn_mask": 2, "bias": 2, "mask": 2, "sinks": 2, "q_segments": 1}  # their axis


def _made(call: Call, at: Tokens) -> Needed | None:
    """One number everywhere."""
    return dict.fromkeys(call.tensors)


_RULES: dict[Target, Callable[[Call, Tokens], Needed | None]] = rules(
    {
        Kind.RESHAPE: _reshaped,
        Kind.ONES: _reshaped,
        Kind.PERMUTE: _permuted,
        Kind.EXPAND: _expanded,
        Kind.REPEAT: _repeated,
        "select": _selected,
        "slice": _sliced,
        Kind.SPLIT: _split,
        "getitem": _piece,
        "cat": _cat,
        "stack": _stack,
        "linear": _linear,
        "matmul bmm mm addmm baddbmm einsum tensordot": _product,
        Kind.EMBEDDING: _embedding,
        "layer_norm rms_norm": _normed,
        "batch_norm": _batch_normed,
        Kind.CONVOLUTION: _convolution,
        Kind.SOFTMAX: _softmax,
        Kind.LOG_SOFTMAX: _softmax,
        Kind.REDUCE: _reduced,
        "index index_select gather": _looked_up,
        Kind.PAIRS: _pairs,
        Kind.MOVE: _moved,
        "constant_pad_nd": _padded,
        "ones_like zeros_like full_like": _pointwise,
        "ones zeros full": _made,
        ATTENTIONS: _attended,
    }
)
SIZED = of(Kind.RESHAPE, Kind.EXPAND) | named("ones zeros full")  # the sizes of the result are an argument
