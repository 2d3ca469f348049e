"""How much each head and MLP adds to an output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attnopt.base.display import shown


@dataclass(frozen=True)
class Attribution:
    """``heads``: by attention [N, H], ``others``: [N] of MLPs under the names of their modules, of ``"embedding"``, where the
    residual stream starts, and of ``"bias"``, all biases together.  For each of N targets they add up to ``target`` [N].

    ``numbers``: those of the heads.  Prints as a table of means.
    """

    heads: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    target: Tensor
    numbers: Mapping[str, tuple[int, ...]]

    @property
    def total(self) -> Tensor:
        """The sum of all parts, [N]."""
        parts = [*(x.sum(1) for x in self.heads.values()), *self.others.values()]
        return sum(parts[1:], parts[0])

    def __str__(self) -> str:
        return shown(self, "text")
