"""Selections pulled upwards: ``select(op(x), i)`` rewritten as ``op(select(x, i'))``, operator by operator.

This is how attnopt knows which weight rows make a head, and how it removes one: the selection of some heads at an
attention's input is moved up through views, rotations, norms and concatenations until it reaches weights, where it
becomes a smaller weight.  Each rule is an exact identity; where there is none, the selection stays where it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnopt.contraction import expand_equation
from attnopt.graph import (
    CASTS,
    RESHAPES,
    arg,
    aten,
    getitem_source,
    is_call,
    is_static,
    is_tensor,
    operand,
    opname,
    shape,
    value,
    wrap,
)

Selection = Mapping[int, tuple[int, ...]]  # axis -> the indices that stay, in their order; other axes stay whole
Demand = tuple[fx.Node, Selection]


@dataclass(frozen=True)
class Pulled:
    """``select(node)`` equals ``target(*args, **kwargs)`` made by ``build`` from the demanded selections, in their order.

    ``weights`` says which demands are on weights of a projection rather than on the data that runs through it;
    ``across`` means that the selection is along the tokens or batch of a projection.
    """

    demands: tuple[Demand, ...]
    build: Callable[[Sequence[fx.Node]], tuple[Any, tuple[Any, ...], dict[str, Any]]] | None  # None: the demand itself
    weights: frozenset[int] = frozenset()
    across: bool = False


_UNARY = {
    "neg",
    "relu",
    "gelu",
    "silu",
    "sigmoid",
    "tanh",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "abs",
    "sin",
    "cos",
    "square",
    "pow",
    "clone",
    "contiguous",
    "detach",
    "alias",
    "dropout",
    "elu",
    "leaky_relu",
    "softplus",
    "hardtanh",
    "clamp",
    "clamp_min",
    "nan_to_num",
    "conj",
    "_conj",
    "resolve_conj",
    "resolve_neg",
    "bitwise_not",
    "logical_not",
    "conj_physical",
}
_BINARY = {
    "add",
    "sub",
    "mul",
    "div",
    "rsub",
    "maximum",
    "minimum",
    "where",
    "masked_fill",
    "addcmul",
    "pow",
    "bitwise_and",
    "bitwise_or",
    "eq",
    "ne",
    "ge",
    "gt",
    "le",
    "lt",
    "__and__",
    "__or__",
    "logical_and",
    "logical_or",
}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "linalg_vector_norm", "norm", "var", "std", "any", "all"}


def whole(node: fx.Node, selection: Selection) -> bool:
    """The selection keeps everything of ``node`` in its order."""
    sizes = shape(node)
    return all(is_static(value(node).shape[a]) and idx == tuple(range(sizes[a])) for a, idx in selection.items())


def trim(node: fx.Node, selection: Selection) -> dict[int, tuple[int, ...]]:
    """The selection without the axes that it keeps whole."""
    if not selection:
        return {}
    sizes = shape(node)
    return {a: idx for a, idx in sorted(selection.items()) if idx != tuple(range(sizes[a]))}


def pull(node: fx.Node, selection: Selection) -> Pulled | None:
    """How to make ``select(node, selection)`` from selections of what ``node`` is computed from; None: no rule."""
    if node.op != "call_function":
        return None
    name = opname(node)
    rule = _RULES.get(name)
    if rule is not None:
        return rule(node, selection)
    if is_call(node, *CASTS) or name in _UNARY and not any(is_tensor(a) for a in node.args[1:]):
        return _elementwise(node, selection)
    if name in _BINARY:
        return _elementwise(node, selection)
    if name in _REDUCTIONS:
        return _reduction(node, selection)
    return None


def _replaced(node: fx.Node, originals: Sequence[fx.Node]) -> Callable[[Sequence[fx.Node]], Any]:
    """A builder that calls the same operator with each of ``originals`` replaced by its selection."""

    def build(found: Sequence[fx.Node]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        table = dict(zip(originals, found, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: table.get(n, n))
        return node.target, args, kwargs

    return build


def _with_args(node: fx.Node, *args: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return node.target, args, dict(node.kwargs)


def aligned(operand: fx.Node, ndim: int, selection: Selection) -> dict[int, tuple[int, ...]]:
    """The selection on an operand that was broadcast to ``ndim`` axes."""
    sizes = shape(operand)
    shift = ndim - len(sizes)
    return {a - shift: idx for a, idx in selection.items() if a >= shift and sizes[a - shift] != 1}


def _elementwise(node: fx.Node, selection: Selection) -> Pulled:
    operands = list(dict.fromkeys(n for n in node.all_input_nodes if is_tensor(n)))
    ndim = len(shape(node))
    return Pulled(tuple((n, aligned(n, ndim, selection)) for n in operands), _replaced(node, operands))


def regroup(outer: Sequence[int], inner: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Axes of two shapes of one size, in the smallest groups whose products agree."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(outer) or j < len(inner):
        a, b = [i] if i < len(outer) else [], [j] if j < len(inner) else []
        pa = outer[i] if a else 1
        pb = inner[j] if b else 1
        i, j = i + len(a), j + len(b)
        while pa != pb:
            if pa < pb and i < len(outer):
                pa, a, i = pa * outer[i], [*a, i], i + 1
            elif pb < pa and j < len(inner):
                pb, b, j = pb * inner[j], [*b, j], j + 1
            else:
                return None
        groups.append((a, b))
    return groups


def unravel(
    sizes: Sequence[int], chosen: Mapping[int, Sequence[int]], target: Sequence[int]
) -> list[tuple[int, ...]] | None:
    """Indices along each axis of ``target`` that a choice along the axes of ``sizes`` amounts to, both in C order.

    None unless what is chosen is a product of choices along the target's axes, in the same order.
    """
    flat = [0]
    for axis, size in enumerate(sizes):
        keep = chosen.get(axis, range(size))
        flat = [f * size + k for f in flat for k in keep]
    if len(target) == 1:
        return [tuple(flat)]
    per_axis: list[tuple[int, ...]] = []
    rest = math.prod(target)
    for size in target:
        rest //= size
        per_axis.append(tuple(dict.fromkeys(f // rest % size for f in flat)))
    again = [0]
    for size, keep in zip(target, per_axis, strict=True):
        again = [f * size + k for f in again for k in keep]
    return per_axis if again == flat else None


def _reshape(node: fx.Node, selection: Selection) -> Pulled | None:
    x = operand(node)
    groups = regroup(shape(node), shape(x))
    if groups is None:
        return None
    out, source = shape(node), shape(x)
    below: dict[int, tuple[int, ...]] = {}
    for mine, theirs in groups:
        chosen = {mine.index(a): idx for a, idx in selection.items() if a in mine}
        if not chosen:
            continue
        found = unravel([out[a] for a in mine], chosen, [source[a] for a in theirs])
        if found is None:
            return None
        below.update(zip(theirs, found, strict=True))
    return Pulled(((x, trim(x, below)),), lambda f: _with_args(node, f[0], _resized(node, selection)))


def _resized(node: fx.Node, selection: Selection) -> list[Any]:
    """The size argument of a reshape or expand whose result is selected."""
    sizes = list(arg(node, 1))
    for axis in range(len(sizes)):
        if axis in selection:
            sizes[axis] = len(selection[axis])
        elif sizes[axis] == -1 and is_static(value(node).shape[axis]):
            sizes[axis] = shape(node)[axis]
    return sizes


def _permute(node: fx.Node, selection: Selection) -> Pulled:
    x = operand(node)
    n = len(shape(x))
    order = list(range(n))
    if is_call(node, aten.permute.default):
        order = [wrap(int(d), n) for d in arg(node, 1)]
    elif is_call(node, aten.transpose.int):
        i, j = wrap(arg(node, 1), n), wrap(arg(node, 2), n)
        order[i], order[j] = order[j], order[i]
    elif n >= 2:
        order[-2], order[-1] = order[-1], order[-2]
    return Pulled(((x, {order[a]: idx for a, idx in selection.items()}),), _replaced(node, [x]))


def _unsqueeze(node: fx.Node, selection: Selection) -> Pulled:
    x, dim = operand(node), arg(node, 1)
    at = wrap(dim, len(shape(x)) + 1)
    below = {a - (a > at): idx for a, idx in selection.items() if a != at}
    return Pulled(((x, below),), _replaced(node, [x]))


def _squeeze(node: fx.Node, selection: Selection) -> Pulled | None:
    x = operand(node)
    n = len(shape(x))
    if len(node.args) < 2:
        return None
    dims = arg(node, 1) if isinstance(arg(node, 1), (list, tuple)) else [arg(node, 1)]
    gone = {wrap(int(d), n) for d in dims if shape(x)[wrap(int(d), n)] == 1}
    left = [a for a in range(n) if a not in gone]
    return Pulled(((x, {left[a]: idx for a, idx in selection.items()}),), _replaced(node, [x]))


def _expand(node: fx.Node, selection: Selection) -> Pulled:
    x = operand(node)
    below = aligned(x, len(shape(node)), selection)
    return Pulled(((x, below),), lambda f: _with_args(node, f[0], _resized(node, selection)))


def _select(node: fx.Node, selection: Selection) -> Pulled:
    x, dim, index = arg(node, 0), arg(node, 1), arg(node, 2)
    at = wrap(int(dim), len(shape(x)))
    below: dict[int, tuple[int, ...]] = {a + (a >= at): idx for a, idx in selection.items()}
    if not is_static(value(x).shape[at]):
        return Pulled(((x, below),), _replaced(node, [x]))
    below[at] = (wrap(index, shape(x)[at]),)
    return Pulled(((x, below),), lambda f: (aten.select.int, (f[0], at, 0), {}))


def _slice(node: fx.Node, selection: Selection) -> Pulled:
    x, start, end, step = operand(node), arg(node, 2, 0), arg(node, 3, 2**63 - 1), arg(node, 4, 1)
    at = wrap(arg(node, 1, 0), len(shape(x)))
    if at not in selection:
        return Pulled(((x, selection),), _replaced(node, [x]))
    taken = range(shape(x)[at])[slice(_bound(start), _bound(end), _bound(step))]
    return Pulled(((x, {**selection, at: tuple(taken[i] for i in selection[at])}),), None)


def _bound(x: Any) -> int | None:
    if isinstance(x, fx.Node):
        val = value(x)
        return int(val.node.hint) if hasattr(val, "node") else int(val)
    return None if x is None else int(x)


def _getitem(node: fx.Node, selection: Selection) -> Pulled | None:
    """One piece of a split, chunk or unbind."""
    found = getitem_source(node)
    if found is None:
        return None
    source, index = found
    x = arg(source, 0)
    name = opname(source)
    if not is_tensor(x) or name not in ("split", "split_with_sizes", "chunk", "unbind", "tensor_split"):
        return None
    default = 1 if name == "unbind" else 2
    at = wrap(arg(source, default, source.kwargs.get("dim", 0)), len(shape(x)))
    if name == "unbind":
        below = {a + (a >= at): idx for a, idx in selection.items()}
        below[at] = (index,)
        return Pulled(((x, below),), lambda f: (aten.select.int, (f[0], at, 0), {}))
    pieces = value(source)
    start = sum(int(p.shape[at]) for p in pieces[:index])
    size = int(value(node).shape[at])
    if at in selection:
        return Pulled(((x, {**selection, at: tuple(start + i for i in selection[at])}),), None)
    return Pulled(((x, selection),), lambda f: (aten.slice.Tensor, (f[0], at, start, start + size), {}))


def _cat(node: fx.Node, selection: Selection) -> Pulled | None:
    n = len(shape(node))
    parts = [p for p in arg(node, 0) if len(shape(p)) == n]  # torch takes empty 1-D ones
    at = wrap(arg(node, 1, 0), n)
    others = {a: idx for a, idx in selection.items() if a != at}
    if at not in selection:
        return Pulled(tuple((p, others) for p in parts), lambda f: (node.target, (list(f), at), {}))
    demands: list[Demand] = []
    wanted, start = list(selection[at]), 0
    for part in parts:
        size = shape(part)[at]
        mine = tuple(i - start for i in wanted if start <= i < start + size)
        if mine:
            demands.append((part, {**others, at: mine}))
        start += size
    if wanted != sorted(wanted) or not demands:
        return None
    if len(demands) == 1:
        return Pulled(tuple(demands), None)
    return Pulled(tuple(demands), lambda f: (node.target, (list(f), at), {}))


def _stack(node: fx.Node, selection: Selection) -> Pulled | None:
    parts = list(arg(node, 0))
    at = wrap(arg(node, 1, 0), len(shape(node)))
    below = {a - (a > at): idx for a, idx in selection.items() if a != at}
    kept = [parts[i] for i in selection.get(at, range(len(parts)))]
    return Pulled(tuple((p, below) for p in kept), lambda f: (node.target, (list(f), at), {}))


def _linear(node: fx.Node, selection: Selection) -> Pulled | None:
    x, w = arg(node, 0), arg(node, 1)
    bias = arg(node, 2)
    last = len(shape(node)) - 1
    if set(selection) - {last}:
        return None if last in selection else Pulled(((x, selection),), _replaced(node, [x]), across=True)
    demands: list[Demand] = [(w, {0: selection[last]})]
    if is_tensor(bias):
        demands.append((bias, {0: selection[last]}))
    return Pulled(tuple(demands), lambda f: (node.target, (x, *f), {}), weights=frozenset(range(len(demands))))


def _addmm(node: fx.Node, selection: Selection) -> Pulled | None:
    bias, x, w = arg(node, 0), arg(node, 1), arg(node, 2)
    if set(selection) != {1}:
        return None
    below = aligned(bias, 2, selection)
    return Pulled(
        ((bias, below), (w, {1: selection[1]})),
        lambda f: (node.target, (f[0], x, f[1]), dict(node.kwargs)),
        weights=frozenset((0, 1)),
    )


def _matmul(node: fx.Node, selection: Selection) -> Pulled | None:
    a, b = arg(node, 0), arg(node, 1)
    n = len(shape(node))
    if len(shape(a)) < 2 or len(shape(b)) < 2:
        return None
    batch = {axis: idx for axis, idx in selection.items() if axis < n - 2}
    left, right = aligned(a, n, batch), aligned(b, n, batch)
    if n - 2 in selection:
        left[len(shape(a)) - 2] = selection[n - 2]
    if n - 1 in selection:
        right[len(shape(b)) - 1] = selection[n - 1]
    weights = frozenset(i for i, (x, s) in enumerate(((a, left), (b, right))) if s and is_weight(x))
    return Pulled(((a, left), (b, right)), _replaced(node, [a, b]) if a is not b else None, weights, across=not weights)


def _einsum(node: fx.Node, selection: Selection) -> Pulled | None:
    equation, operands = arg(node, 0), arg(node, 1)
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    found = expand_equation(equation, tuple(len(shape(o)) for o in operands))
    if found is None:
        return None
    terms, out = found
    chosen = {out[a]: idx for a, idx in selection.items()}
    demands = tuple(
        (o, {t.index(c): idx for c, idx in chosen.items() if c in t and shape(o)[t.index(c)] != 1})
        for o, t in zip(operands, terms, strict=True)
    )
    weights = frozenset(i for i, (o, s) in enumerate(demands) if s and is_weight(o))
    build = lambda f: (node.target, (equation, list(f)), {})
    return Pulled(demands, build, weights, across=not weights)


def is_weight(node: fx.Node) -> bool:
    """``node`` is a parameter or buffer, or a layout change of one."""
    while is_call(
        node,
        *RESHAPES,
        *CASTS,
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.mT.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
    ):
        node = arg(node, 0)
    return node.op == "get_attr"


def _convolution(node: fx.Node, selection: Selection) -> Pulled | None:
    x, w = arg(node, 0), arg(node, 1)
    bias = arg(node, 2)
    groups = node.args[-1] if isinstance(node.args[-1], int) and len(node.args) >= 7 else 1
    if is_call(node, aten.convolution.default) and arg(node, 6):  # transposed
        return None
    if 1 not in selection:
        return Pulled(((x, selection),), _replaced(node, [x]), across=True) if set(selection) == {0} else None
    if set(selection) != {1}:
        return None
    rows = selection[1]
    demands: list[Demand] = [(w, {0: rows})]
    if is_tensor(bias):
        demands.append((bias, {0: rows}))
    if groups == 1:
        operands = [w, bias] if is_tensor(bias) else [w]
        return Pulled(tuple(demands), _replaced(node, operands), weights=frozenset(range(len(demands))))
    if groups != shape(x)[1] or groups != shape(node)[1]:
        return None
    depthwise = [*demands, (x, {1: rows})]

    def build(f: Sequence[fx.Node]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        args = [f[-1], *f[:-1], *node.args[len(f) :]] if is_tensor(bias) else [f[-1], f[0], *node.args[2:]]
        args[-1] = len(rows)
        return node.target, tuple(args), dict(node.kwargs)

    return Pulled(tuple(depthwise), build)


def _norm(node: fx.Node, selection: Selection) -> Pulled | None:
    """layer_norm and rms_norm: whole along the normalised axes."""
    x, normalized = arg(node, 0), arg(node, 1)
    first = len(shape(x)) - len(normalized)
    return None if any(a >= first for a in selection) else Pulled(((x, selection),), _replaced(node, [x]))


def _batch_norm(node: fx.Node, selection: Selection) -> Pulled | None:
    operands = [n for n in node.all_input_nodes if is_tensor(n)]
    if arg(node, 5):  # training: statistics of the batch
        return None
    x = arg(node, 0)
    if set(selection) - {1}:
        return None
    demands = tuple((n, selection if n is x else {0: selection[1]}) for n in operands)
    return Pulled(demands, _replaced(node, operands))


def _reduction(node: fx.Node, selection: Selection) -> Pulled | None:
    x = arg(node, 0)
    position = 2 if opname(node) in ("linalg_vector_norm", "norm") else 1
    dims = node.args[position] if len(node.args) > position else None
    if not is_tensor(x) or not isinstance(dims, (list, tuple, int)):
        return None
    n = len(shape(x))
    reduced = {wrap(int(d), n) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    kept = len(shape(node)) == n
    axes = [a for a in range(n) if kept or a not in reduced]
    below = {axes[a]: idx for a, idx in selection.items()}
    return None if set(below) & reduced else Pulled(((x, below),), _replaced(node, [x]))


def _softmax(node: fx.Node, selection: Selection) -> Pulled | None:
    x = operand(node)
    at = wrap(arg(node, 1), len(shape(x)))
    return None if at in selection else Pulled(((x, selection),), _replaced(node, [x]))


def _repeat_interleave(node: fx.Node, selection: Selection) -> Pulled | None:
    x, times = arg(node, 0), arg(node, 1)
    dim = arg(node, 2, node.kwargs.get("dim"))
    if not isinstance(times, int) or not isinstance(dim, int):
        return None
    at = wrap(dim, len(shape(x)))
    if at not in selection:
        return Pulled(((x, selection),), _replaced(node, [x]))
    return Pulled(((x, {**selection, at: tuple(i // times for i in selection[at])}),), None)


def _repeat(node: fx.Node, selection: Selection) -> Pulled | None:
    x, times = arg(node, 0), arg(node, 1)
    if any(not isinstance(t, int) for t in times):
        return None
    shift = len(times) - len(shape(x))
    below: dict[int, tuple[int, ...]] = {}
    again = list(times)
    for a, idx in selection.items():
        if a >= shift:
            below[a - shift] = tuple(i % shape(x)[a - shift] for i in idx)
        again[a] = 1 if a >= shift else len(idx)
    build = lambda f: (node.target, (f[0], again), {})
    return Pulled(((x, trim(x, below)),), None if all(t == 1 for t in again) and shift == 0 else build)


def _index_select(node: fx.Node, selection: Selection) -> Pulled | None:
    return None if wrap(arg(node, 1), len(shape(node))) in selection else _elementwise_first(node, selection)


def _elementwise_first(node: fx.Node, selection: Selection) -> Pulled:
    x = operand(node)
    return Pulled(((x, selection),), _replaced(node, [x]))


def _complex_view(node: fx.Node, selection: Selection) -> Pulled | None:
    x = operand(node)
    return (
        None
        if len(shape(node)) - 1 in selection and len(shape(node)) > len(shape(x))
        else _elementwise_first(node, selection)
    )


def _embedding(node: fx.Node, selection: Selection) -> Pulled | None:
    w = operand(node)
    last = len(shape(node)) - 1
    if set(selection) != {last}:
        return None
    return Pulled(((w, {1: selection[last]}),), _replaced(node, [w]), weights=frozenset((0,)))


def _roll(node: fx.Node, selection: Selection) -> Pulled | None:
    dims = arg(node, 2, ())
    n = len(shape(node))
    moved = {wrap(int(d), n) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return None if not moved or moved & set(selection) else _elementwise_first(node, selection)


def _flip(node: fx.Node, selection: Selection) -> Pulled | None:
    n = len(shape(node))
    return None if {wrap(int(d), n) for d in arg(node, 1)} & set(selection) else _elementwise_first(node, selection)


def _pad(node: fx.Node, selection: Selection) -> Pulled | None:
    pads, n = list(arg(node, 1)), len(shape(node))
    padded = {n - 1 - i // 2 for i, p in enumerate(pads) if p != 0}
    return None if padded & set(selection) else _elementwise_first(node, selection)


_RULES: dict[str, Callable[[fx.Node, Selection], Pulled | None]] = {
    "view": _reshape,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "permute": _permute,
    "transpose": _permute,
    "t": _permute,
    "mT": _permute,
    "numpy_T": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "select": _select,
    "slice": _slice,
    "getitem": _getitem,
    "cat": _cat,
    "stack": _stack,
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "einsum": _einsum,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "convolution": _convolution,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "batch_norm": _batch_norm,
    "softmax": _softmax,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "index_select": _index_select,
    "view_as_complex": _complex_view,
    "view_as_real": _complex_view,
    "embedding": _embedding,
    "roll": _roll,
    "flip": _flip,
    "constant_pad_nd": _pad,
    "pad": _pad,
}
