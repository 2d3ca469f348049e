"""The attention calls of an optimized graph as sequence-parallel attentions: their operands, and what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.backends.attention_operator import ATTENTION_WITH_LSE
from attnopt.base.sizes import hint
from attnopt.distributed.token_rules import Needed, Tokens
from attnopt.distributed.traffic import Sizes
from attnopt.errors import DistributedError
from attnopt.graph.nodes import is_call, module_path, value
from attnopt.graph.sdpa import SDPA, call_arguments
from attnopt.lower.attention_calls import lowered_at
from attnopt.patterns.algebra import FULL, Pattern
from attnopt.patterns.registry import is_readable, parse
from attnopt.patterns.sequence import Causal

ROLES = ("q", "k", "v", "bias", "mask", "sinks", "q_segments", "kv_segments", "pairs")


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """``operands``: in the order of ``ROLES``."""

    node: fx.Node
    site: str
    operands: tuple[fx.Node | None, ...]
    pattern: Pattern
    kv_of_head: tuple[int, ...]
    scale: float
    softcap: float | None = None

    @property
    def heads(self) -> int:
        return len(self.kv_of_head)

    @property
    def with_lse(self) -> bool:
        return is_call(self.node, ATTENTION_WITH_LSE)

    def sizes(self, values: Mapping[fx.Node, Any]) -> Sizes:
        return Sizes.of(*(values[n] for n in self.operands[:3] if n is not None))

    def has_rows(self, values: Mapping[fx.Node, Any]) -> bool:
        """Whether its bias or mask has one row for each query."""
        return any(values[n].shape[2] != 1 for n in self.operands[3:5] if n is not None)

    def needed(self, values: Mapping[fx.Node, Any], length: int, by_heads: bool) -> Needed:
        """Which tokens of each operand a rank needs before any travel: its own, and all of what is by key.  ``by_heads``: its own
        of queries, keys and values alone."""
        axes = {"q": 2, "k": 2, "v": 2}
        axes |= {} if by_heads else {"bias": 2, "mask": 2, "sinks": 2, "q_segments": 1}
        found: Needed = {}
        for role, n in zip(ROLES, self.operands, strict=True):
            if n is None:
                continue
            axis = axes.get(role)
            by_token = axis is not None and values[n].shape[axis] == length
            need = Tokens(axis) if axis is not None and by_token else None
            if n in found and found[n] != need:
                raise self.error("one tensor is two operands", 'optimize with backend="blocked"')
            found[n] = need
        return found

    def error(self, why: str, hint: str) -> DistributedError:
        return DistributedError(why, site=self.site, hint=hint)


def attention_call(node: fx.Node) -> AttentionCall:
    """Raises DistributedError for an attention whose ranks cannot share it."""
    noted = lowered_at(node)
    site = noted.site if noted is not None else module_path(node) or node.name
    given = call_arguments(node)
    call = _of_sdpa(node, site, given) if is_call(node, SDPA) else _of_operator(node, site, given)
    if not is_readable(call.pattern):
        raise call.error(
            f"its pattern {call.pattern} cannot be read from its text", "register the class of the pattern"
        )
    return call


def _of_operator(node: fx.Node, site: str, given: Mapping[str, Any]) -> AttentionCall:
    operands = tuple(given[role] for role in ROLES)
    pattern, kv_of_head = parse(given["pattern"]), tuple(given["kv_of_head"])
    call = AttentionCall(node, site, operands, pattern, kv_of_head, given["scale"], given["softcap"])
    for name, what in (("selected", "blocks are selected"), ("wanted", "rows are routed to heads")):
        if given.get(name) is not None:
            raise call.error(f"its {what} at run time, from queries and keys of all tokens", "leave out the pass")
    return call


def _of_sdpa(node: fx.Node, site: str, given: Mapping[str, Any]) -> AttentionCall:
    """A pattern became a mask there; where nothing else is in the mask, the pattern alone is read."""
    noted = lowered_at(node)
    q, k, mask = given["query"], given["key"], given["attn_mask"]
    heads, kv_heads = (hint(value(x).shape[1]) for x in (q, k))
    pattern: Pattern = Causal() if given["is_causal"] else FULL
    if noted is not None:
        pattern = noted.spec.pattern
        has_own = noted.spec.has_mask or noted.spec.has_bias or noted.spec.segments is not None
        mask = mask if has_own or noted.spec.zero_keys is not None else None
    is_bool = mask is not None and value(mask).dtype == torch.bool
    operands = (q, k, given["value"], None if is_bool else mask, mask if is_bool else None, *[None] * 4)
    scale = given["scale"]
    scale = float(hint(value(q).shape[-1])) ** -0.5 if scale is None else scale
    call = AttentionCall(node, site, operands, pattern, tuple(h * kv_heads // heads for h in range(heads)), scale)
    if isinstance(scale, fx.Node):
        raise call.error("its scale is computed at run time", "give the model a constant scale")
    if given["dropout_p"]:
        raise call.error("it drops weights at random, on each rank others", "call model.eval() before optimizing")
    if any(value(n) is not None and value(n).dim() != 4 for n in operands if n is not None):
        raise call.error("its operands have no four axes", 'optimize with backend="blocked"')
    return call
