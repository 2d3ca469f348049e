"""Safety attention head attribution: how far a head turns the subspace of hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.base.options import choice, whole
from attnopt.errors import CalibrationError
from attnopt.ir.head_probe import KINDS, HeadProbe
from attnopt.ir.importance import AblationImportance
from attnopt.statistics.logits import at_place, hidden_of_output, last_places


@dataclass(frozen=True)
class Sahara(AblationImportance):
    """The angle, in degrees, by which ablation turns the subspace of hidden states (Sahara, arXiv:2410.13708)::

        U, U_h = first ``rank`` left singular vectors of X, X_h    # [sequences, features], hidden states of the last token
        acos(smallest singular value of U' U_h)                    # the largest principal angle

    ``attnopt.greedy_heads`` with it is the paper's greedy set.  ``kind``: as of "ships".  The hidden states are the model's
    ``last_hidden_state``, the last of its ``hidden_states``, its output, or what ``behaviour`` returns.
    Raises PolicyError, and CalibrationError for fewer sequences than the subspace needs to turn.
    """

    name: ClassVar[str] = "sahara"
    uses_behaviour: ClassVar[bool] = True
    rank: int = 1
    kind: str = "uniform"

    def __post_init__(self) -> None:
        whole(self.name, "rank", self.rank, least=1)
        choice(self.name, "kind", self.kind, KINDS)

    def before(self, probe: HeadProbe) -> tuple[list[Tensor], Tensor]:
        hidden = [hidden_of_output(probe, probe.output(batch)) for batch in probe.batches]
        places = last_places(probe, hidden)
        return places, self._subspace([at_place(x, place) for x, place in zip(hidden, places, strict=True)])

    def read(self, probe: HeadProbe, before: Any, batch: int, output: Any) -> Tensor:
        places, _ = before
        return at_place(hidden_of_output(probe, output), places[batch])

    def moved(self, before: Any, read: Sequence[Tensor]) -> float:
        _, own = before
        turned = self._subspace(read)
        sine = torch.linalg.matrix_norm(turned - own @ (own.mT @ turned), 2)  # exact where the angle is small
        return math.degrees(math.asin(min(1.0, float(sine))))

    def _subspace(self, hidden: Sequence[Tensor]) -> Tensor:
        """[sequences, rank]"""
        x = torch.cat(list(hidden)).double()
        if self.rank >= min(len(x), x.shape[1] + 1):
            raise CalibrationError(
                f"sahara: {len(x)} sequences with {x.shape[1]} features have no subspace of {self.rank} that can turn",
                hint=f"pass at least {self.rank + 1} sequences, or use a smaller rank",
            )
        left: Tensor = torch.linalg.svd(x, full_matrices=False).U
        return left[:, : self.rank]
