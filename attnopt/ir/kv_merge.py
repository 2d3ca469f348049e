"""What a way to merge key/value heads is: a thing that a third party writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.site import Site


class KvMerge(ABC):
    """One key/value head in the place of several."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = False  # ``merge`` reads ``site.activations``

    @abstractmethod
    def merge(self, site: Site, role: str, heads: Sequence[int]) -> HeadWeights | None:
        """The weights of the shared head, which has the number ``heads[0]``; None: those that this one has already.

        ``role``: "k" or "v"; ``heads``: original numbers.  ``site.head_weight`` and ``site.head_bias`` give today's weights.
        """
