"""Keys and values as linear maps of a few numbers of each token, which a cache can keep in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attnopt.base.options import whole
from attnopt.errors import PolicyError
from attnopt.fit.compensation_methods import COMPENSATIONS, chosen, compensated, held_out_error
from attnopt.fit.latents import FromOneInput, latent_edits
from attnopt.ir.head_routing import Routed
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import (
    expected_projections,
    refuse_edits,
    refuse_fitted_selection,
    refuse_no_data,
    refuse_rows,
    refuse_transforms,
    refuse_transplants,
    refuse_unknown_projections,
)

ROLES = ("q", "k", "v", "out")
WEIGHTS = (1.0, 2.0, 4.0)  # of errors of keys beside those of values: held-out data choose
_EXCLUDE = "exclude the site from latent-kv"


@dataclass(frozen=True)
class LatentKv(Pass):
    """Keys and values of all heads together of rank ``rank``, fitted in closed form (as TransMLA, arXiv:2502.07864, and CARE).

    ``rank``: numbers of a token of which they are linear maps, before keys are rotated.  ``OptimizedModel.latent_decoder``
    and ``export_decoder(kv="latent")`` keep these in the place of keys and values.
    ``compensate``: "least-squares" fits the output projection to the original layer output; "none"; or the name of a registered
    ``Compensation`` for merges.  By default the former, if the output projection is known.

    A rank of at least what they have already changes nothing.  Raises PolicyError.
    """

    name: ClassVar[str] = "latent-kv"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    rank: int
    compensate: str | None = None

    def __post_init__(self) -> None:
        whole(self.name, "rank", self.rank, least=1)
        if self.compensate is not None and not COMPENSATIONS.choose(self.name, "compensate", self.compensate).merges:
            raise PolicyError(
                f"latent-kv: invalid value compensate={self.compensate!r}: it does not make up for other keys and values"
            )

    @classmethod
    def typical(cls) -> LatentKv:
        return cls(rank=1)

    def check(self, site: Site) -> Refusal | None:
        spec = site.spec
        edited = [e for e in spec.after if isinstance(e, Routed) or not e.fits_other_values]
        return (
            refuse_edits(site, edits=edited, hint="apply latent-kv before heads are routed, replaced or steered")
            or refuse_transplants(site, "apply latent-kv before transplant")
            or refuse_fitted_selection(site, "apply latent-kv before dynamic-sparse")
            or refuse_rows(site, "apply latent-kv before query-rows, whose scores read queries and keys")
            or refuse_no_data(site)
            or refuse_unknown_projections(site, ROLES, expected_projections(ROLES), "")
            or _refuse_shared_rows(site)
            or refuse_transforms(site, _EXCLUDE)
            or _refuse_two_inputs(site)
        )

    def rewrite(self, site: Site) -> Rewrite:
        kept = _numbers(site)
        if self.rank >= _most(site):
            return Rewrite(site.spec)
        fit = chosen(self.compensate, site)
        tried = [Rewrite(site.spec, latent_edits(site, self.rank, weight)) for weight in WEIGHTS]
        after = [site.edited(made) for made in tried]
        errors = [held_out_error(there, Rewrite(site.spec)) for there in after]
        best = errors.index(min(errors))
        made = tried[best].then(compensated(fit, after[best], site.spec))
        told = f"latent-kv: keys and values of a token are linear maps of {self.rank} numbers, and {kept} themselves"
        return replace(made, notes=(told, *(f"latent-kv: {note}" for note in made.notes)))


def _numbers(site: Site) -> int:
    return site.num_kv_heads * (site.head_dim + site.value_dim)


def _most(site: Site) -> int:
    """The largest rank that keys and values can have."""
    weight = site.head_weight("k", site.spec.kv_heads[0])
    assert weight is not None
    return min(_numbers(site), weight.shape[1])


def _refuse_shared_rows(site: Site) -> Refusal | None:
    """Refuse keys that are values: new ones would be both."""
    k, v = (site.projections[role] for role in "kv")
    assert k.rows is not None
    assert v.rows is not None
    if k.weight != v.weight or not {r for own in k.rows for r in own} & {r for own in v.rows for r in own}:
        return None
    expected = "keys and values from rows of their own"
    return site.refuse("shared-projection", expected=expected, found=f"rows of {k.weight} that make both")


def _refuse_two_inputs(site: Site) -> Refusal | None:
    """Refuse keys and values without common latents."""
    if FromOneInput().of(site) is not None:
        return None
    return site.refuse(
        "several-sources",
        expected="keys and values that are projected from one tensor of features",
        found="keys that are no rotated projection of what the values are projected from",
        hint=_EXCLUDE,
    )
