"""Attention in which each key divides its value among the queries, by way of two log-sum-exps: no map of weights exists.

A softmax over queries is exp(s - lse), with the log-sum-exp of each key over the queries that see it: that of an attention in
which queries and keys are exchanged.  The sum of exp(s - lse) v over keys is an attention with a bias of -lse for each key, times
the sum that its softmax divides by.  Flash attention computes the gradient of the values alike (arXiv:2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnopt.ir.attend import Attend, AttendWithLse
from attnopt.ir.lse_merge import finite
from attnopt.ir.semantics import heads_of
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Window
from attnopt.patterns.algebra import FULL, Pattern
from attnopt.patterns.bands import Band


def sent(spec: AttentionSpec, core_of: Callable[[AttentionSpec], AttendWithLse]) -> Attend:
    """``spec``, which sends, of a pattern that ``exchanged`` knows; ``core_of`` computes attentions that do not."""
    pattern, places = exchanged(spec.pattern), tuple(range(spec.num_heads))
    assert pattern is not None
    of_keys = core_of(replace(spec, sends=False, pattern=pattern, kv_heads=spec.heads, kv_of_head=places))
    of_queries = core_of(replace(spec, sends=False, has_bias=True))

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        turned = [None if x is None else x.mT for x in (bias, mask)]
        _, top, log_sum = of_keys(heads_of(spec, k), q, q[..., :1], bias=turned[0], mask=turned[1], sinks=None)
        less = -(finite(top) + log_sum).unsqueeze(2)  # [B, H, 1, S]
        o, top, log_sum = of_queries(q, k, v, bias=less if bias is None else bias + less, mask=mask, sinks=None)
        received = torch.exp(top + log_sum).unsqueeze(-1)
        return (o * received).to(v.dtype)

    return attend


def exchanged(pattern: Pattern) -> Pattern | None:
    """The pattern from the side of the keys: which queries each of them is seen by; None if it is neither all pairs nor a
    window."""
    match pattern.bands:
        case (Band(low=None, high=None, step=1, first=None),):
            return FULL
        case (Band(low=int(low), high=int(high), step=1, first=None),) if low <= 0 <= high:
            return Window(high, -low)
    return None
