"""Restrict every query to the key blocks that look important for the current input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attnopt.ir.block_scores import BlockScores
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import refuse_edits, refuse_other_keys, refuse_pooled


@dataclass(frozen=True)
class DynamicSparse(Pass):
    """Each block of queries keeps the ``keep`` key blocks with the highest scores, chosen per input, without training.

    ``scores``: "pooled" (MInference, arXiv:2407.02490), "antidiagonal" (XAttention, arXiv:2503.16428), "kmeans"
    (Routing Transformer, arXiv:2003.05997), each with options as in "antidiagonal(stride=16)", or ``BlockScores``.  The
    other options are those of ``DynamicBlocks``.  A causal attention stays causal.  Raises PolicyError.
    """

    name: ClassVar[str] = "dynamic-sparse"
    exact: ClassVar[bool] = False
    scores: BlockScores | str = "pooled"
    keep: float | int = 0.25
    block: int = 64
    sinks: int = 1
    local: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", self._selection.scores)

    def check(self, site: Site) -> Refusal | None:
        if site.spec.selection is not None:
            return site.refuse(
                "already-selected",
                expected="an attention without block selection",
                found=str(site.spec.selection),
                hint="apply dynamic-sparse only once per site",
            )
        edits = [edit for edit in site.spec.after if edit.reads_masks]
        hint = f"exclude the site from {self.name}, or leave the edit out: chosen blocks would hide its keys"
        pooled = refuse_pooled(site, "use either dynamic-sparse or pool-keys at a site")
        return pooled or refuse_edits(site, edits, hint) or refuse_other_keys(site)

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(replace(site.spec, selection=self._selection))

    @property
    def _selection(self) -> DynamicBlocks:
        return DynamicBlocks(self.scores, self.keep, self.block, self.sinks, self.local)
