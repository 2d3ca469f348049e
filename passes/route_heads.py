"""Let each token use only some of the heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from attnopt.base.options import choice, whole, wholes
from attnopt.errors import PolicyError
from attnopt.fit.importance_methods import OutputNorm, scored
from attnopt.fit.router import fitted_gates, fitted_router, used_share
from attnopt.ir.head_routing import Routed
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import refuse_edits, refuse_no_data, refuse_unknown_heads, refuse_unknown_projections

ROUTERS = ("query-norm", "linear")
WEIGHTS = ("hard", "soft")


@dataclass(frozen=True)
class RouteHeads(Pass):
    """Each token uses the ``shared`` heads and ``routed`` of the others (MoH, arXiv:2410.11842).

    The outputs of its unused heads are zero.

    ``shared``: head numbers, or how many: those with the largest outputs on the calibration data.
    ``router``: "query-norm": the heads with the largest query norm, needs no data; "linear": scores linear in the
    queries of all heads, fitted by least squares to the output norm of each head on the calibration data.  Ties go to
    the first head.
    ``weights``: "hard": a head is either used or not; "soft": used heads are weighted as in MoH, by a softmax of the scores of a
    linear router and a factor each for shared and routed heads, which are fitted to the output of all heads on the calibration
    data; the softmax only where it comes nearer on tokens that are held out.  Unlike in MoH, nothing is trained.  Heads that were
    already pruned are ignored.  Raises PolicyError, and CalibrationError if there are fewer calibration
    tokens than query features.
    """

    name: ClassVar[str] = "route-heads"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    shared: Sequence[int] | int = ()
    routed: int = 1
    router: str = "query-norm"
    weights: str = "hard"

    def __post_init__(self) -> None:
        is_count = isinstance(self.shared, int)
        shared = whole(self.name, "shared", self.shared) if is_count else wholes(self.name, "shared", self.shared)
        object.__setattr__(self, "shared", shared)
        whole(self.name, "routed", self.routed)
        choice(self.name, "router", self.router, ROUTERS)
        choice(self.name, "weights", self.weights, WEIGHTS)
        if self.weights == "soft" and self.router != "linear":
            raise PolicyError(
                f"{self.name}: weights='soft' needs scores that say how much a head gives", hint="use router='linear'"
            )
        if not shared and not self.routed:
            raise PolicyError(
                f"{self.name}: shared={self.shared!r} and routed=0 leave no head; set at least one of them"
            )

    def check(self, site: Site) -> Refusal | None:
        numbers = () if isinstance(self.shared, int) else self.shared
        refused = refuse_edits(site, [site.spec.route], "apply route-heads only once per site")
        refused = refused or refuse_unknown_heads(site, numbers)
        if refused is not None:
            return refused
        if not self.routed and not isinstance(self.shared, int) and not {*numbers} & {*site.spec.heads}:
            return site.refuse(
                "all-heads", expected="at least one remaining head", found="all shared heads already removed"
            )
        if not self._learns:
            return None
        hint = 'pass calibration= to attnopt.optimize, or list the shared heads and use router="query-norm"'
        give = 'a list of shared heads and router="query-norm"'
        return refuse_no_data(site, hint) or refuse_unknown_projections(
            site, ("out",), "a known output projection", give
        )

    def rewrite(self, site: Site) -> Rewrite:
        shared = self._shared(site)
        others = tuple(h for h in site.spec.heads if h not in shared)
        if self.routed >= len(others):
            return Rewrite(site.spec, notes=("route-heads: every token uses every head",))
        router = fitted_router(site, others) if self.router == "linear" and self.routed else None
        route = Routed(shared, others, self.routed, router)
        if self.weights == "soft" and router is not None:
            route = replace(route, soft=fitted_gates(site, route))
        return Rewrite(site.spec.followed_by(route), notes=_told(site, route))

    @property
    def _learns(self) -> bool:
        return self.router == "linear" or (isinstance(self.shared, int) and self.shared > 0)

    def _shared(self, site: Site) -> tuple[int, ...]:
        if not isinstance(self.shared, int):
            return tuple(h for h in site.spec.heads if h in self.shared)
        if not self.shared:
            return ()
        norms = dict(zip(site.spec.heads, scored(OutputNorm(), site), strict=True))
        ranked = sorted(norms, key=lambda h: (-norms[h], h))
        return tuple(sorted(ranked[: self.shared]))


def _told(site: Site, route: Routed) -> tuple[str, ...]:
    if site.activations is None or not site.knows("out"):
        return ()
    share = used_share(site, route)
    return (f"route-heads: the used heads carry {share:.1%} of the output norm on held-out data",)
