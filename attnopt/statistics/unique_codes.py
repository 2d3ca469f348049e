"""Heads whose outputs take other codes on examples of a task than without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.base.options import whole
from attnopt.errors import CalibrationError
from attnopt.ir.head_probe import HeadProbe
from attnopt.ir.importance import ModelImportance
from attnopt.statistics.calibrated import last_outputs
from attnopt.statistics.k_means import coded


@dataclass(frozen=True, eq=False)
class UniqueCodes(ModelImportance):
    """The share of the examples whose code is unique to the task (after arXiv:2405.12522, from 5 to 10 examples)::

        c(z_h(x)) = the nearest of ``codes`` centroids of the outputs of the head at the last token, over all examples
        #{x positive : c(z_h(x)) is the code of no negative example} / #positive

    The calibration data are the positive examples, ``negatives`` are batches in the same form.  The paper learns its codes
    with a sparse autoencoder; here they are those of k-means from the most distant examples.  Raises PolicyError,
    CalibrationError.
    """

    name: ClassVar[str] = "unique-codes"
    negatives: Iterable[Any]
    codes: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "negatives", tuple(self.negatives))
        whole(self.name, "codes", self.codes, least=2)

    @property
    def more(self) -> Sequence[Any]:
        return tuple(self.negatives)

    def to_json(self) -> str:
        return f"{self.name}(codes={self.codes})"

    def of_model(self, probe: HeadProbe) -> Mapping[str, Sequence[float]]:
        if not probe.more:
            raise CalibrationError(
                "unique-codes: there are no negative examples", hint="pass UniqueCodes(negatives=...)"
            )
        pairs = zip(probe.sites(), probe.sites(probe.more), strict=True)
        return {s.name: self._unique(torch.cat(last_outputs(s)), torch.cat(last_outputs(o))) for s, o in pairs}

    def _unique(self, positive_NHD: Tensor, negative_NHD: Tensor) -> list[float]:
        shares = []
        for positive, negative in zip(positive_NHD.unbind(1), negative_NHD.unbind(1), strict=True):
            codes = coded(torch.cat([positive, negative]), self.codes)
            own, others = codes[: len(positive)], codes[len(positive) :]
            shares.append(float((~torch.isin(own, others)).double().mean()))
        return shares
