"""What a pass and a backend are: the two things that a third party writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import ClassVar

from attnopt.ir.attend import Attend
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.site_edit import SiteEdit
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class Rewrite(SiteEdit):
    """What a pass makes of a site."""

    notes: tuple[str, ...] = ()  # what the report should tell: which default was taken, what was not saved, ...


class Pass(ABC):
    """A rewrite of one attention.  Subclasses are frozen dataclasses whose fields are the pass's options."""

    name: ClassVar[str]
    exact: ClassVar[bool]  # True: the model computes the same as before
    calibrates: ClassVar[bool] = False  # ``rewrite`` reads ``site.activations`` where calibration data are given

    def check(self, site: Site) -> Refusal | None:
        """Why this pass cannot be applied to ``site``, or None."""
        return None

    @classmethod
    def typical(cls) -> Pass | None:
        """The pass with options under which it refuses no more than it has to: ``inspect`` and ``explain`` ask this one.
        None where every answer depends on the options, which is so by default where one has no default."""
        needed = (p.default is p.empty for p in signature(cls).parameters.values())
        return None if any(needed) else cls()

    @abstractmethod
    def rewrite(self, site: Site) -> Rewrite:
        """The site's new meaning.  Called only where ``check`` returned None; must not change anything."""


@dataclass(frozen=True)
class Share:
    """What one site can have of a budget: the relative error of its layer then, and the pass that does it."""

    error: float
    rewrite: Pass


class SharesBudget(ABC):
    """A pass that may spend a number of heads where they are worth most, instead of the same number at each site."""

    @property
    @abstractmethod
    def is_shared(self) -> bool:
        """Whether the budget is one for all sites."""

    @abstractmethod
    def total(self, sites: Sequence[Site]) -> int:
        """How many heads these sites may keep altogether."""

    @abstractmethod
    def shares(self, site: Site) -> Mapping[int, Share]:
        """By the number of heads that ``site`` can be left with; empty where that cannot be told, and the site then has
        its own budget."""


class Backend(ABC):
    """A way to compute an attention.  ``lower`` returns a plain tensor function, which attnopt traces into the graph."""

    name: ClassVar[str]
    skips: ClassVar[bool] = False  # True: what a pattern hides is not computed
    skips_rows: bool = False  # True: ``lower`` gives a ``RoutedAttend``, which computes no more rows than are wanted

    def check(self, spec: AttentionSpec) -> Refusal | None:
        """Why this backend cannot compute ``spec`` exactly, or None."""
        return None

    @abstractmethod
    def lower(self, spec: AttentionSpec) -> Attend:
        """The function that computes ``spec``; gains included.  What is in ``spec.after`` is done to what it returns, and
        the spec that it is given has none."""

    @abstractmethod
    def cost(self, site: Site) -> float:
        """Seconds of one call for a batch of one at ``site.q_len`` and ``site.kv_len``, as far as that can be told; of the
        backends that accept the spec, the cheapest is taken."""

    def skipping_rows(self) -> Backend | None:
        """The same backend, computing only the rows that a route asks for; None where it cannot."""
        return None

    def notes(self, spec: AttentionSpec) -> tuple[str, ...]:
        """What the report should tell of this lowering."""
        return ()
