"""Compute the attention of some queries only, chosen for each input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from attnopt.base.options import wholes
from attnopt.ir.head_edits import Scaled
from attnopt.ir.head_routing import Routed
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.query_rows import ChosenRows
from attnopt.ir.refusal import Refusal
from attnopt.ir.row_scores import RowScores
from attnopt.ir.site import Site
from attnopt.passes.preconditions import (
    refuse_causal_rows,
    refuse_edits,
    refuse_other_keys,
    refuse_rows,
    refuse_unknown_heads,
)


@dataclass(frozen=True)
class QueryRows(Pass):
    """Only the queries with the highest scores are computed, chosen per input, without training.

    The others give zeros, so that their tokens pass by the residual connection (as in the global-local attention of DCAL,
    arXiv:2205.02151).  A row of zeros still gets the bias of the output projection.

    ``score``: "received": the weight that a token receives as a key from all queries, or from every n-th with
    "received(stride=n)"; "norm" of the queries; a registered ``RowScores``; or a function like ``RowScores.score``.
    ``keep``: a fraction of the rows after the prefix, above 0 and at most 1.0 (rounded up; padding, where a mask tells, is not
    counted and never chosen), or a number of rows of each sequence, as an int.
    ``prefix``: number of first rows, such as a class token, that are always computed.
    ``heads``: those that choose, by their number in the trained model; None for all.  They share one choice unless the score
    gives one for each.  The choice depends on the whole sequence: not for causal attentions.  Raises PolicyError.
    """

    name: ClassVar[str] = "query-rows"
    exact: ClassVar[bool] = False
    score: RowScores | str | Callable[..., Tensor] = "received(stride=8)"
    keep: float | int = 0.5
    prefix: int = 0
    heads: Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", self._rows(()).scores)
        if self.heads is not None:
            object.__setattr__(self, "heads", wholes(self.name, "heads", self.heads))

    @classmethod
    def typical(cls) -> QueryRows:
        return cls("norm")

    def check(self, site: Site) -> Refusal | None:
        rows = self._rows(())
        refused = refuse_unknown_heads(site, self.heads or ()) or refuse_rows(
            site, "apply query-rows only once per site"
        )
        if refused is None and (rows.scores.of_keys or not site.is_cross):
            refused = refuse_other_keys(site)
        refused = refused or refuse_causal_rows(site, replace(site.spec, rows=rows))
        refused = refused or _refuse_other_choices(site)
        edits = [edit for edit in site.spec.after if not isinstance(edit, (Scaled, Routed))]
        return refused or refuse_edits(site, edits, "apply query-rows before the edit, which then changes all rows")

    def rewrite(self, site: Site) -> Rewrite:
        heads = tuple(h for h in site.spec.heads if self.heads is None or h in self.heads)
        rows = self._rows(heads, site.bias_hides)
        if self._keeps_all(site):
            return Rewrite(site.spec, notes=("query-rows: every row is kept",))
        return Rewrite(replace(site.spec, rows=rows) if heads else site.spec)

    def _keeps_all(self, site: Site) -> bool:
        if isinstance(self.keep, float):
            return self.keep == 1.0
        return not site.is_dynamic and self.keep + self.prefix >= site.q_len

    def _rows(self, heads: Sequence[int], bias_hides: bool = False) -> ChosenRows:
        return ChosenRows(self.score, self.keep, self.prefix, heads, bias_hides, owner=self.name)


def _refuse_other_choices(site: Site) -> Refusal | None:
    """Refuse what is defined on whole maps, or chooses otherwise."""
    spec = site.spec
    others = {
        "block selection": ("already-selected", spec.selection, "dynamic-sparse"),
        "pooled keys": ("already-pooled", spec.pooling, "pool-keys"),
        "keys of other tokens": ("already-extended", spec.extension, "extend-keys"),
        "gains on weights": ("already-gained", spec.weight_gains, "segment-gain"),
        "segments of the call": ("already-segmented", spec.segments, "such segments"),
    }
    for what, (code, there, name) in others.items():
        if there is not None:
            hint = f"use either query-rows or {name} at a site"
            return site.refuse(code, expected=f"an attention without {what}", found=str(there), hint=hint)
    if not spec.has_map:
        return None
    hint = "exclude the site from query-rows"
    return site.refuse("already-mixed", expected="weights of a softmax alone", found="a map mixed into them", hint=hint)
