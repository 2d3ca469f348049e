"""The result of a search: a policy, the front of policies by cost, and the way to the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from attnopt.compiler.policy import Policy
from attnopt.errors import SearchError
from attnopt.model import OptimizedModel
from attnopt.report.policy_search import SearchReport


@dataclass(frozen=True)
class FrontPoint:
    """The best policy that costs no more than this: its costs by resource, and how far the model diverges with it."""

    costs: Mapping[str, float]
    divergence: float
    policy: Policy


@dataclass(frozen=True)
class Search:
    """``front``: by increasing cost of the budget's first resource; each diverges less than those before.

    ``report`` prints as a table, and has ``to_json`` and ``to_html``.
    """

    report: SearchReport
    front: tuple[FrontPoint, ...]
    found: Policy | None = field(repr=False)
    build: Callable[[Policy], OptimizedModel] = field(repr=False, compare=False)

    @property
    def policy(self) -> Policy:
        """The policy that was found.  Raises SearchError if the search ended before it judged one that meets the budget."""
        if self.found is None:
            raise SearchError("search: no policy within the budget was judged before the search ended")
        return self.found

    @property
    def divergence(self) -> float:
        """Of that policy, on what candidates were judged on."""
        return float("nan") if self.report.best is None else self.report.best.divergence

    def optimize(self, policy: Policy | None = None) -> OptimizedModel:
        """The model with that policy, or another one of the front, fitted to all of the calibration data and verified."""
        return self.build(self.policy if policy is None else policy)

    def __str__(self) -> str:
        return str(self.report)
