"""What a way to score heads is: a thing that a third party writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site


class Importance(ABC):
    """A score for each head of one site, from its weights and from what it computes on calibration data."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()  # the projections ("q", "k", "v", "out") whose rows have to be known
    needs_calibration: ClassVar[bool] = False  # ``scores`` reads ``site.activations``

    @property
    def told(self) -> str:
        """What the report says that heads were removed by."""
        return f"the importance {self.name}"

    def check(self, site: Site) -> Refusal | None:
        """Why it does not apply to ``site``, or None."""
        return None

    @abstractmethod
    def scores(self, site: Site) -> Sequence[float]:
        """One number for each head of ``site.spec.heads``; the highest are kept."""
