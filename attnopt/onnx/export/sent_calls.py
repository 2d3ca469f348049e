"""A softmax over queries as one attention again, from the two calls that ``attnopt.ir.sent_values`` makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from attnopt.backends.attention_operator import ATTENTION_WITH_LSE
from attnopt.graph.nodes import arg, calls, getitem_source, is_call, operand, opname
from attnopt.graph.ops import PERMUTES
from attnopt.graph.sdpa import call_arguments
from attnopt.ir.operands import Operands
from attnopt.patterns.algebra import FULL
from attnopt.patterns.registry import parse
from attnopt.slicing.selection import order_of


@dataclass(frozen=True)
class SentCall:
    """``made``: the node of its result."""

    made: fx.Node
    operands: Operands[fx.Node]
    kv_of_head: tuple[int, ...]
    scale: float
    softcap: float | None


def sent_call(of_queries: object) -> SentCall | None:
    """``of_queries``: the second call of an attention over all pairs, of heads that share no keys; else None."""
    if not is_call(of_queries, ATTENTION_WITH_LSE):
        return None
    given = call_arguments(of_queries)
    bias, less = _apart(given["bias"])
    of_keys = None if less is None else _negated_lse(less)
    made = _times_its_sum(of_queries)
    if of_keys is None or made is None or not _are_exchanged(given, call_arguments(of_keys), bias):
        return None
    operands: Operands[fx.Node] = Operands(given["q"], given["k"], given["v"], bias, given["mask"])
    return SentCall(made, operands, tuple(given["kv_of_head"]), given["scale"], given["softcap"])


def _are_exchanged(given: Mapping[str, Any], first: Mapping[str, Any], bias: fx.Node | None) -> bool:
    """The first call has the keys of the second as queries, its queries as keys, and is the same otherwise."""
    if parse(given["pattern"]) != FULL or parse(first["pattern"]) != FULL:
        return False
    turned = ((first["bias"], bias), (first["mask"], given["mask"]))
    same = all(first[name] == given[name] for name in ("kv_of_head", "scale", "softcap"))
    beside = ("sinks", "selected", "q_segments", "kv_segments", "pairs")
    return (
        same
        and (first["q"], first["k"]) == (given["k"], given["q"])
        and all(_is_turned(a, b) for a, b in turned)
        and all(x.get(name) is None for x in (given, first) for name in beside)
    )


def _is_turned(a: fx.Node | None, b: fx.Node | None) -> bool:
    if a is None or b is None:
        return a is b
    return calls(a, PERMUTES) and order_of(a) == [0, 1, 3, 2] and operand(a) is b


def _apart(bias: fx.Node | None) -> tuple[fx.Node | None, fx.Node | None]:
    """What was added to the scores, and the log-sum-exps that were subtracted."""
    if bias is None or opname(bias) == "neg":
        return None, bias
    if opname(bias) == "add" and isinstance(arg(bias, 1), fx.Node) and opname(operand(bias, 1)) == "neg":
        return operand(bias), operand(bias, 1)
    return None, None


def _negated_lse(node: fx.Node) -> fx.Node | None:
    """The call whose log-sum-exps [B, H, L] this is, negated and as [B, H, 1, L]."""
    row = operand(node)
    if opname(row) != "unsqueeze" or arg(row, 1) != 2:
        return None
    total = operand(row)
    if opname(total) != "add":
        return None
    return _call_of(_finite(operand(total)), operand(total, 1))


def _finite(node: fx.Node) -> fx.Node:
    """What has 0 in the place of -inf here."""
    if opname(node) != "masked_fill" or arg(node, 2) != 0.0:
        return node
    where = operand(node, 1)
    hides = opname(where) == "eq" and operand(where) is operand(node) and arg(where, 1) == -math.inf
    return operand(node) if hides else node


def _times_its_sum(call: fx.Node) -> fx.Node | None:
    """The product of what the call gives with the sum that its softmax divided by."""
    for item in call.users:
        for user in item.users if getitem_source(item) == (call, 0) else ():
            other = arg(user, 1) if arg(user, 0) is item else arg(user, 0)
            if opname(user) == "mul" and isinstance(other, fx.Node) and _is_sum(other, call):
                return user
    return None


def _is_sum(node: fx.Node, call: fx.Node) -> bool:
    """[B, H, L, 1]"""
    if opname(node) != "unsqueeze" or arg(node, 1) not in (-1, 3):
        return False
    power = operand(node)
    total = operand(power)
    return opname(power) == "exp" and opname(total) == "add" and _call_of(operand(total), arg(total, 1)) is call


def _call_of(top: fx.Node, log_sum: object) -> fx.Node | None:
    """The call that both are the log-sum-exp of."""
    if not isinstance(log_sum, fx.Node):
        return None
    first, second = getitem_source(top), getitem_source(log_sum)
    if first is None or second is None or first[0] is not second[0] or (first[1], second[1]) != (1, 2):
        return None
    return first[0] if is_call(first[0], ATTENTION_WITH_LSE) else None
