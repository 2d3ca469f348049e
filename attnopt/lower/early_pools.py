"""Keys and values that are pooled before they are projected: the projection then computes one token for each pool."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from attnopt.graph.emitter import Emitter
from attnopt.ir.call_gains import ScaledByCall
from attnopt.ir.head_additions import Shifted
from attnopt.ir.head_edits import Replaced, Scaled
from attnopt.ir.head_routing import Routed
from attnopt.ir.interfaces import Backend
from attnopt.ir.operands import Operands
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.ir.pooling import parts_of
from attnopt.ir.spec import AttentionSpec
from attnopt.slicing.pool_tokens import passes_projection, pool_tokens

_TOKENS = 2  # their axis in keys and values
_LEAVE_VALUES = (Scaled, ScaledByCall, Shifted, Replaced, Routed)  # edits that read no values


def pools_early(spec: AttentionSpec, backend: Backend, operands: Operands[fx.Node]) -> bool:
    """Nothing but affine maps of single tokens is between keys, values and what they are projected from, and nothing else reads
    the keys and values of single tokens, as transplants and some edits do."""
    if (
        spec.pooling is None
        or backend.pools
        or spec.has_map
        or spec.before
        or not all(isinstance(e, _LEAVE_VALUES) for e in spec.after)
    ):
        return False
    parts = parts_of(spec)
    if any(part.is_unreduced for part in parts) or not any(part.is_reduced for part in parts):
        return False
    return all(passes_projection(n, _TOKENS) for n in (operands.k, operands.v))


def early_pools(
    emit: Emitter, spec: AttentionSpec, of_heads: Callable[[str, tuple[int, ...]], fx.Node]
) -> list[tuple[fx.Node, fx.Node]]:
    """The keys and values that each part computes with.  ``of_heads``: those of K/V heads, by their role and numbers."""
    made = []
    for part in parts_of(spec):
        k, v = (of_heads(role, part.whole.kv_heads) for role in ("k", "v"))
        if part.is_reduced and part.pooling is not None:
            k, v = _pooled(emit, part.pooling, k), _pooled(emit, part.pooling, v)
        made.append((k, v))
    return made


def _pooled(emit: Emitter, pooling: PooledKeys, x_BGSD: fx.Node) -> fx.Node:
    if passes_projection(x_BGSD, _TOKENS):
        return pool_tokens(emit, x_BGSD, _TOKENS, pooling.mean)
    return emit.inline(lambda x: pooling.mean(x), x_BGSD)  # a bound method has one argument too many to be traced
