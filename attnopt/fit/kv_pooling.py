"""Merges of key/value heads that leave queries and output projection as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from attnopt.base.registry import Registry
from attnopt.ir.blame import blamed
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.kv_merge import KvMerge
from attnopt.ir.site import Site


class First(KvMerge):
    """The first head of the group."""

    name: ClassVar[str] = "first"

    def merge(self, site: Site, role: str, heads: Sequence[int]) -> HeadWeights | None:
        return None


class Mean(KvMerge):
    """The mean over the group (GQA, arXiv:2305.13245), summed in float64 and given in the dtype of the heads."""

    name: ClassVar[str] = "mean"

    def merge(self, site: Site, role: str, heads: Sequence[int]) -> HeadWeights | None:
        weights = [w for g in heads if (w := site.head_weight(role, g)) is not None]
        biases = [b for g in heads if (b := site.head_bias(role, g)) is not None]
        weight = torch.stack([w.double() for w in weights]).mean(0).to(weights[0].dtype)
        bias = torch.stack([b.double() for b in biases]).mean(0).to(biases[0].dtype) if biases else None
        return HeadWeights(role, heads[0], weight, bias)


KV_MERGES = Registry(
    "attnopt.kv_merges",
    "KV merge",
    KvMerge,  # type: ignore[type-abstract]
    {kind.name: kind for kind in (Mean, First)},
    lambda cls: getattr(cls, "name", None),
)


def merged(name: str, site: Site, groups: Sequence[Sequence[int]]) -> tuple[HeadWeights, ...]:
    """New weights of the shared heads of these groups, as the KV merge ``name`` makes them.  Raises PluginError."""
    how = KV_MERGES.load(name)()
    found: list[HeadWeights] = []
    for role in ("k", "v"):
        for group in groups:
            with blamed(how, "KV merge", "merge", site.name):
                made = how.merge(site, role, group)
            found += [] if made is None else [made]
    return tuple(found)
