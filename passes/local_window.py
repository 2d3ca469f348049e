"""Restrict every query to nearby keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from attnopt.base.options import whole, wholes
from attnopt.errors import PolicyError
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.passes.preconditions import (
    refuse_causal_pools,
    refuse_causal_rows,
    refuse_looking_ahead,
    refuse_other_keys,
    refuse_unknown_heads,
)
from attnopt.patterns import Dilated, Pattern, PerHead, Sinks, Span, Window
from attnopt.patterns.span import UNITS, thousandths


@dataclass(frozen=True)
class LocalWindow(Pass):
    """Each query sees itself, ``left`` keys before and ``right`` keys after it (Longformer, arXiv:2004.05150).

    ``right=None``: 0 for a causal attention, otherwise ``left``.  ``sinks``: number of first keys visible to all
    (arXiv:2309.17453).
    ``dilation``: only every ``dilation``-th key is visible; ``left`` and ``right`` count these.
    ``heads``: only these heads, by their number in the trained model; the others stay unchanged.
    ``share``: of the sequence, in thousandths, which is added to ``left``, and to ``right`` where that follows ``left``: a span
    that grows with the length (MoA, arXiv:2406.14909).  Raises PolicyError.
    """

    name: ClassVar[str] = "local-window"
    exact: ClassVar[bool] = False
    head_maps: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    left: int
    right: int | None = None
    sinks: int = 0
    dilation: int = 1
    heads: Sequence[int] | None = None
    share: float = 0.0

    def __post_init__(self) -> None:
        whole(self.name, "left", self.left)
        if self.right is not None:
            whole(self.name, "right", self.right)
        whole(self.name, "sinks", self.sinks)
        whole(self.name, "dilation", self.dilation, least=1)
        if self.heads is not None:
            object.__setattr__(self, "heads", wholes(self.name, "heads", self.heads))
        object.__setattr__(self, "share", thousandths(self.name, "share", self.share) / UNITS)
        if self.share and self.dilation > 1:
            raise PolicyError(
                f"{self.name}: a share of the sequence cannot be dilated", hint="leave share or dilation out"
            )

    @classmethod
    def typical(cls) -> LocalWindow:
        return cls(left=1)

    def check(self, site: Site) -> Refusal | None:
        return (
            refuse_other_keys(site, past=not self.share)
            or refuse_unknown_heads(site, self.heads or ())
            or refuse_causal_pools(
                site, self.rewrite(site).spec, "set right= above 0, or leave out the heads that pool"
            )
            or refuse_looking_ahead(site, site.spec.selection, self._pattern(site.spec))
            or refuse_causal_rows(site, self.rewrite(site).spec)
        )

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(site.spec.restricted(self._pattern(site.spec)))

    def _pattern(self, spec: AttentionSpec) -> Pattern:
        is_mirrored = self.right is None and not spec.is_causal
        ahead = self.left if is_mirrored else self.right or 0
        if self.share:
            near: Pattern = Span(self.left, ahead, self.share, self.share if is_mirrored else 0.0)
        elif self.dilation > 1:
            near = Dilated(self.left, ahead, self.dilation)
        else:
            near = Window(self.left, ahead)
        pattern = near | Sinks(self.sinks) if self.sinks else near
        return pattern if self.heads is None else PerHead({tuple(self.heads): pattern}).for_heads(spec.heads)
