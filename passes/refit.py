"""Fit the output projection to what the layer gave in the original model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attnopt.base.options import number
from attnopt.errors import PolicyError
from attnopt.fit.compensation_methods import LeastSquares, compensated
from attnopt.fit.least_squares import RIDGES
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import expected_projections, refuse_edits, refuse_no_data, refuse_unknown_projections

MEANS = 10.0  # times as much as all tokens of a sequence counts their mean


@dataclass(frozen=True)
class Refit(Pass):
    """Fit the output projection, so that the layer gives what it gave in the original model (GPTAQ, arXiv:2504.02692).

    By least squares from the outputs of its heads in the rewritten model, whatever was changed in this layer and before it.
    Where the model adds the output to its input, what the stream has lost before is made up for, too.  The mean over a sequence
    counts ten times as much as its tokens: fitted to tokens alone, the layer gives less of everything, which adds up where
    noise averages out.  Nothing is changed that does not also help held-out tokens.  It costs no time: give it last, and also
    to attentions that stay as they are.
    Attentions that share weights are fitted together, to the original stream.  Raises CalibrationError for too few tokens.

    ``ridge``: how much keeping today's weights counts, relative to the mean square of a feature over all tokens; by default
    the best for held-out tokens of four values up to 0.1.  A larger one, such as 5 or 25, changes only what many features agree
    on: it gains less at home and loses less on other domains.
    """

    name: ClassVar[str] = "refit"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    widens: ClassVar[bool] = True
    follows: ClassVar[bool] = True
    ridge: float | None = None

    def __post_init__(self) -> None:
        if self.ridge is not None and not number(self.name, "ridge", self.ridge) >= 0.0:
            raise PolicyError(f"refit: invalid value ridge={self.ridge!r}: expected a number of at least 0")

    def check(self, site: Site) -> Refusal | None:
        joined = [e for e in site.spec.after if e.joins_heads]
        return (
            refuse_edits(site, [site.spec.route, *joined], "apply refit before heads are routed or joined")
            or refuse_no_data(site)
            or refuse_unknown_projections(site, ["out"], expected_projections(["out"]), "")
        )

    def rewrite(self, site: Site) -> Rewrite:
        ridges = RIDGES if self.ridge is None else (self.ridge,)
        made = compensated(LeastSquares(MEANS, ridges), site, site.spec)
        return replace(made, notes=tuple(f"refit: {note}" for note in made.notes))
