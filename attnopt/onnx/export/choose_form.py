"""The ONNX form of an attention, chosen by the cost of each form in ONNX Runtime on CPU.

Costs are floating-point operations, weighted by how much slower than MultiHeadAttention a form was measured to do them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from attnopt.patterns import Causal, Full, Pattern
from attnopt.patterns.bands import Band

WITH_ATTENTION = 23  # the first opset with the operator
WITH_LOOPS = 13  # the first opset whose loops carry sequences
DENSE = 1.5  # Attention, which first writes the whole mask into the scores
BLOCKS = 1.6  # Attention on one block of queries at a time, with copies of the keys and values that it sees
ROWS = 1.3  # the same if every block sees all keys: nothing is copied
ITERATION = 8e6  # one more turn of a loop
_LONG = 1024  # from here on GroupQueryAttention is the faster causal form
_SHORT = 384 * 384  # pairs up to which Attention is as fast as MultiHeadAttention
_MASKED_ROWS = 256


@dataclass(frozen=True)
class OnnxSite:
    """One attention in terms of ``AttentionSpec``, with its known lengths; -1 if dynamic."""

    name: str
    pattern: Pattern
    kv_of_head: tuple[int, ...]
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float | None
    dtype: torch.dtype
    q_len: int
    kv_len: int
    is_square: bool  # as many queries as keys, at all sizes
    typical: tuple[int, int, int]  # batch and both lengths in the example

    @property
    def heads(self) -> int:
        return len(self.kv_of_head)

    @property
    def is_static(self) -> bool:
        return self.q_len >= 0 and self.kv_len >= 0

    @property
    def is_evenly_shared(self) -> bool:
        """Query head h reads K/V head ``h // r``."""
        r = self.heads // self.kv_heads
        return r * self.kv_heads == self.heads and all(g == h // r for h, g in enumerate(self.kv_of_head))

    @property
    def pair_cost(self) -> float:
        """Floating-point operations for one query and one key, of all heads."""
        return 2.0 * self.typical[0] * self.heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Form:
    """``kind``: "MultiHeadAttention", "GroupQueryAttention", "Attention", "blocks", "gathered" or "per head"."""

    kind: str
    cost: float
    block: int = 0  # queries in one turn of the loop of "blocks" and "gathered"


def choose(site: OnnxSite, given: Collection[str], contrib: bool, opset: int = WITH_ATTENTION) -> Form:
    """The cheapest form for the operands in ``given``; "Attention" needs the pattern as a mask operand.

    In opsets without that operator, its form consists of plain operators.
    """
    has_attention = opset >= WITH_ATTENTION
    if opset < WITH_LOOPS and site.pattern != Full():
        return _dense(site)
    if site.pattern.is_per_head:
        return min([_dense(site), *_apart(site, given)], key=_cost)
    if site.pattern == Full() and not {"bias", "mask"} & set(given):
        return _all_keys(site, given, contrib, has_attention)
    if site.pattern == Causal() and site.is_square and contrib and _group_query_takes(site, given):
        return Form("GroupQueryAttention", DENSE * site.pair_cost * _pairs(site) / 2)
    sparse = sparse_form(site)
    if sparse is None:
        return _dense(site)
    if sparse.kind == "blocks" and not site.is_static and None not in hull(site.pattern.bands or ()):
        return sparse
    return min(_dense(site), sparse, key=_cost)


def sparse_form(site: OnnxSite) -> Form | None:
    """The form that computes only what the pattern keeps, regardless of cost; None if the lengths must be known first."""
    found = site.pattern.bands
    if found is not None and any(band.first is None for band in found):
        return _blocks(site, found)
    return min((_gathered(site, block) for block in (64, 128)), key=_cost) if site.is_static else None


def groups(site: OnnxSite) -> tuple[tuple[tuple[int, ...], OnnxSite], ...]:
    """The query heads that share a pattern, and the attention of only these heads."""
    found: dict[Pattern, list[int]] = {}
    for head in range(site.heads):
        found.setdefault(site.pattern.for_head(head), []).append(head)
    return tuple((tuple(heads), _only(site, heads, pattern)) for pattern, heads in found.items())


def _only(site: OnnxSite, heads: Sequence[int], pattern: Pattern) -> OnnxSite:
    used = kv_heads_of(site, heads)
    kv_of_head = tuple(used.index(site.kv_of_head[h]) for h in heads)
    return replace(site, pattern=pattern, kv_of_head=kv_of_head, kv_heads=len(used))


def kv_heads_of(site: OnnxSite, heads: Sequence[int]) -> list[int]:
    return sorted({site.kv_of_head[h] for h in heads})


def _apart(site: OnnxSite, given: Collection[str]) -> list[Form]:
    """A separate sparse form for each group of heads, if all of them have one."""
    forms = [group_form(alone, given) for _, alone in groups(site)]
    known = [form for form in forms if form is not None]
    if len(known) < len(forms):
        return []
    return [Form("per head", sum(form.cost + ITERATION for form in known))]


def group_form(site: OnnxSite, given: Collection[str]) -> Form | None:
    """The form of heads with a pattern of their own."""
    if site.pattern == Full() and not {"bias", "mask"} & set(given):
        return _all_keys(site, given, contrib=False)
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


def _pairs(site: OnnxSite) -> float:
    return float(site.typical[1] * site.typical[2])


def _dense(site: OnnxSite) -> Form:
    return Form("Attention", DENSE * site.pair_cost * _pairs(site))


def _all_keys(site: OnnxSite, given: Collection[str], contrib: bool, has_attention: bool = True) -> Form:
    """Every query sees every key: MultiHeadAttention knows one float32 and one head for each query head, no more."""
    plain = site.softcap is None and "sinks" not in given and site.kv_heads == site.heads and site.is_evenly_shared
    if contrib and plain and _is_narrow(site) and (_pairs(site) > _SHORT or not has_attention):
        return Form("MultiHeadAttention", site.pair_cost * _pairs(site))
    return Form("Attention", site.pair_cost * _pairs(site))


def _group_query_takes(site: OnnxSite, given: Collection[str]) -> bool:
    fits = site.head_dim % 8 == 0 and site.value_dim == site.head_dim and site.is_evenly_shared
    return fits and not {"bias", "mask", "sinks"} & set(given) and _is_narrow(site) and site.typical[1] >= _LONG


def _is_narrow(site: OnnxSite) -> bool:
    return site.dtype != torch.float64


def _blocks(site: OnnxSite, found: Sequence[Band]) -> Form:
    _, q_len, kv_len = site.typical
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
    layout = site.pattern.layout(site.q_len, site.kv_len, block, block)
    turns = -(-site.q_len // block)
    pairs = layout.visits * site.q_len * site.kv_len
    return Form("gathered", BLOCKS * site.pair_cost * pairs + turns * ITERATION, block)
