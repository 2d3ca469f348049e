"""Forward slice propagation: through the users of a tensor of which only some slices are nonzero.

The dual of ``selection``: if heads are removed from an attention's output, the zeros that would replace them
are propagated forward through layout operators to the output projection, which becomes a weight with fewer columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnopt.graph.nodes import arg, aten, calls, is_call, is_tensor, shape, wrap
from attnopt.graph.ops import DIV, FACTORS, LINEAR, ZERO, Kind, rules
from attnopt.graph.products import expand_equation
from attnopt.graph.select import Selection
from attnopt.slicing.selection import Demand, aligned, is_weight, kept_by_squeeze, order_of, regroup, reshaped, unravel


@dataclass(frozen=True)
class Pushed:
    """``user`` applied to the remaining slices.

    ``selection``: the remaining slices of the user's result (None: all of it, the zeros end at this user).
    ``demands`` are selections of its other operands, ``build`` creates the call from (the slices, the demanded operands).
    ``linear``: the result is linear in the slices, so factors may move past it.
    """

    selection: Selection | None
    demands: tuple[Demand, ...]
    build: Callable[[fx.Node, Sequence[fx.Node]], tuple[Any, tuple[Any, ...], dict[str, Any]]]
    linear: bool = True


def push(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed | None:
    """``user`` of ``x``, when ``x`` is zero outside ``selection``; None if the zeros cannot move past it."""
    if user.op != "call_function" or user.all_input_nodes.count(x) != 1:
        return None
    if user.target in ZERO:
        return _same(user, x, selection, linear=user.target in LINEAR)
    rule = PUSHED.get(user.target)
    return None if rule is None else rule(user, x, selection)


def _same(user: fx.Node, x: fx.Node, selection: Selection, linear: bool = True) -> Pushed:
    return Pushed(selection, (), lambda new, _: _swap(user, {x: new}), linear)


def _swap(user: fx.Node, table: dict[fx.Node, fx.Node]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    args, kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: table.get(n, n))
    return user.target, args, kwargs


def _reshape(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed | None:
    groups = regroup(shape(x), shape(user))
    if groups is None:
        return None
    below: dict[int, tuple[int, ...]] = {}
    for mine, theirs in groups:
        chosen = {mine.index(a): idx for a, idx in selection.items() if a in mine}
        if not chosen:
            continue
        found = unravel([shape(x)[a] for a in mine], chosen, [shape(user)[a] for a in theirs])
        if found is None:
            return None
        below.update(zip(theirs, found, strict=True))
    below = {a: i for a, i in below.items() if len(i) != shape(user)[a]} or below
    made = reshaped(user, below, groups)
    return None if made is None else Pushed(below, (), lambda new, _: made(new))


def _permute(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed:
    order = order_of(user)
    below = {order.index(a): idx for a, idx in selection.items()}
    return Pushed(below, (), lambda new, _: _swap(user, {x: new}))


def _unsqueeze(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed:
    at = wrap(arg(user, 1), len(shape(user)))
    below = {a + (a >= at): idx for a, idx in selection.items()}
    return Pushed(below, (), lambda new, _: _swap(user, {x: new}))


def _squeeze(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed | None:
    left = kept_by_squeeze(user)
    if left is None:
        return None
    return Pushed({left.index(a): idx for a, idx in selection.items()}, (), lambda new, _: _swap(user, {x: new}))


def _slice(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed | None:
    at = wrap(arg(user, 1, 0), len(shape(x)))
    return None if at in selection else _same(user, x, selection)


def _product(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed | None:
    """x * other, x / other: zeros stay zeros."""
    if arg(user, 0) is not x and calls(user, DIV):
        return None
    if shape(user) != shape(x):
        return None
    other = arg(user, 1) if arg(user, 0) is x else arg(user, 0)
    if not is_tensor(other):
        return _same(user, x, selection)
    demand = (other, aligned(other, len(shape(user)), selection))
    return Pushed(selection, (demand,), lambda new, found: _swap(user, {x: new, other: found[0]}))


def _linear(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed | None:
    w, last = arg(user, 1), len(shape(x)) - 1
    if arg(user, 0) is not x or set(selection) != {last}:
        return None
    return Pushed(None, ((w, {1: selection[last]}),), lambda new, found: _swap(user, {x: new, w: found[0]}))


def _addmm(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed | None:
    w = arg(user, 2)
    if arg(user, 1) is not x or set(selection) != {1}:
        return None
    return Pushed(None, ((w, {0: selection[1]}),), lambda new, found: _swap(user, {x: new, w: found[0]}))


def _matmul(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed | None:
    w, last = arg(user, 1), len(shape(x)) - 1
    if arg(user, 0) is not x or set(selection) != {last}:
        return None
    demand = (w, {len(shape(w)) - 2: selection[last]})
    return Pushed(None, (demand,), lambda new, found: _swap(user, {x: new, w: found[0]})) if is_weight(w) else None


def _einsum(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed | None:
    equation, operands = arg(user, 0), arg(user, 1)
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    if len(operands) != 2:
        return None
    found = expand_equation(equation, tuple(len(shape(o)) for o in operands))
    if found is None:
        return None
    terms, out = found
    at = 0 if operands[0] is x else 1
    other = operands[1 - at]
    chosen = {terms[at][a]: idx for a, idx in selection.items()}
    demand = (other, {terms[1 - at].index(c): idx for c, idx in chosen.items() if c in terms[1 - at]})
    left = {out.index(c): idx for c, idx in chosen.items() if c in out}
    return Pushed(left or None, (demand,), lambda new, f: _swap(user, {x: new, other: f[0]}))


def _convolution(user: fx.Node, x: fx.Node, selection: Selection) -> Pushed | None:
    w = arg(user, 1)
    groups = user.args[-1] if len(user.args) >= 7 and isinstance(user.args[-1], int) else 1
    transposed = is_call(user, aten.convolution.default) and arg(user, 6)
    if arg(user, 0) is not x or set(selection) != {1} or groups != 1 or transposed:
        return None
    return Pushed(None, ((w, {1: selection[1]}),), lambda new, found: _swap(user, {x: new, w: found[0]}))


PUSHED: dict[Any, Callable[[fx.Node, fx.Node, Selection], Pushed | None]] = rules(
    {
        Kind.RESHAPE: _reshape,
        Kind.PERMUTE: _permute,
        "unsqueeze": _unsqueeze,
        "squeeze": _squeeze,
        "slice": _slice,
        "linear": _linear,
        "addmm": _addmm,
        "matmul mm": _matmul,
        "einsum": _einsum,
        Kind.CONVOLUTION: _convolution,
        FACTORS: _product,
    }
)
NOT_PUSHED = {
    "expand repeat repeat_interleave": "no model repeats the heads of an output",
    "select split split_with_sizes chunk unbind tensor_split getitem": "heads that go different ways have several projections",
    "cat stack": "what the heads are joined with is not zero",
    "flip roll constant_pad_nd pad": "no model moves heads before it projects them",
    "index index_select gather": "which elements are read is known only at run time",
    "view_as_complex view_as_real": "no model rotates an output",
}
