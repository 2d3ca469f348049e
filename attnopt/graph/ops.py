"""The table of operators: one row for each that attnopt knows by name, with every fact that more than one module uses.

Sets of operators are derived from it: ``of`` takes kinds, ``named`` takes names, and both give the overloads that a node may
call.  Rules of one package (how a selection moves past an operator, where an entry comes from) stay there, in a table made by
``rules``.  ``tests/unit/graph/test_ops.py`` checks that each has a rule, or a reason for none, for every layout operator.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

import torch
from torch._ops import OpOverload
from torch.fx.node import Target

aten = torch.ops.aten
Rule = TypeVar("Rule")
Operators = frozenset[Target]  # what a node may call: overloads, and Python's ``getitem``


class Kind(Enum):
    """What an operator does with the elements of its first operand."""

    # layout: every element of the result is one of the operand
    RESHAPE = auto()  # all of them in the same order; the second argument has the sizes
    ONES = auto()  # the same, with axes of length 1 added or removed
    PERMUTE = auto()  # all of them, with the axes in another order
    COPY = auto()  # the same tensor
    CAST = auto()  # the same with another dtype or device: rounded
    EXPAND = auto()  # axes of length 1 repeated
    REPEAT = auto()  # elements repeated along an axis
    SLICE = auto()  # those of some places of one axis
    SPLIT = auto()  # several such parts
    PIECE = auto()  # one of several tensors
    JOIN = auto()  # several tensors along one axis
    MOVE = auto()  # all of them at other places of the same axes
    PAD = auto()  # all of them, and a number around them
    LOOKUP = auto()  # those at the indices in another tensor
    PAIRS = auto()  # pairs of numbers as complex numbers, or back
    SHORT = auto()  # a short form that ``tidy`` writes as a reshape, an expand or a cast: nothing later sees one
    # written or made
    WRITE = auto()  # the elements with others over some of them
    TRIANGLE = auto()  # the elements with zeros on one side of a diagonal
    FILL = auto()  # one number everywhere, in the form of the operand, whose values do not matter
    MAKE = auto()  # from sizes alone
    # computed
    POINTWISE = auto()  # each element from those at the same place
    DROPOUT = auto()
    REDUCE = auto()  # over some axes
    PRODUCT = auto()
    CONVOLUTION = auto()
    EMBEDDING = auto()
    NORM = auto()
    SOFTMAX = auto()
    LOG_SOFTMAX = auto()
    ATTENTION = auto()


LAYOUT = (
    Kind.RESHAPE, Kind.ONES, Kind.PERMUTE, Kind.COPY, Kind.CAST, Kind.EXPAND, Kind.REPEAT, Kind.SLICE, Kind.SPLIT, Kind.PIECE,
    Kind.JOIN, Kind.MOVE, Kind.PAD, Kind.LOOKUP, Kind.PAIRS,
)  # fmt: skip


@dataclass(frozen=True)
class Op:
    """``torch.ops.aten.<name>``: all overloads that compute tensors, or ``only`` these, if others do something else.

    ``zero``: zeros stay zeros, whatever the other arguments.  ``linear``: a factor may move past it.
    """

    name: str
    kind: Kind
    zero: bool = False
    linear: bool = False
    only: tuple[str, ...] = ()


def _zero(name: str) -> Op:
    return Op(name, Kind.POINTWISE, zero=True)


# Operators of torch's tag ``pointwise`` need a row only for other facts.
OPS: tuple[Op, ...] = (
    Op("view", Kind.RESHAPE, only=("default",)),  # view.dtype reads the same bytes as other numbers
    Op("reshape", Kind.RESHAPE),
    Op("_unsafe_view", Kind.RESHAPE),
    Op("squeeze", Kind.ONES),
    Op("unsqueeze", Kind.ONES),
    Op("permute", Kind.PERMUTE),
    Op("transpose", Kind.PERMUTE),
    Op("t", Kind.PERMUTE),
    Op("mT", Kind.PERMUTE),
    Op("clone", Kind.COPY, zero=True, linear=True),
    Op("contiguous", Kind.COPY, zero=True, linear=True),
    Op("detach", Kind.COPY, zero=True, linear=True),
    Op("alias", Kind.COPY, zero=True, linear=True),
    Op("lift_fresh_copy", Kind.COPY, zero=True, linear=True),
    Op("_to_copy", Kind.CAST, zero=True, linear=True),
    Op("to", Kind.CAST, zero=True, linear=True),
    Op("expand", Kind.EXPAND),
    Op("repeat", Kind.REPEAT),
    Op("repeat_interleave", Kind.REPEAT, only=("self_int", "self_Tensor")),
    Op("select", Kind.SLICE),
    Op("slice", Kind.SLICE),
    Op("split", Kind.SPLIT),
    Op("split_with_sizes", Kind.SPLIT),
    Op("chunk", Kind.SPLIT),
    Op("unbind", Kind.SPLIT),
    Op("tensor_split", Kind.SPLIT),
    Op("getitem", Kind.PIECE),
    Op("cat", Kind.JOIN),
    Op("stack", Kind.JOIN),
    Op("flip", Kind.MOVE),
    Op("roll", Kind.MOVE),
    Op("constant_pad_nd", Kind.PAD),
    Op("pad", Kind.PAD),
    Op("index", Kind.LOOKUP),
    Op("index_select", Kind.LOOKUP),
    Op("gather", Kind.LOOKUP),
    Op("view_as_complex", Kind.PAIRS),
    Op("view_as_real", Kind.PAIRS),
    Op("flatten", Kind.SHORT),
    Op("unflatten", Kind.SHORT),
    Op("expand_as", Kind.SHORT),
    Op("type_as", Kind.SHORT),
    Op("slice_scatter", Kind.WRITE),
    Op("select_scatter", Kind.WRITE),
    Op("index_put", Kind.WRITE),
    Op("copy", Kind.WRITE),
    Op("tril", Kind.TRIANGLE),
    Op("triu", Kind.TRIANGLE),
    Op("ones_like", Kind.FILL),
    Op("zeros_like", Kind.FILL),
    Op("full_like", Kind.FILL),
    Op("new_ones", Kind.FILL),
    Op("new_zeros", Kind.FILL),
    Op("new_full", Kind.FILL),
    Op("fill", Kind.FILL),
    Op("ones", Kind.MAKE),
    Op("zeros", Kind.MAKE),
    Op("full", Kind.MAKE),
    Op("scalar_tensor", Kind.MAKE),
    Op("arange", Kind.MAKE),
    Op("eye", Kind.MAKE),
    Op("empty", Kind.MAKE),
    Op("new_empty", Kind.MAKE),
    Op("empty_like", Kind.MAKE),
    Op("where", Kind.POINTWISE, only=("self", "ScalarOther", "ScalarSelf", "Scalar")),  # where.default finds places
    Op("masked_fill", Kind.POINTWISE),
    Op("rsub", Kind.POINTWISE),
    Op("floor_divide", Kind.POINTWISE),
    Op("__and__", Kind.POINTWISE),
    Op("__or__", Kind.POINTWISE),
    Op("__xor__", Kind.POINTWISE),
    Op("neg", Kind.POINTWISE, zero=True, linear=True),
    Op("conj", Kind.POINTWISE, zero=True),
    Op("_conj", Kind.POINTWISE, zero=True),
    Op("resolve_conj", Kind.POINTWISE, zero=True, linear=True),
    Op("resolve_neg", Kind.POINTWISE, zero=True, linear=True),
    *map(
        _zero, ("abs", "sign", "square", "sqrt", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu")
    ),
    *map(
        _zero,
        ("mish", "hardswish", "tanh", "erf", "expm1", "log1p", "sin", "tan", "sinh", "asinh", "atan", "nan_to_num"),
    ),
    *map(_zero, ("trunc", "floor", "ceil", "round")),
    Op("dropout", Kind.DROPOUT, zero=True, linear=True),
    Op("feature_dropout", Kind.DROPOUT, zero=True, linear=True),
    Op("mean", Kind.REDUCE),
    Op("sum", Kind.REDUCE),
    Op("amax", Kind.REDUCE),
    Op("amin", Kind.REDUCE),
    Op("linalg_vector_norm", Kind.REDUCE),
    Op("norm", Kind.REDUCE),
    Op("var", Kind.REDUCE),
    Op("std", Kind.REDUCE),
    Op("any", Kind.REDUCE),
    Op("all", Kind.REDUCE),
    Op("linear", Kind.PRODUCT),
    Op("addmm", Kind.PRODUCT),
    Op("mm", Kind.PRODUCT),
    Op("bmm", Kind.PRODUCT),
    Op("baddbmm", Kind.PRODUCT),
    Op("matmul", Kind.PRODUCT),
    Op("einsum", Kind.PRODUCT),
    Op("tensordot", Kind.PRODUCT),
    Op("inner", Kind.PRODUCT),
    Op("convolution", Kind.CONVOLUTION),
    Op("conv1d", Kind.CONVOLUTION),
    Op("conv2d", Kind.CONVOLUTION),
    Op("conv3d", Kind.CONVOLUTION),
    Op("embedding", Kind.EMBEDDING),
    Op("layer_norm", Kind.NORM),
    Op("native_layer_norm", Kind.NORM),
    Op("rms_norm", Kind.NORM),
    Op("group_norm", Kind.NORM),
    Op("batch_norm", Kind.NORM),
    Op("softmax", Kind.SOFTMAX),
    Op("_softmax", Kind.SOFTMAX),
    Op("_safe_softmax", Kind.SOFTMAX),
    Op("special_softmax", Kind.SOFTMAX),
    Op("log_softmax", Kind.LOG_SOFTMAX),
    Op("_log_softmax", Kind.LOG_SOFTMAX),
    Op("special_log_softmax", Kind.LOG_SOFTMAX),
    Op("scaled_dot_product_attention", Kind.ATTENTION),
)

# Other names of the same operators, overload by overload; ``tidy`` replaces them.
ALIASES: dict[str, str] = {
    "absolute": "abs",
    "arctan": "atan",
    "arctan2": "atan2",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "linalg_matmul": "matmul",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "special_erf": "erf",
    "special_exp2": "exp2",
    "special_expit": "sigmoid",
    "special_expm1": "expm1",
    "special_log1p": "log1p",
    "special_logsumexp": "logsumexp",
    "subtract": "sub",
    "true_divide": "div",
}


def _overloads(name: str, only: tuple[str, ...] = ()) -> Operators:
    if name == "getitem":
        return frozenset((operator.getitem,))
    packet = getattr(aten, name)
    found = ((o, getattr(packet, o)) for o in only or packet.overloads())
    return frozenset(op for _, op in found if _makes_tensors(op))


def _makes_tensors(op: OpOverload) -> bool:
    """It is no version for numbers alone, nor one that writes into an operand."""
    return not op._schema.is_mutable and any("Tensor" in str(r.type) for r in op._schema.returns)


_ROWS = {op.name: (op, _overloads(op.name, op.only)) for op in OPS}
_BY_TARGET: dict[Target, Op] = {target: op for op, targets in _ROWS.values() for target in targets}


def row(target: Target) -> Op | None:
    """The row of what a node calls; None if it has none."""
    return _BY_TARGET.get(target)


def of(*kinds: Kind) -> Operators:
    """All operators of these kinds."""
    return frozenset(target for target, op in _BY_TARGET.items() if op.kind in kinds)


def named(names: str) -> Operators:
    """The operators of these names, divided by spaces; "max.dim" is one overload."""
    return frozenset(target for name in names.split() for target in _named(name))


def _named(name: str) -> Operators:
    packet, _, overload = name.partition(".")
    if overload:
        return _overloads(packet, (overload,))
    return _ROWS[name][1] if name in _ROWS else _overloads(name)


def rules(table: Mapping[Kind | str | Operators, Rule]) -> dict[Target, Rule]:
    """The rule of each operator of these kinds, names and sets, which have none in common."""
    found = [(target, rule) for key, rule in table.items() for target in _meant(key)]
    made = dict(found)
    assert len(made) == len(found), "an operator with two rules"
    return made


def _meant(key: Kind | str | Operators) -> Operators:
    return of(key) if isinstance(key, Kind) else named(key) if isinstance(key, str) else key


def aliases() -> dict[OpOverload, OpOverload]:
    """For each overload with another name, the overload that it means."""
    pairs = ((getattr(aten, alias), getattr(aten, name)) for alias, name in ALIASES.items())
    return {
        getattr(alias, o): getattr(packet, o)
        for alias, packet in pairs
        for o in alias.overloads()
        if _makes_tensors(getattr(alias, o)) and o in packet.overloads()
    }


ZERO: Operators = frozenset(t for t, op in _BY_TARGET.items() if op.zero)  # zeros stay zeros
LINEAR: Operators = frozenset(t for t, op in _BY_TARGET.items() if op.linear)  # a factor may move past them
MUL, DIV = named("mul"), named("div.Tensor div.Scalar")  # division without the modes that round
FACTORS = MUL | DIV
ADD, SUB = named("add"), named("sub")
COPIES = of(Kind.COPY)
PERMUTES = of(Kind.PERMUTE)
IN_ORDER = COPIES | of(Kind.RESHAPE, Kind.ONES)  # the same elements, each once, in the same order
REARRANGED = IN_ORDER | PERMUTES  # the same elements, each once
_EACH = of(Kind.POINTWISE, Kind.COPY, Kind.CAST, Kind.DROPOUT)


def is_random(target: object) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def is_pointwise(target: object) -> bool:
    """Each element of the result comes from the elements at the same place of the operands, broadcast."""
    if target in _EACH:
        return True
    return torch.Tag.pointwise in getattr(target, "tags", ()) and not is_random(target)
