"""What a way to choose the key/value heads to merge is: a thing that a third party writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site

Group = tuple[int, ...]
Loss = Callable[[Sequence[Group]], Tensor]  # groups of equal size -> what merging the heads of each loses


class KvPartition(ABC):
    """Which key/value heads become one.  Heads have the numbers of ``site.spec.kv_heads``."""

    name: ClassVar[str]
    needs_calibration: ClassVar[bool] = False  # it reads ``site.activations``
    needs_loss: ClassVar[bool] = False  # ``groups`` calls ``loss``, which is measured on calibration data
    moves_queries: ClassVar[bool] = False  # ``readers`` answers

    def check(self, site: Site) -> Refusal | None:
        """Why it does not apply to ``site``, or None."""
        return None

    @abstractmethod
    def groups(self, site: Site, count: int, loss: Loss) -> Sequence[Sequence[int]]:
        """``count`` groups, which together hold each head once; each keeps the number of its first head."""

    def fits(self, heads: int, count: int) -> bool:
        """Whether so many heads can become ``count`` groups."""
        return count <= heads

    def choices(self, site: Site, counts: Sequence[int], loss: Loss) -> Mapping[int, Sequence[Sequence[int]]]:
        """The groups for those of ``counts`` for which there are some."""
        return {n: self.groups(site, n, loss) for n in counts if self.fits(site.num_kv_heads, n)}

    def readers(self, site: Site, groups: Sequence[Group]) -> Sequence[int] | None:
        """For each query head the place of the group that it reads; None: of the group that has its own key/value
        head."""
        return None
