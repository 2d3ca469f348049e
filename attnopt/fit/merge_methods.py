"""The ways to merge key/value heads, by their names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.base.registry import Registry
from attnopt.fit.absorbable_maps import edit, is_linear
from attnopt.fit.kv_sides import Merged, Side, Sides
from attnopt.fit.least_squares import output_weights
from attnopt.fit.shared_values import better_values
from attnopt.ir.blame import blamed, fault
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.interfaces import Rewrite
from attnopt.ir.kv_merge import KvMerge
from attnopt.ir.kv_partition import Group
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.spec_rules import broken_rules
from attnopt.ir.statistic import Statistic

KIND = "KV merge"


# ------------------------------------------------------------ of the weights alone
class First(KvMerge):
    """The first head of the group."""

    name: ClassVar[str] = "first"

    def merge(self, site: Site, role: str, heads: Sequence[int]) -> HeadWeights | None:
        return None


class Mean(KvMerge):
    """The mean over the group (GQA, arXiv:2305.13245), summed in float64 and given in the dtype of the heads."""

    name: ClassVar[str] = "mean"

    def merge(self, site: Site, role: str, heads: Sequence[int]) -> HeadWeights:
        weights = [w for g in heads if (w := site.head_weight(role, g)) is not None]
        biases = [b for g in heads if (b := site.head_bias(role, g)) is not None]
        weight = torch.stack([w.double() for w in weights]).mean(0).to(weights[0].dtype)
        bias = torch.stack([b.double() for b in biases]).mean(0).to(biases[0].dtype) if biases else None
        return HeadWeights(role, heads[0], weight, bias)


# ------------------------------------------------------------ of what the heads compute
@dataclass(frozen=True)
class _Mapped(KvMerge):
    """The shared head is a sum of linear maps of the heads; what reads these follows."""

    needs: ClassVar[tuple[str, ...]] = ("q", "k", "v", "out")
    needs_calibration: ClassVar[bool] = True
    adapts_readers: ClassVar[bool] = True

    @abstractmethod
    def join(self, side: Side, places: Sequence[int]) -> Merged:
        """The maps of the heads at these places."""

    def merge(self, site: Site, role: str, heads: Sequence[int]) -> HeadWeights:
        into = _Maps(self, role, tuple(heads)).of(site).into
        return edit(site, role, heads[0], dict(zip(heads, into, strict=True)))

    def readers(self, site: Site, role: str, heads: Sequence[int]) -> Sequence[Tensor]:
        return _Maps(self, role, tuple(heads)).of(site).back

    def refined(self, site: Site, groups: Sequence[Sequence[int]], after: Site) -> tuple[HeadWeights, ...] | None:
        now, out = after.activations, output_weights(after, after.original)
        assert now is not None
        assert out is not None
        places = [[site.spec.kv_heads.index(h) for h in group] for group in groups]
        maps = [torch.cat(_Maps(self, "v", tuple(group)).of(site).into) for group in groups]
        better = better_values(site, now, after.spec, places, maps, out)
        if better is None:
            return None
        parts = [m.reshape(len(g), -1, m.shape[1]) for g, m in zip(groups, better, strict=True)]
        return tuple(edit(site, "v", g[0], dict(zip(g, m, strict=True))) for g, m in zip(groups, parts, strict=True))


@dataclass(frozen=True)
class _Maps(Statistic[Merged]):
    how: _Mapped
    role: str
    heads: Group

    def measure(self, site: Site) -> Merged:
        side = Sides(self.how.by_scores).of(site)["kv".index(self.role)]
        return self.how.join(side, [site.spec.kv_heads.index(h) for h in self.heads])


@dataclass(frozen=True)
class Procrustes(_Mapped):
    """The mean after aligning each head with the first (arXiv:2412.20677)."""

    name: ClassVar[str] = "procrustes"

    def join(self, side: Side, places: Sequence[int]) -> Merged:
        return side.align(places)


@dataclass(frozen=True)
class Svd(_Mapped):
    """The subspace with most of the energy of the keys, and of the values."""

    name: ClassVar[str] = "svd"

    def join(self, side: Side, places: Sequence[int]) -> Merged:
        return side.merge(places)


@dataclass(frozen=True)
class ScoreOptimal(Svd):
    """The subspace that best preserves the scores and the layer output."""

    name: ClassVar[str] = "score-optimal"
    by_scores: ClassVar[bool] = True


KV_MERGES = Registry(
    "attnopt.kv_merges",
    KIND,
    KvMerge,  # type: ignore[type-abstract]
    {kind.name: kind for kind in (Mean, First, Procrustes, Svd, ScoreOptimal)},
    lambda cls: getattr(cls, "name", None),
)


def best_merge(site: Site) -> KvMerge:
    """The merge that loses least, as far as the calibration data and the projections of the site allow."""
    now = site.activations
    if now is None or not site.knows(*ScoreOptimal.needs) or now.tokens < site.num_heads * site.value_dim:
        return Mean()
    return ScoreOptimal() if is_linear(site) else Mean()


def shared(how: KvMerge, site: Site, groups: Sequence[Group], spec: AttentionSpec) -> Rewrite:
    """The rewrite to ``spec``, which has one key/value head for each group.  Raises PluginError."""
    edits: list[HeadWeights] = []
    for role in ("k", "v"):
        for group in groups:
            with blamed(how, KIND, "merge", site.name):
                made = how.merge(site, role, group)
            edits += [] if made is None else [made]
    if how.adapts_readers:
        edits += [e for role in ("k", "v") for group in groups for e in _followed(how, site, role, group)]
    found = Rewrite(spec, tuple(edits))
    if (broken := next(broken_rules(site, found), None)) is not None:
        raise fault(how, KIND, broken, site.name)
    return found


def refined(how: KvMerge, site: Site, groups: Sequence[Group], after: Site) -> tuple[HeadWeights, ...] | None:
    """Better values for the output projection of ``after``, if the merge has some.  Raises PluginError."""
    with blamed(how, KIND, "refined", site.name):
        found = how.refined(site, groups, after)
        values = None if found is None else tuple(found)
    if values is not None and (broken := next(broken_rules(site, Rewrite(after.spec, values)), None)) is not None:
        raise fault(how, KIND, broken, site.name)
    return values


def _followed(how: KvMerge, site: Site, role: str, group: Group) -> list[HeadWeights]:
    """New weights of what reads the heads of a group: their queries, or their columns of the output projection."""
    with blamed(how, KIND, "readers", site.name):
        maps = dict(zip(group, how.readers(site, role, group) or (), strict=True))
        read = [(h, maps[site.spec.kv_heads[g]]) for h, g in _reading(site, group)]
        return [edit(site, "q", h, {h: m}) if role == "k" else _output(site, h, m) for h, m in read]


def _reading(site: Site, group: Group) -> list[tuple[int, int]]:
    """The query heads that read this group, each with the place of its own key/value head."""
    pairs = zip(site.spec.heads, site.spec.kv_of_head, strict=True)
    return [(h, g) for h, g in pairs if site.spec.kv_heads[g] in group]


def _output(site: Site, head: int, back: Tensor) -> HeadWeights:
    weight = site.head_weight("out", head)
    assert weight is not None
    return HeadWeights("out", head, back.T @ weight.double())
