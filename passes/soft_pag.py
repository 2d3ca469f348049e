"""Blend head outputs with the tokens' own values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from attnopt.base.options import number, wholes
from attnopt.errors import PolicyError
from attnopt.ir.head_edits import TowardValues
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import refuse_other_keys, refuse_unknown_heads


@dataclass(frozen=True)
class SoftPAG(Pass):
    """The attention map A of the chosen heads becomes ``(1 - u) A + u I``: each token keeps more of its own value.

    This equals ``(1 - u) o + u v`` and does not need the map.  It is the weak branch of perturbed-attention guidance
    (PAG, arXiv:2403.17377), softened and applied per head as in HeadHunter (arXiv:2506.10978); the guidance itself is
    ``strong + scale * (strong - weak)``, outside the model.
    ``heads``: None for all.  ``u``: from 0 to 1.  Masks do not hide a token's own value.  A head with shared values
    moves toward the shared values.  Raises PolicyError.
    """

    name: ClassVar[str] = "soft-pag"
    exact: ClassVar[bool] = False
    heads: Sequence[int] | None = None
    u: float = 1.0

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", wholes(self.name, "heads", self.heads))
        u = number(self.name, "u", self.u)
        if not 0.0 <= u <= 1.0:
            raise PolicyError(f"{self.name}: invalid value u={self.u!r}: expected a number from 0 to 1")
        object.__setattr__(self, "u", u)

    def check(self, site: Site) -> Refusal | None:
        return refuse_other_keys(site) or refuse_unknown_heads(site, self.heads or ())

    def rewrite(self, site: Site) -> Rewrite:
        chosen = [h for h in site.spec.heads if self.heads is None or h in self.heads]
        if not chosen or self.u == 0.0:
            return Rewrite(site.spec)
        return Rewrite(site.spec.followed_by(TowardValues(tuple((h, self.u) for h in chosen))))
