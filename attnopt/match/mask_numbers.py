"""The numbers at which a mask from index arithmetic can change; None if anything else can change it."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor, fx
from torch.fx.node import Target

from attnopt.base.sizes import is_static, symbols_of
from attnopt.graph.evaluate import evaluate, inputs_behind, is_plain
from attnopt.graph.nodes import ancestors, arg, aten, calls, constant_of, is_call, is_number, is_tensor, value
from attnopt.graph.ops import LAYOUT, Kind, named, of, rules

FARTHEST = 131_072  # masks are not evaluated beyond this length
_TOO_FAR = 3 * FARTHEST  # nor is one named that may change beyond this one, at which the sum of two numbers is
_NO_LENGTH = 1 << 24  # larger numbers are not lengths, but effectively infinite

Lengths = tuple[int | torch.SymInt, int | torch.SymInt]


@dataclass(frozen=True)
class Numbers:
    """``places``: integers around which a mask may change.  ``sizes``: the graph's symbols that it depends on.

    ``reach``: a length beyond all combinations of the numbers, or FARTHEST.  ``anywhere``: the mask may hold anything
    anywhere, such as slices of stored tensors.
    """

    places: frozenset[int]
    sizes: frozenset[sympy.Symbol]
    reach: int
    anywhere: bool


def numbers_behind(nodes: Sequence[fx.Node], lengths: Lengths, smooth: bool = False) -> Numbers | None:
    """None if a number exceeds FARTHEST, or if the nodes depend on a size by more than sums, products with
    numbers, and steps: a logarithm or a power may change far away from all its numbers.

    Fill values, such as mask values, do not count unless they are compared.  ``smooth``: powers may be there if nothing compares
    them; whoever asks has to compare values, not only which of them are zero.
    """
    every = list(dict.fromkeys(n for node in nodes for n in ancestors(node, stop=is_number)))
    sizes = frozenset(s for n in every for s in _symbols(value(n)))
    fixed = _fixed(every, nodes) if sizes else {n: constant_of(n) for n in every if n.op == "get_attr"}
    made = [n for n in every if n in fixed or _varies(n) or not sizes]
    stepped = _stepped(made)
    passed = {n for n in made if smooth and calls(n, _SMOOTH) and n not in stepped}
    is_regular = all(_is_regular(n, lengths) for n in made if n not in fixed and not is_number(n) and n not in passed)
    anywhere = not is_regular or any(sum(s > 1 for s in t.shape) > 1 for t in fixed.values() if t is not None)
    counts_up = any(is_call(n, aten.cumsum.default) for n in made)
    numbers = {n: list(_numbers(n, fixed, n in stepped, counts_up)) for n in made}
    found = {n for given in numbers.values() for x in given for n in _whole(abs(x))}
    if not sizes:
        return Numbers(frozenset(found), sizes, FARTHEST, anywhere)
    times = math.prod(max(1.0, abs(x)) for n in made if n not in fixed for x in _factors(n, counts_up))
    near = {x for x in found if x < _NO_LENGTH * times}
    if not is_regular or any(x > FARTHEST for x in near) or (near < found and any(map(_multiplies, made))):
        return None
    reach = _reach(nodes, {n: [x for x in given if abs(x) < _NO_LENGTH * times] for n, given in numbers.items()}, fixed)
    return None if reach > _TOO_FAR else Numbers(frozenset(near), sizes, min(FARTHEST, reach), anywhere)


# These sets say what an operator does to the numbers at which a mask changes: facts of this module alone.  Numbers that are
# computed from sizes call Python's operators.
_MULTIPLY = named("mul") | {operator.mul}
_DIVIDE = named("div")
_PRODUCTS = _MULTIPLY | _DIVIDE | named("floor_divide remainder fmod index gather index_select bucketize searchsorted")
_ON_NUMBERS = {operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne}
_STEPS = (
    of(Kind.CAST)
    | _ON_NUMBERS
    | named(
        "lt le gt ge eq ne isin sign clamp clamp_min clamp_max minimum maximum bucketize searchsorted floor ceil trunc round relu"
        " remainder fmod floor_divide logical_not logical_and logical_or logical_xor"
    )
)
_FILLED = named("full new_full full_like scalar_tensor")
_CREATED = of(Kind.MAKE, Kind.FILL) - named("fill")
_STRETCHED = of(Kind.REPEAT, Kind.RESHAPE, Kind.PAD) | named("expand unfold index_put")
_MOVED = of(*LAYOUT, Kind.SHORT, Kind.WRITE, Kind.TRIANGLE) - of(Kind.PAIRS) | named(
    "tile meshgrid broadcast_tensors diagonal diag one_hot unfold"
)
_SUMS = named(
    "add sub rsub neg abs mul div cumsum diff any all isinf isneginf isfinite isnan nan_to_num where masked_fill fill"
)
_OF_FLAGS = named("bitwise_and bitwise_or bitwise_not bitwise_xor __and__ __or__ __xor__ prod amax amin")
_REGULAR = _STEPS | _CREATED | _MOVED | _SUMS
_SMOOTH = named("exp exp2 pow")
_PLACES: dict[Target, tuple[int, ...]] = rules(
    {
        "tril triu roll": (1,),
        "slice": (2, 4),
        "select": (2,),
    }
)  # operators in which part of a size is an index
_PLACED = named("tril triu slice roll")
_OF_ONE_FLAG = _MOVED | named("add sub rsub neg mul div ones_like zeros_like")
_COUNTED = named("arange")
_EXACT = {
    torch.int8: 7,
    torch.uint8: 8,
    torch.int16: 15,
    torch.float16: 11,
    torch.bfloat16: 8,
}  # integers up to 2^n


def _reach(nodes: Sequence[fx.Node], numbers: dict[fx.Node, list[float]], stored: Collection[fx.Node]) -> int:
    """A length beyond which nothing changes: numbers on one path multiply, those of two paths add, and periods multiply."""
    known: dict[fx.Node, float] = {}
    periods = set[float]()
    for node in nodes[0].graph.nodes:
        if node not in numbers:
            continue
        own = [max(abs(x), 1 / abs(x)) for x in numbers[node] if x]
        below = [known[n] for n in node.all_input_nodes if n in known]
        together = math.prod(below) if calls(node, _PRODUCTS) else sum(below) or 1
        times = max(own, default=1) if node in stored else math.prod(max(1.0, x) for x in own)
        known[node] = min(1e18, max(1, together) * times)
        if calls(node, _PRODUCTS):
            periods.update(x for x in own if x > 1)
    return math.ceil(min(1e18, sum(known[n] for n in nodes) * math.prod(sorted(periods)[:-1])))


def _fixed(every: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> dict[fx.Node, Tensor | None]:
    """What is stored, or computed, the same at all sizes, and used by something that varies."""
    same = {n for n in every if is_tensor(n) and not _varies(n)}
    return {n: _held(n) for n in same if n in nodes or any(_varies(u) for u in n.users)}


def _varies(node: fx.Node) -> bool:
    """With a size or an input."""
    return bool(inputs_behind(node)) or any(_symbols(value(n)) for n in ancestors(node, stop=is_number))


def _symbols(val: object) -> set[sympy.Symbol]:
    numbers = [val] if isinstance(val, torch.SymInt) else list(val.shape) if isinstance(val, Tensor) else []
    return symbols_of(numbers)


def _held(node: fx.Node) -> Tensor | None:
    """The value at all sizes; None if it differs between calls."""
    if node.op == "get_attr":
        return constant_of(node)
    gm = node.graph.owning_module
    assert isinstance(gm, fx.GraphModule)
    return evaluate(gm, node, {}) if is_plain(node) else None


def _is_regular(node: fx.Node, lengths: Lengths) -> bool:
    """Beyond its numbers, the node continues regularly, at every size."""
    if node.op != "call_function" or is_number(node):
        return True
    val = value(node)
    if not calls(node, _REGULAR) and not (calls(node, _OF_FLAGS) and _takes_flags(node)):
        return False
    if not all(_is_offset(x, lengths) for x in _given_numbers(node)):
        return False
    if not calls(node, _STEPS) or not isinstance(val, Tensor) or not all(is_static(s) and s == 1 for s in val.shape):
        return True
    return not any(_symbols(value(n)) for n in ancestors(node, stop=is_number))  # otherwise it compares only sizes


def _given_numbers(node: fx.Node) -> list[object]:
    """Numbers that become values or indices, not sizes."""
    if calls(node, _MOVED):
        given = [arg(node, place) for place in _PLACES.get(node.target, ())]
    elif calls(node, _COUNTED):
        given = [arg(node, 0), arg(node, 2)] if len(node.args) > 1 else []
    elif calls(node, _FILLED):
        place = 0 if is_call(node, aten.scalar_tensor.default) else 2 if is_call(node, aten.new_full.default) else 1
        given = [arg(node, place)]
    elif calls(node, _CREATED):
        given = []
    else:
        given = list(node.args)
    return [value(x) for x in given if isinstance(x, fx.Node) and is_number(x)]


def _is_offset(number: object, lengths: Lengths) -> bool:
    """A number apart from the excess of keys over queries: a length itself may change a mask at any size."""
    if not isinstance(number, torch.SymInt):
        return isinstance(number, (int, float))
    q_len, kv_len = (n.node.expr if isinstance(n, torch.SymInt) else n for n in lengths)
    more = kv_len - q_len
    return any(not sympy.expand(number.node.expr - part).free_symbols for part in (0, more, -more))


def _takes_flags(node: fx.Node) -> bool:
    return all(_is_flag(n) for n in node.all_input_nodes if is_tensor(n))


def _is_flag(node: fx.Node) -> bool:
    """It has only two values: a comparison, and copies, sums and products with numbers of one."""
    while value(node).dtype != torch.bool:
        above = [n for n in node.all_input_nodes if is_tensor(n)]
        if not above:
            return calls(node, _CREATED - _COUNTED)
        if len(above) > 1 or not calls(node, _OF_ONE_FLAG):
            return False
        node = above[0]
    return True


def _multiplies(node: fx.Node) -> bool:
    """Products of indices, such as squared distances, or sums over them."""
    of_places = [n for n in node.all_input_nodes if not is_tensor(n) or not _is_flag(n)]
    return is_call(node, aten.cumsum.default) or (calls(node, _MULTIPLY) and len(of_places) > 1)


def _factors(node: fx.Node, counts_up: bool) -> Iterator[float]:
    """The literals that multiply indices."""
    if _takes_flags(node) and not counts_up:
        return
    literals = [float(x) for x in node.args if isinstance(x, (int, float)) and x]
    if calls(node, _MULTIPLY):
        yield from literals
    elif calls(node, _DIVIDE):
        yield from (1 / x for x in literals)


def _stepped(made: Sequence[fx.Node]) -> set[fx.Node]:
    return {a for n in made if calls(n, _STEPS) for a in ancestors(n, stop=is_number)}


def _numbers(node: fx.Node, fixed: dict[fx.Node, Tensor | None], stepped: bool, counts_up: bool) -> Iterator[float]:
    """What may be a length or a distance in this node."""
    val = value(node)
    if isinstance(val, torch.SymInt):
        yield from _numbers_of(val)
    elif isinstance(val, Tensor):
        if calls(node, _CREATED):
            yield from {n for s in val.shape for n in _numbers_of(s)}
        if val.dtype in _EXACT and stepped and not _is_flag(node):
            yield 2 << _EXACT[val.dtype]
    if node in fixed:
        yield from _numbers_in(fixed[node], stepped)
    elif node.op == "call_function" and _counts(node, stepped, counts_up):
        leaves = torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
        yield from (x for x in leaves if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x))


def _whole(x: float) -> tuple[int, ...]:
    """The integers on both sides of ``x``, and those of its reciprocal."""
    if x == int(x):
        return (int(x),)
    return (int(x), int(x) + 1, *((math.ceil(1 / x),) if x < 1 else ()))


def _counts(node: fx.Node, stepped: bool, counts_up: bool) -> bool:
    """Its numbers may be lengths: it computes integers or flags, operands of comparisons, or cuts a triangle or a slice."""
    if calls(node, _PLACED):
        return True
    if any(is_tensor(n) for n in node.all_input_nodes) and _takes_flags(node) and not counts_up:
        return False
    if calls(node, _MOVED - _STRETCHED):
        return False
    val = value(node)
    return stepped or (isinstance(val, Tensor) and not (val.is_floating_point() or val.is_complex()))


def _numbers_of(size: int | torch.SymInt) -> list[int]:
    """The numbers with which a size is computed from the graph's symbols."""
    return [int(x) for x in size.node.expr.atoms() if x.is_Integer] if isinstance(size, torch.SymInt) else []


def _numbers_in(held: Tensor | None, stepped: bool) -> Iterator[float]:
    if held is None:
        return
    yield max(held.shape, default=1)
    is_whole = not (held.is_floating_point() or held.is_complex() or held.dtype == torch.bool)
    if not is_whole and (held.dtype == torch.bool or held.is_complex() or not (stepped or held.numel() == 1)):
        return
    known = held[held.isfinite() & (held != 0)].abs()
    if known.numel():
        yield from (float(known.min()), float(known.max()))
