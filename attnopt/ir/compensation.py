"""What a compensation for lost heads is: a thing that a third party writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from attnopt.ir.interfaces import Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec


class Compensation(ABC):
    """How the output projection makes up for heads that were removed or merged."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ("out",)  # the projections ("q", "k", "v", "out") whose rows have to be known
    needs_calibration: ClassVar[bool] = True  # ``compensate`` reads ``site.activations``
    merges: ClassVar[bool] = False  # it also makes up for merged key/value heads
    channels: ClassVar[bool] = False  # it also applies to attentions between channels

    def check(self, site: Site) -> Refusal | None:
        """Why it does not apply to ``site``, or None."""
        return None

    @abstractmethod
    def compensate(self, site: Site, spec: AttentionSpec) -> Rewrite:
        """The rewrite of ``site`` to ``spec``, with new output weights.

        ``spec`` has only some of the heads of ``site``, or zeros in the place of the last one.  After a merge it is
        ``site.spec``, and the weights and activations of ``site`` are the new ones.
        """

    def error(self, site: Site, heads: Sequence[int]) -> float | None:
        """The squared error of the layer with only these heads, relative to its output, for a budget over all sites;
        None: as measured with what ``compensate`` returns."""
        return None
