"""The interfaces of passes and backends, which third parties implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ClassVar, Self

from attnopt.base.input import Input
from attnopt.ir.activations import merged
from attnopt.ir.alternatives import expanded
from attnopt.ir.attend import Attend
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.site_edit import SiteEdit
from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class Rewrite(SiteEdit):
    """The result of a pass."""

    notes: tuple[str, ...] = ()  # notes for the report: which default was used, what was not saved, ...

    def then(self, other: Rewrite) -> Rewrite:
        """Both, one after the other."""
        bias = self.out_bias if other.out_bias is None else other.out_bias
        return Rewrite(other.spec, merged(self.edits, other.edits), bias, (*self.notes, *other.notes))


class Pass(ABC):
    """A rewrite of one attention.  Subclasses are frozen dataclasses whose fields are the options of the pass."""

    name: ClassVar[str]
    exact: ClassVar[bool]  # True: the model computes the same as before
    calibrates: ClassVar[bool] = False  # ``rewrite`` reads ``site.activations`` if there is calibration data
    channels: ClassVar[bool] = False  # True: it also takes attentions between channels, which are refused otherwise
    head_maps: ClassVar[bool] = False  # True: it also takes talking heads, which are refused otherwise
    linear: ClassVar[bool] = (
        False  # True: it also takes attentions without a plain softmax over keys, which are refused otherwise
    )
    follows: ClassVar[bool] = (
        False  # its calibration data pass through the model as it is rewritten before the attention
    )
    widens: ClassVar[bool] = False  # it also fits to random tokens, ``site.activations.invented``, if there are any

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """The pass; with ``Choice`` or ``FirstOf`` among its options, that of a pass for each alternative."""
        several: Any = expanded(cls, args, options)
        return super().__new__(cls) if several is None else several

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What each call of the rewritten model has to bring: by default, the options that are an ``Input``."""
        options = (getattr(self, name, None) for name in getattr(self, "__dataclass_fields__", ()))
        return tuple(x for x in options if isinstance(x, Input))

    @property
    def mentions(self) -> tuple[str, ...]:
        """Names of sites in its options, each of which has to be there."""
        return ()

    @property
    def edited_heads(self) -> tuple[int, ...]:
        """Heads of the trained model that its options name to be changed: the report says which of them were pruned before.  By
        default those of an option ``heads``."""
        named = getattr(self, "heads", None)
        return tuple(h for h in named if isinstance(h, int)) if isinstance(named, (tuple, list)) else ()

    def check(self, site: Site) -> Refusal | None:
        """Why this pass does not apply to ``site``, or None."""
        return None

    @classmethod
    def typical(cls) -> Pass | None:
        """The pass with the options under which it refuses least: ``inspect`` and ``explain`` check this one.  None if
        every answer depends on the options; by default, if an option has no default.
        """
        needed = (p.default is p.empty for p in signature(cls).parameters.values())
        return None if any(needed) else cls()

    @abstractmethod
    def rewrite(self, site: Site) -> Rewrite:
        """The new spec and weights of the site.  Only called if ``check`` returned None; must have no side effects."""


def given_to(p: Pass, site: Site) -> Site:
    """``site`` as ``p`` sees it."""
    now = site.activations
    if now is not None and p.follows and now.rewritten is not None:
        now = now.rewritten
    return replace(site, activations=now if p.widens or now is None else now.alone)


@dataclass(frozen=True)
class Share:
    """One allocation for a site: the resulting relative error of its layer, and the pass that achieves it."""

    error: float
    rewrite: Pass


class SharesBudget(ABC):
    """A pass that can allocate a number of heads over all sites instead of the same number at each site."""

    @property
    @abstractmethod
    def is_shared(self) -> bool:
        """Whether one budget covers all sites."""

    @abstractmethod
    def total(self, sites: Sequence[Site]) -> int:
        """How many heads these sites may keep in total."""

    @abstractmethod
    def shares(self, site: Site) -> Mapping[int, Share]:
        """The allocations of ``site`` by number of remaining heads; empty if unknown, and the site then has its own
        budget.
        """


class Backend(ABC):
    """A way to compute an attention.  ``lower`` returns a plain tensor function, which attnopt traces into the graph."""

    name: ClassVar[str]
    skips: ClassVar[bool] = False  # True: hidden pairs are not computed
    channels: ClassVar[bool] = (
        False  # True: ``lower`` takes attentions between channels, whose D and Dv vary from call to call
    )
    head_maps: ClassVar[bool] = False  # True: what ``lower`` returns takes ``score_map=`` and ``weight_map=``
    linear: ClassVar[bool] = False  # True: ``lower`` takes attentions without a softmax
    sends: ClassVar[bool] = False  # True: ``lower`` takes attentions whose softmax is over queries
    clamps: ClassVar[bool] = False  # True: ``lower`` takes attentions whose scores are clamped
    pools: ClassVar[bool] = False  # True: ``lower`` takes specs with pooled keys; otherwise attnopt pools for it
    zero_keys: ClassVar[bool] = False  # True: ``lower`` takes specs with zero keys; otherwise they are sinks of rows
    extends: ClassVar[bool] = (
        False  # True: what ``lower`` returns takes ``more=``; otherwise attnopt joins the keys of other tokens
    )
    weight_gains: ClassVar[bool] = False  # True: ``lower`` computes ``spec.weight_gains``; else such specs are refused
    rows: ClassVar[bool] = False  # True: ``lower`` takes specs with chosen rows; otherwise attnopt gathers them
    segments: ClassVar[bool] = False  # True: what ``lower`` returns also takes ``segments=``; otherwise attnopt masks
    gain_segments: ClassVar[bool] = (
        False  # True: it takes ``segments=``, a partition, for gains whose ids a call brings
    )
    skips_rows: bool = False  # True: ``lower`` returns a ``RoutedAttend``, which computes only the wanted rows

    def check(self, spec: AttentionSpec) -> Refusal | None:
        """Why this backend cannot compute ``spec`` exactly, or None."""
        return None

    @abstractmethod
    def lower(self, spec: AttentionSpec) -> Attend:
        """The function that computes ``spec``.  ``spec.after`` is applied to its result separately; the given spec has none,
        and no pooling, zero keys and chosen rows unless the backend says that it takes them."""

    @abstractmethod
    def cost(self, site: Site) -> float:
        """Estimated seconds of one call for a batch of one at ``site.q_len`` and ``site.kv_len``; the cheapest backend
        that accepts the spec is used.
        """

    def skips_in(self, site: Site) -> bool:
        """Whether hidden pairs of this site are not computed."""
        return self.skips

    def skipping_rows(self) -> Backend | None:
        """The same backend, computing only the rows that a route requests; None if not supported."""
        return None

    def notes(self, spec: AttentionSpec) -> tuple[str, ...]:
        """What the report should say about this lowering."""
        return ()
