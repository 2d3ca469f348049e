"""Take heads out of an attention, and their parameters out of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from attnopt.errors import PolicyError
from attnopt.options import number, numbers, wholes
from attnopt.passes.heads import original_heads, refuse_unknown_heads
from attnopt.refusal import Refusal
from attnopt.rewriting import Pass, Rewrite
from attnopt.site import Site


@dataclass(frozen=True)
class PruneHeads(Pass):
    """Remove ``heads`` (numbers in the trained model), or the least important ``fraction`` of the heads that are left.

    ``importance``: one number for each head of the trained model, higher means keep; by default the Frobenius norm of
    the head's value projection times its output projection, times its gain.  Ties keep the lower head; a fraction is
    rounded down to whole heads; heads that are pruned already are ignored.  Raises PolicyError.  (arXiv:1905.10650)
    """

    name: ClassVar[str] = "prune-heads"
    exact: ClassVar[bool] = False
    fraction: float | None = None
    heads: Sequence[int] | None = None
    importance: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.heads is None):
            raise PolicyError("prune-heads: give either fraction or heads")
        if self.fraction is not None and not 0 <= number(self.name, "fraction", self.fraction) < 1:
            raise PolicyError(
                f"prune-heads: fraction={self.fraction!r} is not possible; give a number from 0 to below 1"
            )
        if self.heads is not None:
            object.__setattr__(self, "heads", wholes(self.name, "heads", self.heads))
        if self.importance is None:
            return
        if self.heads is not None:
            raise PolicyError("prune-heads: importance is only used with fraction; leave it out or give fraction")
        object.__setattr__(self, "importance", numbers(self.name, "importance", self.importance))

    def check(self, site: Site) -> Refusal | None:
        if self.heads is not None:
            return refuse_unknown_heads(site, self.heads) or self._refuse_all(site, self.heads)
        count = original_heads(site)
        if self.importance is not None and len(self.importance) != count:
            found = f"{len(self.importance)} numbers"
            return site.refuse("no-such-site-size", expected=f"an importance for each of {count} heads", found=found)
        if self.importance is None and site.spec.heads and _norm(site, 0) is None:
            hint = "give importance=, one number for each head"
            expected = "known value and output projections"
            return site.refuse("unknown-projection", expected=expected, found=_why(site), hint=hint)
        return None

    def rewrite(self, site: Site) -> Rewrite:
        if self.heads is not None:
            return Rewrite(site.spec.keeping(set(site.spec.heads) - set(self.heads)))
        chosen = self._least_important(site)
        spec = site.spec.keeping(set(site.spec.heads) - set(chosen))
        if not chosen:
            return Rewrite(spec, notes=("prune-heads: the fraction is less than one head, none was removed",))
        by = "the norm of value times output weights" if self.importance is None else "the given importance"
        return Rewrite(spec, notes=(f"prune-heads: removed heads {', '.join(map(str, sorted(chosen)))} by {by}",))

    def _refuse_all(self, site: Site, heads: Sequence[int]) -> Refusal | None:
        if set(site.spec.heads) - set(heads):
            return None
        return site.refuse("all-heads", expected="at least one head to stay", found=f"all {site.num_heads} removed")

    def _least_important(self, site: Site) -> list[int]:
        present = site.spec.heads
        if self.importance is None:
            value = {h: _norm(site, place) or 0.0 for place, h in enumerate(present)}
        else:
            value = {h: self.importance[h] for h in present}
        count = int((self.fraction or 0.0) * len(present) + 1e-9)  # 0.7 * 10 is a little less than 7
        return sorted(present, key=lambda h: (value[h], -h))[:count]


def _norm(site: Site, place: int) -> float | None:
    """Frobenius norm of what the head at ``place`` does to its input: value weights times output weights times gain."""
    spec = site.spec
    value = site.head_weight("v", spec.kv_heads[spec.kv_of_head[place]])
    out = site.head_weight("out", spec.heads[place])
    if value is None or out is None:
        return None
    value, out = value.double(), out.double()
    squared = ((value @ value.mT) * (out @ out.mT)).sum()  # |V'O|^2 without the [in, out] product
    return float(squared.clamp(min=0).sqrt()) * abs(1.0 if spec.gains is None else spec.gains[place])


def _why(site: Site) -> str:
    for role in ("v", "out"):
        p = site.projections.get(role)
        if p is None or p.rows is None:
            return f"{role}: {p.why if p and p.why else 'not found'}"
    return "no weights"
