"""The ONNX form of an attention, chosen by the cost of each form in ONNX Runtime on CPU.

Costs are floating-point operations, weighted by how much slower than MultiHeadAttention a form was measured to do them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Causal, Full, Pattern
from attnopt.patterns.bands import Band

WITH_ATTENTION = 23  # the first opset with the operator
WITH_LOOPS = 13  # the first opset whose loops carry sequences
DENSE = 1.5  # Attention, which first writes the whole mask into the scores
BLOCKS = 1.6  # Attention on one block of queries at a time, with copies of the keys and values that it sees
ROWS = 1.3  # the same if every block sees all keys: nothing is copied
ITERATION = 8e6  # one more turn of a loop
SENDERS = 128  # keys whose weights are computed together where these divide 1 among the queries
_LONG = 1024  # from here on GroupQueryAttention is the faster causal form
_SHORT = 384 * 384  # pairs up to which Attention is as fast as MultiHeadAttention
_MASKED_ROWS = 256


@dataclass(frozen=True)
class OnnxSite:
    """One attention as it is written: ``spec``, whose heads are numbered from 0, of operands of these sizes in the example.

    ``is_static``: both lengths are always those.  ``is_square``: as many queries as keys, at all sizes.
    """

    name: str
    spec: AttentionSpec
    dtype: torch.dtype
    batch: int
    q_len: int
    kv_len: int
    is_static: bool
    is_square: bool

    @property
    def pair_cost(self) -> float:
        """Floating-point operations for one query and one key, of all heads."""
        return 2.0 * self.batch * self.spec.num_heads * (self.spec.head_dim + self.spec.value_dim)

    @property
    def pairs(self) -> float:
        return float(self.q_len * self.kv_len)

    @property
    def is_bare(self) -> bool:
        """Every query sees every key, with no bias."""
        return self.spec.pattern == Full() and not (self.spec.has_bias or self.spec.has_mask)

    def unshared(self) -> OnnxSite:
        """The same attention of keys and values that were repeated for each query head."""
        heads = tuple(range(self.spec.num_heads))
        return replace(self, spec=replace(self.spec, kv_heads=heads, kv_of_head=heads))


@dataclass(frozen=True)
class Form:
    """``kind``: "MultiHeadAttention", "GroupQueryAttention", "Attention", "blocks", "gathered", "per head" or "senders"."""

    kind: str
    cost: float
    block: int = 0  # queries in one turn of the loop of "blocks" and "gathered", keys in one of "senders"


def choose(site: OnnxSite, contrib: bool, opset: int = WITH_ATTENTION) -> Form:
    """The cheapest form; "Attention" needs the pattern as a mask operand.

    In opsets without that operator, its form consists of plain operators.
    """
    pattern = site.spec.pattern
    if site.spec.sends:
        return Form("senders", site.pair_cost * site.pairs, SENDERS)
    if opset < WITH_LOOPS and pattern != Full():
        return _dense(site)
    if pattern.is_per_head:
        return min([_dense(site), *_apart(site)], key=_cost)
    if site.is_bare:
        return _all_keys(site, contrib, opset >= WITH_ATTENTION)
    if pattern == Causal() and site.is_square and contrib and _group_query_takes(site):
        return Form("GroupQueryAttention", DENSE * site.pair_cost * site.pairs / 2)
    sparse = sparse_form(site)
    if sparse is None:
        return _dense(site)
    if sparse.kind == "blocks" and not site.is_static and None not in hull(pattern.bands or ()):
        return sparse
    return min(_dense(site), sparse, key=_cost)


def sparse_form(site: OnnxSite) -> Form | None:
    """The form that computes only what the pattern keeps, regardless of cost; None if the lengths must be known first."""
    found = site.spec.pattern.bands
    if found is not None and any(band.first is None for band in found):
        return _blocks(site, found)
    return min((_gathered(site, block) for block in (64, 128)), key=_cost) if site.is_static else None


def groups(site: OnnxSite) -> tuple[OnnxSite, ...]:
    """The attention of each set of query heads that share a pattern, with the numbers of its heads in ``site``."""
    found: dict[Pattern, list[int]] = {}
    for head in range(site.spec.num_heads):
        found.setdefault(site.spec.pattern.for_head(head), []).append(head)
    return tuple(_only(site, heads, pattern) for pattern, heads in found.items())


def _only(site: OnnxSite, heads: Sequence[int], pattern: Pattern) -> OnnxSite:
    return replace(site, spec=replace(site.spec.keeping(heads), pattern=pattern))


def _apart(site: OnnxSite) -> list[Form]:
    """A separate sparse form for each group of heads, if all of them have one."""
    forms = [group_form(alone) for alone in groups(site)]
    known = [form for form in forms if form is not None]
    if len(known) < len(forms):
        return []
    return [Form("per head", sum(form.cost + ITERATION for form in known))]


def group_form(site: OnnxSite) -> Form | None:
    """The form of heads with a pattern of their own."""
    if site.is_bare:
        return _all_keys(site, contrib=False)
    return sparse_form(site)


def hull(found: Sequence[Band]) -> tuple[int | None, int | None]:
    """The lowest and the highest ``j - i`` of the bands along the whole sequence; None if unbounded."""
    near = [band for band in found if band.first is None]
    lows, highs = [band.low for band in near], [band.high for band in near]
    return (
        None if None in lows else min(low for low in lows if low is not None),
        None if None in highs else max(high for high in highs if high is not None),
    )


def _cost(form: Form) -> float:
    return form.cost


def _dense(site: OnnxSite) -> Form:
    return Form("Attention", DENSE * site.pair_cost * site.pairs)


def _all_keys(site: OnnxSite, contrib: bool, has_attention: bool = True) -> Form:
    """Every query sees every key: MultiHeadAttention knows one float32 and one head for each query head, no more."""
    spec = site.spec
    owns_keys = spec.num_kv_heads == spec.num_heads and spec.is_evenly_shared
    plain = spec.softcap is None and not spec.has_sinks and owns_keys
    if contrib and plain and _is_narrow(site) and (site.pairs > _SHORT or not has_attention):
        return Form("MultiHeadAttention", site.pair_cost * site.pairs)
    return Form("Attention", site.pair_cost * site.pairs)


def _group_query_takes(site: OnnxSite) -> bool:
    spec = site.spec
    fits = spec.head_dim % 8 == 0 and spec.value_dim == spec.head_dim and spec.is_evenly_shared
    has_more = spec.has_bias or spec.has_mask or spec.has_sinks
    return fits and not has_more and _is_narrow(site) and site.q_len >= _LONG


def _is_narrow(site: OnnxSite) -> bool:
    return site.dtype != torch.float64


def _blocks(site: OnnxSite, found: Sequence[Band]) -> Form:
    q_len, kv_len = site.q_len, site.kv_len
    low, high = hull(found)
    if low is None and high is None:
        block = _MASKED_ROWS
        seen = float(kv_len)
    elif low is None or high is None:
        block = 128
        seen = kv_len / 2 + block / 2
    else:
        block = 32 if high - low < 128 else 64 if high - low < 512 else 128
        seen = min(kv_len, high - low + block) + max((band.first or 0 for band in found), default=0)
    weight = ROWS if low is None and high is None else BLOCKS
    turns = -(-q_len // block)
    return Form("blocks", weight * site.pair_cost * q_len * seen + turns * ITERATION, block)


@lru_cache(maxsize=256)
def _gathered(site: OnnxSite, block: int) -> Form:
    layout = site.spec.pattern.layout(site.q_len, site.kv_len, block, block)
    turns = -(-site.q_len // block)
    return Form("gathered", BLOCKS * site.pair_cost * layout.visits * site.pairs + turns * ITERATION, block)
