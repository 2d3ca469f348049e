"""What the model's output loses when heads are ablated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.base.closeness import squared_distance, tensors
from attnopt.base.options import choice
from attnopt.ir.head_probe import KINDS, HeadProbe
from attnopt.ir.importance import AblationImportance
from attnopt.statistics.logits import at_place, last_places, logits_of_output


@dataclass(frozen=True)
class Ablation(AblationImportance):
    """Relative change of the model's output, |y - y_h|^2 / |y|^2; with ``behaviour`` the KL divergence of its logits; the mean
    over batches.

    ``kind``: "zero", "mean", "uniform" or "resample", see ``HeadProbe.output``.  Raises PolicyError.
    """

    name: ClassVar[str] = "ablation"
    uses_behaviour: ClassVar[bool] = True
    kind: str = "zero"

    def __post_init__(self) -> None:
        choice(self.name, "kind", self.kind, KINDS)

    def before(self, probe: HeadProbe) -> list[list[tuple[Tensor, float]]]:
        """The output of each batch, and its sum of squares."""
        told = [self._told(probe, probe.output(batch)) for batch in probe.batches]
        return [[(x, squared_distance(x, torch.zeros_like(x))) for x in each] for each in told]

    def read(self, probe: HeadProbe, before: Any, batch: int, output: Any) -> float:
        wanted: list[tuple[Tensor, float]] = before[batch]
        pairs = zip(wanted, self._told(probe, output), strict=True)
        if probe.behaviour is not None:
            return sum(_divergence(want, got) for (want, _), got in pairs)
        return sum(squared_distance(got, want) / max(squares, 1e-300) for (want, squares), got in pairs)

    def moved(self, before: Any, read: Sequence[float]) -> float:
        return sum(read) / len(read)

    def _told(self, probe: HeadProbe, output: Any) -> list[Tensor]:
        if probe.behaviour is not None:
            return [probe.behaviour(output).double().log_softmax(-1)]
        return [t for t in tensors(output) if t.is_floating_point()]


@dataclass(frozen=True)
class Ships(AblationImportance):
    """Safety head importance score (arXiv:2410.13708): KL(p || p_h) of the next-token distributions at the last token that is
    no padding, with and without the head; the mean over sequences.

    ``kind``: "uniform" as in the paper, whose queries of the head are scaled down until its weights are uniform; or "zero",
    "mean", "resample", see ``HeadProbe.output``.  The logits are the model's output, its ``logits``, or what ``behaviour``
    returns.  Raises PolicyError, CalibrationError.
    """

    name: ClassVar[str] = "ships"
    uses_behaviour: ClassVar[bool] = True
    kind: str = "uniform"

    def __post_init__(self) -> None:
        choice(self.name, "kind", self.kind, KINDS)

    def before(self, probe: HeadProbe) -> tuple[list[Tensor], list[Tensor]]:
        logits = [logits_of_output(probe, probe.output(batch)) for batch in probe.batches]
        places = last_places(probe, logits)
        return places, [_last(x, place) for x, place in zip(logits, places, strict=True)]

    def read(self, probe: HeadProbe, before: Any, batch: int, output: Any) -> tuple[float, int]:
        """The divergence, and the number of sequences whose mean it is."""
        places, want = before
        got = _last(logits_of_output(probe, output), places[batch])
        return _divergence(want[batch], got), len(got)

    def moved(self, before: Any, read: Sequence[tuple[float, int]]) -> float:
        return sum(mean * count for mean, count in read) / sum(count for _, count in read)


def _last(logits: Tensor, place: Tensor) -> Tensor:
    return at_place(logits, place).double().log_softmax(-1)


def _divergence(want: Tensor, got: Tensor) -> float:
    """KL(want || got) of log-probabilities, the mean over rows."""
    return float((want.exp() * (want - got)).sum(-1).mean())
