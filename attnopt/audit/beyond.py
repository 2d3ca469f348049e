"""Lengths beyond the example: where two patterns part, and what that does to an attention."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from attnopt.audit.compare import kinds_of
from attnopt.audit.scores import relative
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns.algebra import Pattern
from attnopt.report.audit import Difference, Effect

LARGEST = 8400  # tokens for which a mask is made as a whole
SAMPLE = 256  # queries of a longer one: the last, and some before


def reach(spec: AttentionSpec) -> int:
    """A length at which every number in the pattern matters."""
    numbers = [int(n) for n in re.findall(r"\d+", str(spec.visible_pattern))]
    return max(numbers, default=0) + 3


def pattern_differences(model: Site, file: Site, tokens: int) -> list[Difference]:
    """Of two known patterns at this length; shown on one head alone, with random queries, keys and values."""
    rows = _rows(tokens)
    a, b = (_visible(s.spec.visible_pattern, s.spec.num_heads, rows, tokens) for s in (model, file))
    apart = a ^ b
    a, b = a.expand(apart.shape), b.expand(apart.shape)
    if not bool(apart.any()):
        return []
    head = int(apart.flatten(1).any(1).nonzero()[0])
    effect = Effect(tokens, _effect(a[head], b[head], model.spec), "alone")
    texts = str(model.spec.visible_pattern), str(file.spec.visible_pattern)
    return [Difference(kind, *texts, effect) for kind in kinds_of(apart, rows, model.spec.is_causal)]


def fits(spec: AttentionSpec, tokens: int) -> bool:
    """The pattern has a meaning at this length."""
    lengths = spec.visible_pattern.lengths
    return lengths is None or tokens in lengths


def _rows(tokens: int) -> Tensor:
    if tokens <= LARGEST:
        return torch.arange(tokens)
    spread = torch.arange(0, tokens - SAMPLE // 2, max(1, tokens // (SAMPLE // 2)))
    return torch.cat([spread, torch.arange(tokens - SAMPLE // 2, tokens)])


def _visible(pattern: Pattern, heads: int, rows: Tensor, tokens: int) -> Tensor:
    """Bool [H or 1, rows, S]"""
    if tokens <= LARGEST:
        return pattern.mask(tokens, tokens, num_heads=heads)
    found = pattern.at_length(tokens).visible(rows[:, None], torch.arange(tokens)[None, :])
    return found.expand(len(rows), tokens).unsqueeze(0) if found.dim() == 2 else found


def _effect(model: Tensor, file: Tensor, spec: AttentionSpec) -> float:
    """On the queries that see other keys, at most ``SAMPLE`` of them."""
    where = (model ^ file).any(-1).nonzero().flatten()[-SAMPLE:]
    random = torch.Generator().manual_seed(0)
    q = torch.randn(len(where), spec.head_dim, generator=random)
    k = torch.randn(model.shape[-1], spec.head_dim, generator=random)
    v = torch.randn(model.shape[-1], spec.value_dim, generator=random)
    s = q @ k.T * spec.head_dim**-0.5
    outputs = [torch.softmax(s.masked_fill(~seen[where], -torch.inf), -1).nan_to_num(0.0) @ v for seen in (model, file)]
    return relative(outputs[1], outputs[0])
