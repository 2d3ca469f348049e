"""Let several query heads share one key/value head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.options import choice, whole
from attnopt.refusal import Refusal
from attnopt.rewriting import HeadWeights, Pass, Rewrite
from attnopt.site import Site


@dataclass(frozen=True)
class GroupedQuery(Pass):
    """Merge neighbouring key/value heads into ``kv_heads`` groups of equal size (GQA, arXiv:2305.13245).

    ``merge="mean"``: a group's key and value weights become the mean of its heads'; ``"first"``: those of its first
    head.  The group keeps the number of its first head.  Raises PolicyError.
    """

    name: ClassVar[str] = "grouped-query"
    exact: ClassVar[bool] = False
    kv_heads: int
    merge: str = "mean"

    def __post_init__(self) -> None:
        whole(self.name, "kv_heads", self.kv_heads, least=1)
        choice(self.name, "merge", self.merge, ("mean", "first"))

    def check(self, site: Site) -> Refusal | None:
        if site.num_kv_heads % self.kv_heads:
            fits = [n for n in range(1, site.num_kv_heads + 1) if site.num_kv_heads % n == 0]
            expected = f"kv_heads to be one of {', '.join(map(str, fits))}"
            return site.refuse("kv-heads-do-not-fit", expected=expected, found=str(self.kv_heads))
        if self.kv_heads == site.num_kv_heads:
            return None
        for role in ("k", "v"):
            p = site.projections.get(role)
            if p is None or p.rows is None:
                found = f"{role}: {p.why if p and p.why else 'not found'}"
                return site.refuse("unknown-projection", expected="known key and value projections", found=found)
        return None

    def rewrite(self, site: Site) -> Rewrite:
        spec = site.spec
        size = spec.num_kv_heads // self.kv_heads
        if size == 1:
            return Rewrite(spec)
        groups = [spec.kv_heads[start : start + size] for start in range(0, spec.num_kv_heads, size)]
        merged = replace(
            spec,
            kv_heads=tuple(group[0] for group in groups),
            kv_of_head=tuple(g // size for g in spec.kv_of_head),
        )
        if self.merge == "first":
            return Rewrite(merged)
        return Rewrite(merged, tuple(_mean(site, role, group) for role in ("k", "v") for group in groups))


def _mean(site: Site, role: str, group: tuple[int, ...]) -> HeadWeights:
    weight = _averaged(lambda head: site.head_weight(role, head), group)
    if weight is None:
        raise ValueError(f"{site.name}: the weights of {role} are not known")
    return HeadWeights(role, group[0], weight, _averaged(lambda head: site.head_bias(role, head), group))


def _averaged(of_head: Callable[[int], Tensor | None], group: tuple[int, ...]) -> Tensor | None:
    """The mean over the group, summed in float64 and given in the dtype of the heads; None where one has no tensor."""
    found = [t for t in map(of_head, group) if t is not None]
    if len(found) < len(group):
        return None
    return torch.stack([t.double() for t in found]).mean(0).to(found[0].dtype)
