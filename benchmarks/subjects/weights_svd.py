"""The best known rewrite to fewer key/value heads without any data: as if the features of tokens were alike and independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

import attnopt
from attnopt.fit.absorbable_maps import edit
from attnopt.fit.kv_search import agglomerated
from attnopt.fit.kv_sides import Merged, Side, diagonal, roots
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.kv_merge import KvMerge
from attnopt.ir.projection import Projected
from attnopt.ir.site import Site
from attnopt.passes import GroupedQuery


@attnopt.register
class WeightsSvd(KvMerge):
    """The leading singular vectors of the weights of a group, each head's scaled by those of what reads it."""

    name: ClassVar[str] = "benchmark.weights-svd"
    needs: ClassVar[tuple[str, ...]] = ("q", "k", "v", "out")
    adapts_readers: ClassVar[bool] = True

    def merge(self, site: Site, role: str, heads: Sequence[int]) -> HeadWeights:
        return edit(site, role, heads[0], dict(zip(heads, _merged(site, role, heads).into, strict=True)))

    def readers(self, site: Site, role: str, heads: Sequence[int]) -> Sequence[Tensor]:
        return _merged(site, role, heads).back


def policy(sites: Sequence[Site], kv_heads: int) -> dict[str, GroupedQuery]:
    """For each site the groups that lose least, joined pair by pair."""
    return {s.name: GroupedQuery(kv_heads, WeightsSvd.name, _groups(s, kv_heads), "none", "site") for s in sites}


def _groups(site: Site, count: int) -> list[int]:
    sides = [_side(site, role) for role in "kv"]

    def loss(groups: Sequence[Sequence[int]]) -> Tensor:
        return sides[0].loss(groups) + sides[1].loss(groups)

    groups = agglomerated(site.num_kv_heads, loss)[count]
    return [next(n for n, group in enumerate(groups) if h in group) for h in range(site.num_kv_heads)]


def _merged(site: Site, role: str, heads: Sequence[int]) -> Merged:
    return _side(site, role).merge([site.spec.kv_heads.index(h) for h in heads])


def _side(site: Projected, role: str) -> Side:
    """For as many query heads as key/value heads."""
    count, size = site.num_kv_heads, site.head_dim
    written = torch.cat([_weight(site, role, h) for h in site.spec.kv_heads])
    read = [_weight(site, "q" if role == "k" else "out", h) for h in site.spec.heads]
    scale, inverse = roots(torch.stack([w @ w.T for w in read]), count, size)
    s = diagonal(scale)
    return Side(s.T @ written @ written.T @ s, scale, inverse, size)


def _weight(site: Projected, role: str, head: int) -> Tensor:
    weight = site.head_weight(role, head)
    assert weight is not None
    return weight.double()
