"""What a way to merge key/value heads is: a thing that a third party writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site


class KvMerge(ABC):
    """One key/value head in the place of several.  Heads have the numbers of ``site.spec.kv_heads``."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("k", "v")  # the projections ("q", "k", "v", "out") whose rows have to be known
    needs_calibration: ClassVar[bool] = False  # it reads ``site.activations``
    adapts_readers: ClassVar[bool] = False  # ``readers`` answers; the queries and keys must be linear in their weights
    by_scores: ClassVar[bool] = False  # heads are alike if their scores and the layer's output are

    def check(self, site: Site) -> Refusal | None:
        """Why it does not apply to ``site``, or None."""
        return None

    @abstractmethod
    def merge(self, site: Site, role: str, heads: Sequence[int]) -> HeadWeights | None:
        """The weights of the shared head, which has the number ``heads[0]``; None: those that this one has already.

        ``role``: "k" or "v".  ``site.head_weight`` and ``site.head_bias`` give today's weights.
        """

    def readers(self, site: Site, role: str, heads: Sequence[int]) -> Sequence[Tensor] | None:
        """For each of ``heads`` the map [D, D] of what reads it: its queries become ``q M`` ("k"), its output weights
        ``M' W`` ("v")."""
        return None

    def refined(self, site: Site, groups: Sequence[Sequence[int]], after: Site) -> tuple[HeadWeights, ...] | None:
        """Better values for the output weights that were fitted to the first ones; None if there are none.  Asked only of
        a merge that ``adapts_readers``.

        ``after``: the site with its heads merged and its output projection fitted.
        """
        return None
