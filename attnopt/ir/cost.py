"""The cost of one attention, computed from its spec and the sizes of its projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attnopt.ir.call_tensor import CallTensor
from attnopt.ir.pooling import parts_of
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Causal
from attnopt.patterns.algebra import FULL


@dataclass(frozen=True)
class Cost:
    """Per call at the sizes of the example: ``flops`` of the two products and the projections, ``parameters`` of the
    projections, and cached K and V bytes per token.
    """

    flops: int
    parameters: int
    kv_bytes_per_token: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.parameters + other.parameters,
            self.kv_bytes_per_token + other.kv_bytes_per_token,
        )


def cost_of(
    site: Site,
    spec: AttentionSpec,
    before: AttentionSpec,
    element_sizes: tuple[int, int],
    rows: float = 1.0,
    pools_early: bool = False,
) -> Cost:
    """FLOPs of the two products over the visible pairs, of the products of its map and edits and of the projections, for one
    sequence of the length of the example; parameters of the projections; cached key and value bytes per token.

    ``element_sizes``: bytes per element of a key and of a value.
    ``rows``: the fraction of (query, head) pairs that are computed.  ``pools_early``: tokens are pooled before they are projected
    to keys and values.
    """
    parts = parts_of(spec)
    products = rows * sum(_products(part.spec, site.q_len, part.kv_len(site.kv_len)) for part in parts)
    if spec.rows is not None:
        products += 2 * spec.head_dim * len(spec.rows.heads) * spec.rows.scores.voters(site.q_len) * site.kv_len
    more = spec.extension
    if more is not None:
        products += rows * 2 * len(more.heads) * site.q_len * more.tokens * (spec.head_dim + spec.value_dim)
    parameters = _projection_parameters(site, site.parameters, spec, before)
    of_key, of_value = element_sizes
    products = 0.0 if spec.ignores_weights else products
    of_key = 0 if "k" in spec.unused else of_key
    parameters = {role: n for role, n in parameters.items() if role not in spec.unused}
    products += 2 * (spec.has_score_map + spec.has_weight_map) * spec.num_heads**2 * site.q_len * site.kv_len
    pairs = spec.has_map * spec.num_heads * site.q_len * site.kv_len
    products += 2 * spec.value_dim * (pairs + sum(edit.pairs(site.q_len, site.kv_len) for edit in spec.after))
    projected = float(site.kv_len)
    if pools_early:
        projected = sum(len(part.kv_places) * part.kv_len(site.kv_len) for part in parts) / spec.num_kv_heads
    if more is not None and isinstance(more.reference, CallTensor):
        projected += more.tokens
    tokens = {"q": site.q_len, "k": projected, "v": projected, "out": site.q_len}
    if spec.between_channels:
        tokens = {"q": spec.head_dim, "k": spec.head_dim, "v": spec.value_dim, "out": spec.value_dim}
    flops = products + sum(2 * n * tokens[role] for role, n in parameters.items())
    cached = spec.num_kv_heads * (spec.head_dim * of_key + spec.value_dim * of_value)
    is_other = spec.linear is not None or spec.sends
    if spec.between_channels or is_other:  # a further token changes all weights, or one state has all keys
        cached = 0
    if spec.is_constant:  # queries, keys and values are unused
        return Cost(2 * parameters.get("out", 0) * site.q_len, parameters.get("out", 0), 0)
    return Cost(int(flops), sum(parameters.values()), cached)


def _products(spec: AttentionSpec, q_len: int, kv_len: int) -> float:
    pairs = spec.pattern.density(q_len, kv_len, num_heads=spec.num_heads) * q_len * kv_len
    by_pairs = 2 * spec.num_heads * pairs * (spec.head_dim + spec.value_dim)
    if spec.linear is None or spec.has_mask or spec.pattern not in (FULL, Causal()):
        return by_pairs
    return min(by_pairs, 2 * spec.num_heads * (q_len + kv_len) * spec.head_dim * spec.value_dim)  # of a state


def _projection_parameters(
    site: Site, parameters: Mapping[str, Tensor], spec: AttentionSpec, before: AttentionSpec
) -> dict[str, int]:
    """For each projection with known rows, the number of parameters in the remaining rows."""
    left = {
        "q": (spec.num_heads, before.num_heads),
        "k": (spec.num_kv_heads, before.num_kv_heads),
        "v": (spec.num_kv_heads, before.num_kv_heads),
        "out": (spec.num_heads, before.num_heads),
    }
    counts: dict[str, int] = {}
    for role, (now, was) in left.items():
        p = site.projections.get(role)
        if p is None or p.rows is None or p.weight is None:
            continue
        weight = parameters[p.weight]
        rows = sum(len(r) for r in p.rows)
        axis = 1 if p.transposed != (role == "out") else 0
        counts[role] = weight.numel() // weight.shape[axis] * rows * now // was
    return counts
