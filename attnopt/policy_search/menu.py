"""What can be chosen at each place of a model, and what it costs: numbers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from attnopt.errors import PolicyError
from attnopt.policy_search.budget import UNITS

Picks = tuple[int, ...]  # of each place, the number of an alternative
Limits = Mapping[str, float]
Table = Sequence[Sequence[float]]  # by place and alternative
ROOM = 1e-9  # of a limit: sums of costs are rounded


@dataclass(frozen=True)
class Menu:
    """``original``: the cost of the unchanged model by resource.  ``changes``: by resource, place and alternative, how much
    the cost grows with it.  ``allowed``: by place the alternatives that may be chosen; number 0 always leaves it as it is."""

    original: Mapping[str, float]
    changes: Mapping[str, tuple[tuple[float, ...], ...]]
    allowed: tuple[tuple[int, ...], ...]

    @property
    def places(self) -> int:
        return len(self.allowed)

    @property
    def count(self) -> int:
        """How many picks there are."""
        return prod(map(len, self.allowed))

    def cost(self, resource: str, picks: Picks) -> float:
        return self.original[resource] + sum(t[a] for t, a in zip(self.changes[resource], picks, strict=True))

    def costs(self, picks: Picks) -> dict[str, float]:
        return {resource: self.cost(resource, picks) for resource in self.original}

    def fits(self, picks: Picks, limits: Limits) -> bool:
        return all(self.cost(r, picks) <= most + ROOM * abs(self.original[r]) for r, most in limits.items())

    def least(self, resource: str) -> float:
        """The cost of what is cheapest everywhere."""
        table = self.changes[resource]
        return self.original[resource] + sum(min(t[a] for a in own) for t, own in zip(table, self.allowed, strict=True))

    def every(self) -> Iterator[Picks]:
        yield from product(*self.allowed)

    def require(self, limits: Limits) -> None:
        """Raises PolicyError for a limit that nothing meets, which names the least possible."""
        for resource, most in limits.items():
            least, original = self.least(resource), self.original[resource]
            if least > most + ROOM * abs(original):
                raise PolicyError(
                    f"search: no policy of these choices has {resource} of at most {shown(resource, most, original)}; "
                    f"the least possible is {shown(resource, least, original)}",
                    hint="raise the budget, or add cheaper choices",
                )


def shown(resource: str, amount: float, original: float) -> str:
    """An amount with its share of the original's."""
    share = f" ({amount / original:.3g} of the original)" if original else ""
    return f"{amount:.4g} {UNITS[resource]}{share}"
