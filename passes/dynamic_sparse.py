"""Restrict every query to the key blocks that look important for the current input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from attnopt.fit.attention_recall import told
from attnopt.fit.fitted_blocks import fitted, recall_on_held_back
from attnopt.ir.block_scores import BlockScores
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import (
    refuse_edits,
    refuse_looking_ahead,
    refuse_no_data,
    refuse_other_keys,
    refuse_pooled,
    refuse_rows,
    refuse_unknown_heads,
)


@dataclass(frozen=True)
class DynamicSparse(Pass):
    """Each block of queries keeps the ``keep`` key blocks with the highest scores, chosen per input, without training.

    ``scores``: "pooled" (MInference, arXiv:2407.02490), "antidiagonal" (XAttention, arXiv:2503.16428), "kmeans"
    (of every input anew), each with options as in "antidiagonal(stride=16)", or ``BlockScores``.  Fitted to calibration data
    are "low-rank" (after Sparsifiner, arXiv:2303.13755) and "routing" (Routing Transformer, arXiv:2003.05997).  The
    other options are those of ``DynamicBlocks``.  A causal attention stays causal.  Raises PolicyError.
    """

    name: ClassVar[str] = "dynamic-sparse"
    exact: ClassVar[bool] = False
    scores: BlockScores | str = "pooled"
    keep: float | int = 0.25
    block: int = 64
    sinks: int = 1
    local: int = 1
    dense: int = 0
    local_heads: Sequence[int] = ()

    def __post_init__(self) -> None:
        selection = self._selection
        object.__setattr__(self, "scores", selection.scores)
        object.__setattr__(self, "local_heads", selection.local_heads)

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        """Whether the scores are fitted."""
        return self._selection.scores.needs_calibration

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
        refused = refuse_pooled(site, "use either dynamic-sparse or pool-keys at a site")
        refused = refused or refuse_rows(site, "use either dynamic-sparse or query-rows at a site")
        refused = refused or refuse_edits(site, edits, hint) or refuse_other_keys(site)
        refused = refused or refuse_unknown_heads(site, self.local_heads) or refuse_looking_ahead(site, self._selection)
        if refused is not None or not self.calibrates:
            return refused
        return refuse_no_data(site, 'pass calibration= to attnopt.optimize, or use scores="antidiagonal"')

    def rewrite(self, site: Site) -> Rewrite:
        selection = self._selection.keeping(range(site.num_heads), site.spec.heads)
        if not self.calibrates:
            return Rewrite(replace(site.spec, selection=selection))
        spec = replace(site.spec, selection=fitted(site, selection))
        recall = recall_on_held_back(site, spec)
        return Rewrite(spec, notes=(told(recall, spec.heads, "held-out calibration data"),))

    @property
    def _selection(self) -> DynamicBlocks:
        return DynamicBlocks(self.scores, self.keep, self.block, self.sinks, self.local, self.dense, self.local_heads)
