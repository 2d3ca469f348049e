"""Remove heads from an attention, and their parameters from the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from attnopt.base.options import choice, number, numbers, switch, wholes
from attnopt.errors import PolicyError
from attnopt.fit.block_obs import Surgeon
from attnopt.fit.compensation import bias_for, refitted, surgeon_of
from attnopt.fit.importance_methods import IMPORTANCE, scores_at
from attnopt.ir.constant import Constant
from attnopt.ir.head_edits import Replaced
from attnopt.ir.interfaces import Pass, Rewrite, Share, SharesBudget
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.heads import (
    BUDGETS,
    expected_projections,
    original_heads,
    refuse_edits,
    refuse_unknown_heads,
    refuse_unknown_projections,
)

COMPENSATIONS = ("none", "bias", "least-squares")


@dataclass(frozen=True)
class PruneHeads(Pass, SharesBudget):
    """Remove ``heads`` (numbers in the trained model), or the least important ``fraction`` of the remaining heads.

    ``importance``: the name of a per-site method of ``attnopt.head_importance``, one number per head of the trained
    model, or the result of ``head_importance``.  Higher means keep; ties keep the lower head.
    ``protect``: heads that are never removed.
    ``compensate``: ``"none"``; ``"bias"``: add the mean of the removed output to the output bias (FLAP,
    arXiv:2312.11983); ``"least-squares"``: fit the output projection to the original layer output (OSSCAR,
    arXiv:2403.12983).
    ``budget``: the fraction applies to each site (``"site"``) or to all sites together (``"global"``), allocated by the
    sensitivity of the model output.
    ``whole_layers``: all heads of a site may be removed; the site then outputs the same for every token, and no
    attention is computed.

    Defaults: with calibration data, block OBS, least squares and a global budget; without, the Frobenius norm of the
    value projection times the output projection of the head (times its gain), no compensation and a budget per site.  A
    fraction is rounded down to whole heads; heads that were already pruned are ignored.
    Raises PolicyError, and CalibrationError if an option needs calibration data that is missing or insufficient.
    """

    name: ClassVar[str] = "prune-heads"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    fraction: float | None = None
    heads: Sequence[int] | None = None
    importance: str | Sequence[float] | Mapping[str, Sequence[float]] | None = None
    protect: Sequence[int] = ()
    compensate: str | None = None
    budget: str | None = None
    whole_layers: bool = False

    def __post_init__(self) -> None:
        if sum(o is not None for o in (self.fraction, self.heads)) != 1:
            raise PolicyError("prune-heads: expected exactly one of fraction and heads")
        if self.fraction is not None and not 0 <= number(self.name, "fraction", self.fraction) < 1:
            raise PolicyError(
                f"prune-heads: invalid value fraction={self.fraction!r}: expected a number from 0 to below 1"
            )
        if self.heads is not None:
            object.__setattr__(self, "heads", wholes(self.name, "heads", self.heads))
        object.__setattr__(self, "protect", wholes(self.name, "protect", self.protect))
        if self.compensate is not None:
            choice(self.name, "compensate", self.compensate, COMPENSATIONS)
        if self.budget is not None:
            choice(self.name, "budget", self.budget, BUDGETS)
        switch(self.name, "whole_layers", self.whole_layers)
        if self.heads is not None and (self.importance is not None or self.budget == "global"):
            what = "importance" if self.importance is not None else "budget"
            raise PolicyError(f"prune-heads: {what} is only used with fraction; omit it or pass fraction")
        if self.importance is not None:
            object.__setattr__(self, "importance", self._scores())

    def _scores(self) -> str | tuple[float, ...] | tuple[tuple[str, tuple[float, ...]], ...]:
        """The option in comparable, serializable form: a name, numbers, or pairs of a site and its numbers."""
        given: Any = self.importance
        if isinstance(given, str):
            choice(self.name, "importance", given, tuple(IMPORTANCE.listed()))
            IMPORTANCE.load(given)
            return given
        pairs = list(given.items()) if isinstance(given, Mapping) else list(given) if _is_pairs(given) else None
        if pairs is None:
            return numbers(self.name, "importance", given)
        named = {site: scores for site, scores in pairs if isinstance(site, str)}
        if not named or len(named) < len(pairs):
            raise PolicyError(
                f"prune-heads: invalid value importance={given!r}: expected a sequence of numbers, a mapping from site "
                "names to such sequences, or the name of a method"
            )
        return tuple((site, numbers(self.name, "importance", scores)) for site, scores in named.items())

    # ------------------------------------------------------------ a budget for all sites
    @property
    def is_shared(self) -> bool:
        return self.fraction is not None and self.budget != "site"

    def total(self, sites: Sequence[Site]) -> int:
        heads = sum(site.num_heads for site in sites)
        return heads - self._removed_of(heads)

    def shares(self, site: Site) -> Mapping[int, Share]:
        if _unknown(site, ("out",)):
            return {}
        surgeon, how, found = surgeon_of(site), self._compensation(site), dict[int, Share]()
        for n, places in self._sets(site, surgeon).items():
            gone = [h for p, h in enumerate(site.spec.heads) if p not in places]
            error = surgeon.error(places, how) if gone else 0.0
            found[n] = Share(error, PruneHeads(heads=gone, compensate=self.compensate))
        if self.whole_layers and not set(self.protect) & set(site.spec.heads):
            everything = PruneHeads(heads=site.spec.heads, compensate=self.compensate, whole_layers=True)
            found[0] = Share(surgeon.error((), how), everything)
        return found

    # ------------------------------------------------------------ one site
    def check(self, site: Site) -> Refusal | None:
        routed = refuse_edits(site, [site.spec.route], "apply prune-heads before route-heads")
        unknown = routed or refuse_unknown_heads(site, (*(self.heads or ()), *self.protect))
        return unknown or self._refuse_sizes(site) or _refuse_kept(site) or self._refuse_projections(site)

    def rewrite(self, site: Site) -> Rewrite:
        if self.heads is not None:
            kept = [h for h in site.spec.heads if h not in self.heads]
            return self._keeping(site, kept, ())
        count = site.num_heads - self._removed(site)
        if count == site.num_heads:
            return Rewrite(site.spec, notes=("prune-heads: the fraction is less than one head, so none was removed",))
        if self._method(site) == "obs":
            kept, by = [site.spec.heads[p] for p in self._sets(site, surgeon_of(site), count)[count]], "block OBS"
        else:
            kept, by = self._best(site, count), self._criterion(site)
        gone = sorted(set(site.spec.heads) - set(kept))
        return self._keeping(site, kept, (f"prune-heads: removed heads {', '.join(map(str, gone))} by {by}",))

    def _keeping(self, site: Site, kept: Sequence[int], notes: tuple[str, ...]) -> Rewrite:
        if not kept:
            return self._without_any(site)
        spec = site.spec.keeping(kept)
        gone = site.num_kv_heads - spec.num_kv_heads
        if gone and site.num_kv_heads < site.num_heads:
            notes = (
                *notes,
                f"prune-heads: {gone} of {site.num_kv_heads} key/value heads removed along with all their query heads",
            )
        how = self._compensation(site)
        if how == "none" or spec == site.spec:
            return Rewrite(spec, notes=notes)
        if how == "least-squares":
            return refitted(site, spec).rewrite(self.name, notes=notes)
        made = bias_for(site, spec)
        return replace(made, notes=(*notes, *(f"prune-heads: {n}" for n in made.notes)))

    def _without_any(self, site: Site) -> Rewrite:
        last = site.spec.heads[:1]  # represents the layer, with zero output
        zeros = Replaced(last, Constant.of(torch.zeros(1, site.value_dim)), "zeros")
        spec = site.spec.keeping(last).followed_by(zeros)
        notes = ("prune-heads: every head is removed; the layer outputs the same for every token",)
        if self._compensation(site) == "none":
            return Rewrite(spec, notes=notes)
        made = bias_for(site, spec, heads=())
        return replace(made, notes=(*notes, *(f"prune-heads: {n}" for n in made.notes)))

    def _removed_of(self, heads: int) -> int:
        return int((self.fraction or 0.0) * heads + 1e-9)  # 0.7 * 10 is a little less than 7

    def _removed(self, site: Site) -> int:
        allowed = site.num_heads - max(1, len(set(self.protect) & set(site.spec.heads)))
        return min(self._removed_of(site.num_heads), allowed)

    def _method(self, site: Site) -> str:
        if isinstance(self.importance, str):
            return self.importance
        if self.importance is not None:
            return "given"
        return "obs" if site.activations is not None and not _unknown(site, ("out",)) else "weights"

    def _compensation(self, site: Site) -> str:
        if self.compensate is not None:
            return self.compensate
        return "least-squares" if site.activations is not None and not _unknown(site, ("out",)) else "none"

    def _criterion(self, site: Site) -> str:
        method = self._method(site)
        named = {"given": "the given importance", "weights": "the norm of value times output weights"}
        return named.get(method, f"the importance {method}")

    def _value(self, site: Site) -> dict[int, float]:
        """The importance of each remaining head."""
        present = site.spec.heads
        given: Any = self.importance
        if given is None or isinstance(given, str):
            return dict(zip(present, scores_at(site, self._method(site)), strict=True))
        scores = dict(given)[site.name] if _is_pairs(given) else given
        if len(scores) == len(present):
            return dict(zip(present, scores, strict=True))
        return {h: scores[h] for h in present}

    def _best(self, site: Site, count: int) -> list[int]:
        value = self._value(site)
        ranked = sorted(site.spec.heads, key=lambda h: (h in self.protect, value[h], -h), reverse=True)
        return sorted(ranked[:count])

    def _sets(self, site: Site, surgeon: Surgeon, at_least: int = 1) -> dict[int, tuple[int, ...]]:
        """For each number of heads, the positions that stay."""
        protected = [p for p, h in enumerate(site.spec.heads) if h in self.protect]
        if self._method(site) == "obs":
            return surgeon.nested(protected, max(at_least, len(protected), 1))
        counts = range(max(1, len(protected)), site.num_heads + 1)
        return {n: tuple(site.spec.heads.index(h) for h in self._best(site, n)) for n in counts}

    # ------------------------------------------------------------ refusals
    def _refuse_sizes(self, site: Site) -> Refusal | None:
        present = set(site.spec.heads)
        if self.heads is not None and not present - set(self.heads) and not self.whole_layers:
            found, hint = f"all {len(present)} heads removed", "use whole_layers=True to remove the whole attention"
            return site.refuse("all-heads", expected="at least one remaining head", found=found, hint=hint)
        given: Any = self.importance
        if given is None or isinstance(given, str):
            return None
        count = original_heads(site)
        if _is_pairs(given) and site.name not in dict(given):
            return site.refuse("no-such-site-size", expected=f"importance scores for {site.name}", found="none")
        scores = dict(given)[site.name] if _is_pairs(given) else given
        if len(scores) in ({count, len(present)} if _is_pairs(given) else {count}):
            return None
        found = f"{len(scores)} numbers"
        return site.refuse("no-such-site-size", expected=f"one importance score per head ({count})", found=found)

    def _refuse_projections(self, site: Site) -> Refusal | None:
        name = "given" if self.heads is not None else self._method(site)
        method = None if name == "given" else IMPORTANCE.load(name)
        fits, learns = self._compensation(site) != "none", method is not None and method.needs_calibration
        if (fits or learns) and site.activations is None:
            hint = "pass calibration= to attnopt.optimize"
            return site.refuse("needs-calibration", expected="calibration data", found="none", hint=hint)
        if fits:
            expected, hint = "a known output projection", 'compensate="none" and importance scores'
            return refuse_unknown_projections(site, ("out",), expected, hint)
        if method is None or not method.needs:
            return None
        hint = "importance=, one number per head"
        return refuse_unknown_projections(site, method.needs, expected_projections(method.needs), hint, direct=learns)


def _refuse_kept(site: Site) -> Refusal | None:
    """Refuse if no parameter would be removed with the heads."""
    roles = {role: p for role, p in site.projections.items() if p.keeps_size}
    if len(roles) < 4 or not site.parameters:
        return None
    return site.refuse(
        "nothing-to-remove",
        expected="weights that can be separated by head",
        found="; ".join(f"{role}: {p.why}" for role, p in roles.items()),
        hint="zero the heads with scale-heads and gains of 0 (their parameters stay)",
    )


def _is_pairs(given: Any) -> bool:
    return (
        isinstance(given, (list, tuple))
        and bool(given)
        and all(isinstance(g, (list, tuple)) and len(g) == 2 for g in given)
    )


def _unknown(site: Site, roles: Sequence[str]) -> bool:
    return refuse_unknown_projections(site, roles, "", "") is not None
