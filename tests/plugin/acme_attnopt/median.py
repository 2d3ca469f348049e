"""A KV merge: one key/value head in the place of several."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from attnopt import HeadWeights, KvMerge, Site


class Median(KvMerge):
    """The median of the heads' weights, number by number."""

    name: ClassVar[str] = "acme.median"

    def merge(self, site: Site, role: str, heads: Sequence[int]) -> HeadWeights:
        weights = [w for h in heads if (w := site.head_weight(role, h)) is not None]
        biases = [b for h in heads if (b := site.head_bias(role, h)) is not None]
        bias = torch.stack(biases).median(0).values if biases else None
        return HeadWeights(role, heads[0], torch.stack(weights).median(0).values, bias)
