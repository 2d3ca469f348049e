"""An attention computed in disjoint parts of its pairs, merged by their log-sum-exps: no map of weights exists.

The merge is that of online softmax (Milakov and Gimelshein, arXiv:1805.02867) over whole parts, as in ring attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.attend import Attend, AttendWithLse
from attnopt.ir.operands import SegmentTensors
from attnopt.ir.spec import AttentionSpec


def merged_by_lse(spec: AttentionSpec, core_of: Callable[[AttentionSpec], AttendWithLse]) -> Attend:
    """``spec`` with its ``weight_gains``; ``core_of`` computes a spec without them; if a call brings the ids of their
    segments, what it gives also takes ``segments=``."""
    gains = spec.weight_gains
    assert gains is not None
    bare = replace(spec, weight_gains=None, has_sinks=False)
    cores = [core_of(bare.restricted(piece)) for piece in gains.pieces] if gains.segments is None else [core_of(bare)]

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        segments: SegmentTensors | None = None,
    ) -> Tensor:
        others: dict[str, Any] = {"bias": bias, "mask": mask, "sinks": None}
        if segments is None:
            made = [core(q, k, v, **others) for core in cores]
        else:
            of_segments: Any = cores[0]
            made = [of_segments(q, k, v, **others, segments=part) for part in segments.parts]
        tops, logs = [top for _, top, _ in made], [log_sum for _, _, log_sum in made]
        sink = None if sinks is None else sinks.to(logs[0].dtype).squeeze(-1).expand_as(logs[0])
        masses = shares(tops, logs, sink)
        rows = gains.of_rows(masses)
        if gains.normalise == "logits":
            weights = shares(tops, [log + g.log() for log, g in zip(logs, rows.gains, strict=True)], sink)
        else:
            weights = [mass * g for mass, g in zip(masses, rows.gains, strict=True)]
        if rows.moved is not None:
            weights[-2] = weights[-2] + rows.moved
        parts = [w.unsqueeze(-1) * o for w, (o, _, _) in zip(weights, made, strict=True)]
        return reduce(torch.add, parts).to(v.dtype)

    return attend


def shares(tops: list[Tensor], logs: list[Tensor], sink: Tensor | None) -> list[Tensor]:
    """The weight that each part has in a softmax over all of them and the sink; zeros in a row that sees nothing."""
    top = reduce(torch.maximum, tops if sink is None else [*tops, sink.detach()])
    return _weighed(tops, logs, sink, top)[0]


def joined(tops: list[Tensor], logs: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """``shares`` without a sink, and the two parts of the log-sum-exp over all keys: the largest score, and the rest."""
    top = reduce(torch.maximum, tops)
    weights, highest, total = _weighed(tops, logs, None, top)
    return weights, top, highest + total.log()


def finite(x: Tensor) -> Tensor:
    """0 in the place of -inf: to subtract from what is -inf, too."""
    return x.masked_fill(x == -torch.inf, 0.0)


def _weighed(
    tops: list[Tensor], logs: list[Tensor], sink: Tensor | None, top: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The shares, and the sum of exponentials over all, as its exponent beside ``top`` and a factor."""
    base = finite(top)
    relative = [(own - base) + log for own, log in zip(tops, logs, strict=True)]  # what is small is added last
    relative += [] if sink is None else [sink - base]
    highest = finite(reduce(torch.maximum, [r.detach() for r in relative]))
    exponentials = [torch.exp(r - highest) for r in relative]
    total = reduce(torch.add, exponentials)
    total = total.masked_fill(total == 0.0, 1.0)
    return [e / total for e in exponentials[: len(logs)]], highest, total
