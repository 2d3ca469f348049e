"""Remove heads from an attention, and their parameters from the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from attnopt.base.options import choice, number, switch, wholes
from attnopt.errors import PolicyError
from attnopt.fit.compensation_methods import COMPENSATIONS, chosen, compensated, error_without
from attnopt.fit.importance_methods import KIND, Given, Obs, Weights, best_heads, importance, plain_scores, reads_back
from attnopt.ir.constant import Constant
from attnopt.ir.head_edits import Replaced
from attnopt.ir.importance import Importance, ModelImportance
from attnopt.ir.interfaces import Pass, Rewrite, Share, SharesBudget
from attnopt.ir.plugin_calls import check_part
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.statistic import Statistic
from attnopt.passes.preconditions import (
    BUDGETS,
    expected_projections,
    refuse_edits,
    refuse_no_data,
    refuse_unknown_heads,
    refuse_unknown_projections,
)


@dataclass(frozen=True)
class PruneHeads(Pass, SharesBudget):
    """Remove ``heads`` (numbers in the trained model), or the least important ``fraction`` of the remaining heads.

    ``importance``: the name of a registered ``Importance`` of one site, with options as in ``"distance(grid=(14, 14))"``; an
    ``Importance``; a ``Statistic`` of one number per head; one number per head of the trained model; or the result of
    ``head_importance``.  Higher means keep; ties keep the lower head.
    ``protect``: heads that ``fraction`` never removes, at every site, or by the name of the site.
    ``compensate``: ``"none"``; ``"bias"``: add the mean of the removed output to the output bias (FLAP,
    arXiv:2312.11983); ``"least-squares"``: fit the output projection to the original layer output (OSSCAR,
    arXiv:2403.12983); or the name of a registered ``Compensation``.
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
    channels: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True
    fraction: float | None = None
    heads: Sequence[int] | None = None
    importance: str | Importance | Statistic[Any] | Sequence[float] | Mapping[str, Sequence[float]] | None = None
    protect: Sequence[int] | Mapping[str, Sequence[int]] = ()
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
        object.__setattr__(self, "protect", self._read_protect(self.protect))
        if self.compensate is not None:
            COMPENSATIONS.choose(self.name, "compensate", self.compensate)
        if self.budget is not None:
            choice(self.name, "budget", self.budget, BUDGETS)
        switch(self.name, "whole_layers", self.whole_layers)
        unused = {"importance": self.importance is not None, "protect": self.protect, "budget": self.budget == "global"}
        if self.heads is not None and any(unused.values()):
            what = next(name for name, given in unused.items() if given)
            raise PolicyError(f"prune-heads: {what} is only used with fraction; omit it or pass fraction")
        object.__setattr__(self, "importance", self._read_importance(self.importance))

    def _read_importance(self, given: Any) -> object:
        """In comparable and serializable form.  Raises PolicyError."""
        if given is None:
            return None
        if not isinstance(given, (str, Importance, Statistic)):
            return plain_scores(self.name, given)
        how = importance(self.name, "importance", given)
        if isinstance(how, ModelImportance):
            raise PolicyError(
                f"prune-heads: importance={how.name!r} needs the whole model, and a pass sees one site",
                hint="pass importance=attnopt.head_importance(model, data, ...)",
            )
        return how.to_json() if isinstance(given, str) or reads_back(how) else how

    def _read_protect(self, given: Any) -> tuple[Any, ...]:
        """Numbers, or pairs of a site and its numbers."""
        pairs = list(given.items()) if isinstance(given, Mapping) else given
        if not isinstance(given, Mapping) and not (isinstance(given, (list, tuple)) and all(map(_is_pair, given))):
            return wholes(self.name, "protect", given)
        if not all(map(_is_pair, pairs)):
            raise PolicyError(f"{self.name}: invalid value protect={given!r}: expected heads by names of sites")
        return tuple((site, wholes(self.name, "protect", heads)) for site, heads in pairs)

    @property
    def edited_heads(self) -> tuple[int, ...]:
        return ()  # to remove what is gone is done already

    @property
    def mentions(self) -> tuple[str, ...]:
        return tuple(self._protected_at)

    @property
    def _protected_at(self) -> dict[str, tuple[int, ...]]:
        """By site; empty where the same heads are protected at all sites."""
        read: Any = self.protect
        return {one[0]: one[1] for one in read if isinstance(one, tuple)}

    def _protected(self, site: Site) -> tuple[int, ...]:
        if self._protected_at:
            return self._protected_at.get(site.name, ())
        return tuple(one for one in self.protect if isinstance(one, int))

    # ------------------------------------------------------------ a budget for all sites
    @property
    def is_shared(self) -> bool:
        return self.fraction is not None and self.budget != "site"

    def total(self, sites: Sequence[Site]) -> int:
        heads = sum(site.num_heads for site in sites)
        return heads - self._removed_of(heads)

    def shares(self, site: Site) -> Mapping[int, Share]:
        if not site.knows("out") or not site.spec.has_own_maps:
            return {}
        how, found = chosen(self.compensate, site), dict[int, Share]()
        protected = set(self._protected(site)) & set(site.spec.heads)
        counts = range(max(1, len(protected)), site.num_heads + 1)
        for n, kept in best_heads(self._importance(site), site, counts, self._protected(site)).items():
            gone = [h for h in site.spec.heads if h not in kept]
            error = error_without(how, site, site.spec.keeping(kept)) if gone else 0.0
            found[n] = Share(error, PruneHeads(heads=gone, compensate=self.compensate))
        if self.whole_layers and not protected:
            everything = PruneHeads(heads=site.spec.heads, compensate=self.compensate, whole_layers=True)
            found[0] = Share(error_without(how, site, _silenced(site)), everything)
        return found

    # ------------------------------------------------------------ one site
    @classmethod
    def typical(cls) -> None:
        return None  # there is nothing to prune by default

    def check(self, site: Site) -> Refusal | None:
        routed = refuse_edits(site, [site.spec.route], "apply prune-heads before route-heads")
        routed = routed or refuse_edits(
            site, [e for e in site.spec.after if e.joins_heads], "let prune-heads come first"
        )
        unknown = routed or refuse_unknown_heads(site, (*(self.heads or ()), *self._protected(site)))
        return unknown or self._refuse_sizes(site) or _refuse_kept(site) or self._refuse_parts(site)

    def rewrite(self, site: Site) -> Rewrite:
        if self.heads is not None:
            return self._keeping(site, [h for h in site.spec.heads if h not in self.heads], ())
        count = site.num_heads - self._removed(site)
        if count == site.num_heads:
            return Rewrite(site.spec, notes=("prune-heads: the fraction is less than one head, so none was removed",))
        how = self._importance(site)
        kept = best_heads(how, site, [count], self._protected(site))[count]
        gone = ", ".join(str(h) for h in site.spec.heads if h not in kept)
        return self._keeping(site, kept, (f"prune-heads: removed heads {gone} by {how.told}",))

    def _keeping(self, site: Site, kept: Sequence[int], notes: tuple[str, ...]) -> Rewrite:
        if not kept:
            told = "prune-heads: every head is removed; the layer outputs the same for every token"
            return self._compensated(Rewrite(_silenced(site), notes=(told,)), site)
        spec = site.spec.keeping(kept)
        gone = site.num_kv_heads - spec.num_kv_heads
        if gone and site.num_kv_heads < site.num_heads:
            told = f"{gone} of {site.num_kv_heads} key/value heads removed along with all their query heads"
            notes = (*notes, f"prune-heads: {told}")
        made = Rewrite(spec, notes=notes)
        return made if spec == site.spec else self._compensated(made, site)

    def _compensated(self, made: Rewrite, site: Site) -> Rewrite:
        fit = compensated(chosen(self.compensate, site), site, made.spec)
        return made.then(replace(fit, notes=tuple(f"prune-heads: {note}" for note in fit.notes)))

    def _removed_of(self, heads: int) -> int:
        return int((self.fraction or 0.0) * heads + 1e-9)  # 0.7 * 10 is a little less than 7

    def _removed(self, site: Site) -> int:
        allowed = site.num_heads - max(1, len(set(self._protected(site)) & set(site.spec.heads)))
        return min(self._removed_of(site.num_heads), allowed)

    # ------------------------------------------------------------ choices
    def _importance(self, site: Site) -> Importance:
        if isinstance(self.importance, (str, Importance)):
            return importance(self.name, "importance", self.importance)
        if self.importance is not None:
            return Given.of(self.importance)
        return Obs() if site.activations is not None and site.knows("out") else Weights()

    # ------------------------------------------------------------ refusals
    def _refuse_sizes(self, site: Site) -> Refusal | None:
        present = set(site.spec.heads)
        if self.whole_layers and site.spec.between_channels:
            found = "heads between channels, whose outputs are as long as the sequence of a call"
            hint = "set whole_layers=False, or zero the heads with scale-heads and gains of 0"
            return site.refuse("between-channels", expected="head outputs of one size", found=found, hint=hint)
        if self.heads is not None and not present - set(self.heads) and not self.whole_layers:
            found, hint = f"all {len(present)} heads removed", "use whole_layers=True to remove the whole attention"
            return site.refuse("all-heads", expected="at least one remaining head", found=found, hint=hint)
        return None

    def _refuse_parts(self, site: Site) -> Refusal | None:
        fit, how = chosen(self.compensate, site), None if self.heads is not None else self._importance(site)
        refused = None if how is None else check_part(how, KIND, site)
        if (refused := refused or check_part(fit, COMPENSATIONS.kind, site)) is not None:
            return refused
        learns = how is not None and how.needs_calibration
        if (fit.needs_calibration or learns) and (refused := refuse_no_data(site)) is not None:
            return refused
        hint = 'compensate="none" and importance scores'
        refused = refuse_unknown_projections(site, fit.needs, expected_projections(fit.needs), hint)
        if refused is not None or how is None:
            return refused
        hint = "importance=, one number per head"
        return refuse_unknown_projections(site, how.needs, expected_projections(how.needs), hint, direct=learns)


def _is_pair(given: object) -> bool:
    return isinstance(given, (list, tuple)) and len(given) == 2 and isinstance(given[0], str)


def _silenced(site: Site) -> AttentionSpec:
    """Its first head alone, with zero output: represents a layer without heads."""
    last = site.spec.heads[:1]
    return site.spec.keeping(last).followed_by(Replaced(last, Constant.of(torch.zeros(1, site.value_dim)), "zeros"))


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
