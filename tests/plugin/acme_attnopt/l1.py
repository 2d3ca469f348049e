"""An importance method: which heads are kept where some are pruned."""

from collections.abc import Sequence
from typing import ClassVar

from attnopt import Importance, Site


class L1(Importance):
    """The sum of the absolute values of the head's output weights."""

    name: ClassVar[str] = "acme.l1"
    needs: ClassVar[tuple[str, ...]] = ("out",)

    def scores(self, site: Site) -> Sequence[float]:
        weights = [site.head_weight("out", h) for h in site.spec.heads]
        return [float(w.abs().sum()) for w in weights if w is not None]
