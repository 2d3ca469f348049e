"""Add the values of some tokens to head outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from attnopt.base.options import number, positions
from attnopt.ir.head_additions import ValuesAdded
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import distinct_heads, note_absent_tokens, refuse_unknown_heads, refuse_unknown_tokens


@dataclass(frozen=True)
class AddValues(Pass):
    """The attention map A of the chosen heads becomes ``A[:, tokens] + alpha``, and is not normalized again.

    The heads say more, or for a negative ``alpha`` less, of these keys, as MotionCLR emphasizes words (arXiv:2410.18977).
    This equals ``o + alpha * sum of v[tokens]`` and does not need the map.  A key that a mask or a pattern hides from a query,
    before or after this pass, is not added to it: nothing of a later token reaches a causal query.
    ``hidden_below``: where the attention has a bias, the numbers that hide, as they reach the scaled scores: those of at most
    this, such as -1e3, with room for a bias beside them.  Needed there: a bias may be a mask.
    ``tokens``: the positions of the keys, as integers or a ``range``, negative from the end as in Python; None for all.  With a
    cache they count the earlier tokens, too; padding counts.  A position that a sequence does not have is ignored there.
    ``heads``: None for all; those that were already pruned are ignored.  A head with shared values adds the shared values.
    Refused where blocks are chosen at run time.  Raises PolicyError.
    """

    name: ClassVar[str] = "add-values"
    exact: ClassVar[bool] = False
    tokens: Iterable[int] | None
    alpha: float
    heads: Sequence[int] | None = None
    hidden_below: float | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None:
            object.__setattr__(self, "tokens", positions(self.name, "tokens", self.tokens))
        object.__setattr__(self, "alpha", number(self.name, "alpha", self.alpha))
        if self.heads is not None:
            object.__setattr__(self, "heads", distinct_heads(self.name, self.heads))
        if self.hidden_below is not None:
            object.__setattr__(self, "hidden_below", number(self.name, "hidden_below", self.hidden_below))

    @classmethod
    def typical(cls) -> AddValues:
        return cls(None, 1.0, hidden_below=0.0)

    def check(self, site: Site) -> Refusal | None:
        return (
            refuse_unknown_heads(site, self.heads or ())
            or refuse_unknown_tokens(site, self._tokens, site.kv_len)
            or self._refuse_unknown_masks(site)
        )

    def rewrite(self, site: Site) -> Rewrite:
        chosen = tuple(h for h in site.spec.heads if self.heads is None or h in self.heads)
        if not chosen or self.alpha == 0.0 or self._tokens == ():
            return Rewrite(site.spec)
        edit = ValuesAdded(chosen, self.alpha, self._tokens, self.hidden_below if site.spec.has_bias else None)
        return Rewrite(site.spec.followed_by(edit), notes=note_absent_tokens(self.name, site, self._tokens))

    @property
    def _tokens(self) -> tuple[int, ...] | None:
        return None if self.tokens is None else tuple(self.tokens)

    def _refuse_unknown_masks(self, site: Site) -> Refusal | None:
        """Refuse if it is not known which keys are hidden."""
        expected = "keys that a pattern or a boolean mask hides"
        if site.spec.selection is not None:
            hint = "exclude the site from add-values or dynamic-sparse"
            return site.refuse("unknown-mask", expected=expected, found=str(site.spec.selection), hint=hint)
        gains = site.spec.weight_gains
        if gains is not None and gains.normalise == "none" and any(g == 0 for part in gains.parts for g in part.gains):
            hint = "exclude the site: its own factors of 0 hide keys, which would be added"
            return site.refuse("unknown-mask", expected=expected, found=str(gains), hint=hint)
        if site.spec.has_bias and self.hidden_below is None:
            found, hint = "a bias, which may hide some", "say which of its numbers do, as in hidden_below=-1e3"
            return site.refuse("unknown-mask", expected=expected, found=found, hint=hint)
        return None
