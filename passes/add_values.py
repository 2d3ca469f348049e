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
from attnopt.passes.heads import distinct_heads, note_absent_tokens, refuse_unknown_heads, refuse_unknown_tokens


@dataclass(frozen=True)
class AddValues(Pass):
    """The attention map A of the chosen heads becomes ``A[:, tokens] + alpha``, and is not normalized again: more, or for a
    negative ``alpha`` less, of what these keys say, as MotionCLR emphasizes words (arXiv:2410.18977).

    This equals ``o + alpha * sum of v[tokens]`` and does not need the map.  A key that a mask or a pattern hides from a query,
    before or after this pass, is not added to it: nothing of a later token reaches a causal query.
    ``tokens``: the positions of the keys, as integers or a ``range``, negative from the end as in Python; None for all.  With a
    cache they count the earlier tokens, too; padding counts.  A position that a sequence does not have is ignored there.
    ``heads``: None for all; those that were already pruned are ignored.  A head with shared values adds the shared values.
    Refused where a bias or blocks chosen at run time may hide keys.  Raises PolicyError.
    """

    name: ClassVar[str] = "add-values"
    exact: ClassVar[bool] = False
    tokens: Iterable[int] | None
    alpha: float
    heads: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None:
            object.__setattr__(self, "tokens", positions(self.name, "tokens", self.tokens))
        object.__setattr__(self, "alpha", number(self.name, "alpha", self.alpha))
        if self.heads is not None:
            object.__setattr__(self, "heads", distinct_heads(self.name, self.heads))

    @classmethod
    def typical(cls) -> AddValues:
        return cls(None, 1.0)

    def check(self, site: Site) -> Refusal | None:
        return (
            refuse_unknown_heads(site, self.heads or ())
            or refuse_unknown_tokens(site, self._tokens, site.kv_len)
            or _refuse_unseen_masks(site)
        )

    def rewrite(self, site: Site) -> Rewrite:
        chosen = tuple(h for h in site.spec.heads if self.heads is None or h in self.heads)
        if not chosen or self.alpha == 0.0 or self._tokens == ():
            return Rewrite(site.spec)
        edit = ValuesAdded(chosen, self.alpha, self._tokens)
        return Rewrite(site.spec.followed_by(edit), notes=note_absent_tokens(self.name, site, self._tokens))

    @property
    def _tokens(self) -> tuple[int, ...] | None:
        return None if self.tokens is None else tuple(self.tokens)


def _refuse_unseen_masks(site: Site) -> Refusal | None:
    """Refuse if something other than the pattern and the mask operand may hide keys."""
    expected = "keys that only a pattern or a boolean mask hides"
    if site.spec.selection is not None:
        hint = "exclude the site from add-values or dynamic-sparse"
        return site.refuse("keys-may-be-hidden", expected=expected, found=str(site.spec.selection), hint=hint)
    if site.spec.has_bias:
        found = "a bias, in which large negative numbers may hide keys"
        hint = "pass masks as boolean tensors, or exclude the site from add-values"
        return site.refuse("keys-may-be-hidden", expected=expected, found=found, hint=hint)
    return None
