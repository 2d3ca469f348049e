"""The algebra of patterns: what a pattern is, and how patterns are combined and assigned to heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import groupby
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnopt.base.display import shown
from attnopt.base.intervals import Reach
from attnopt.errors import PluginError, PolicyError
from attnopt.patterns.bands import Band, Bands, intersection, union
from attnopt.patterns.block_layout import Layout, count, count_blind, layout
from attnopt.patterns.lookback import Past, widest


class Pattern(ABC):
    """A frozen, hashable set of visible (query, key) pairs; combined with ``&``, ``|`` and ``~``.

    Query i of L is at position ``i + S - L``: the last query is aligned with the last of the S keys.  A new pattern is
    a dataclass (``frozen=True, repr=False``) that defines ``visible`` and, if it can, ``reach``, ``is_causal``,
    ``look_back``, ``bands`` and ``neighbours``, whose defaults are correct for any pattern, and ``at_length`` if it depends
    on where the sequence ends, or a part of it may.  ``attnopt.register`` makes its name known to texts and saved models.
    """

    @abstractmethod
    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """Bool, for query positions ``i`` and key positions ``j`` that broadcast against each other: [L, 1] and [1, S]
        for a whole mask, [n, b, 1] and [n, 1, c] for n blocks.  Use only tensor comparisons, so it can be traced."""

    def at_length(self, kv_len: int) -> Pattern:
        """The pattern in a sequence of this length: only of that can ``visible`` be asked, if it depends on the length."""
        return self

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        """What the queries at positions ``first`` to ``last`` see; a tighter answer means less work."""
        return Reach.between(0, kv_len, 0, 0)

    def beyond(self, i: Tensor, kv_len: int) -> Tensor | None:
        """For the queries at positions ``i``, how many keys of their windows lie beyond the edges of the sequence or grid; None
        if these are no windows that are clipped there."""
        return None

    def order(self, q_len: int) -> NDArray[np.int64] | None:
        """A query order in which neighbours see similar keys; None if the natural order is good."""
        return next((found for p in self.parts if (found := p.order(q_len)) is not None), None)

    @property
    def look_back(self) -> Past | None:
        """What later queries can see of earlier tokens; None: possibly all of it."""
        return None

    @property
    def bands(self) -> Bands | None:
        """The same pairs as bands, none inside another; None if they are not a few bands."""
        return None

    def neighbours(self, tile: tuple[int, ...]) -> Iterator[Pattern]:
        """Variants with one window changed so that it may fit tiles better; no window shrinks."""
        return iter(())

    def box(self, tile: int | Sequence[int] | None) -> tuple[int, ...] | None:
        """The tile of a kernel with box-shaped tiles, by default of 64 tokens; None without a grid."""
        return None

    def box_share(self, box: tuple[int, ...]) -> float:
        """The fraction of all pairs that a kernel with such tiles computes."""
        return 1.0

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The operand patterns."""
        return ()

    def leaves(self) -> Iterator[Pattern]:
        """The named patterns inside, including itself; combinations have no names."""
        if not isinstance(self, (_Joined, Not)):
            yield self
        for part in self.parts:
            yield from part.leaves()

    @property
    def lengths(self) -> range | None:
        """The sequence lengths that the pattern was built for; None for any."""
        made_for = [lengths for p in self.parts if (lengths := p.lengths) is not None]
        return reduce(_overlap, made_for) if made_for else None

    @property
    def is_causal(self) -> bool:
        """No query sees a later key, as far as the structure shows; False may also mean unknown."""
        return False

    @property
    def is_positional(self) -> bool:
        """Compares positions of queries and keys, so both must belong to the same sequence."""
        return any(p.is_positional for p in self.parts) if self.parts else True

    @property
    def reads_length(self) -> bool:
        """What a query sees depends on where the sequence ends, so it changes as tokens are appended."""
        return any(p.reads_length for p in self.parts)

    @property
    def is_per_head(self) -> bool:
        """Heads may see different keys: there is a ``PerHead`` inside."""
        return any(p.is_per_head for p in self.parts)

    @property
    def named_heads(self) -> int:
        """The highest head position named inside, plus one; 0 if none is named."""
        return max((p.named_heads for p in self.parts), default=0)

    def for_head(self, place: int) -> Pattern:
        """The pattern of the head at this position, without ``PerHead``."""
        return self

    def for_heads(self, places: Sequence[int]) -> Pattern:
        """The pattern restricted to these head positions, renumbered in the given order."""
        return self

    def visible_pairs(self, i: Tensor, j: Tensor) -> Tensor:
        """``visible`` at the broadcast size of ``i`` and ``j``.  Raises PluginError if it does not return a bool
        tensor.
        """
        made = self.visible(i, j)
        if not isinstance(made, Tensor) or made.dtype != torch.bool:
            got = made.dtype if isinstance(made, Tensor) else type(made).__name__
            raise PluginError(f"pattern {self!r}: visible returned {got}, expected a bool tensor")
        if made.dim() == i.dim() and all(map(_is_full, made.shape, i.shape, j.shape)):
            return made
        return made & (i == i) & (j == j)

    def mask(
        self,
        q_len: int,
        kv_len: int,
        *,
        num_heads: int | None = None,
        device: torch.device | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Bool [1, q_len, kv_len], or [H, q_len, kv_len] if ``is_per_head``; True means visible.

        H is ``num_heads`` or else ``named_heads``; fewer than ``named_heads`` raise PolicyError.  SymInt lengths work.
        ``rows``: only of these queries, in their order; no other row is computed.
        """
        i = (torch.arange(q_len, device=device) if rows is None else rows).unsqueeze(1) + (kv_len - q_len)
        j = torch.arange(kv_len, device=device).unsqueeze(0)
        if not self.is_per_head:
            return self.at_length(kv_len).visible_pairs(i, j).unsqueeze(0)
        runs = [(p, len(list(run))) for p, run in groupby(self._heads(num_heads))]
        masks = {p: p.at_length(kv_len).visible_pairs(i, j).unsqueeze(0) for p, _ in runs}
        return torch.cat([masks[p].expand(n, -1, -1) for p, n in runs])

    def density(self, q_len: int, kv_len: int, *, num_heads: int | None = None) -> float:
        """The exact fraction of visible pairs, 0 to 1, averaged over the heads (see ``mask``)."""
        heads = self._heads(num_heads)
        seen = {p: count(p, q_len, kv_len) for p in set(heads)}
        return sum(seen[p] for p in heads) / (max(1, q_len * kv_len) * len(heads))

    def covers(self, q_len: int, kv_len: int, *, num_heads: int | None = None) -> bool:
        """Every query of every head sees every key; without ``num_heads``, also in heads beyond the named ones."""
        heads = self._heads(self.named_heads + 1 if num_heads is None else num_heads)
        return all(count(p, q_len, kv_len) == q_len * kv_len for p in set(heads))

    def blind(self, q_len: int, kv_len: int, *, num_heads: int | None = None) -> tuple[int, ...]:
        """For each head (see ``mask``), the number of fully masked queries; their output is zero."""
        return tuple(count_blind(p, q_len, kv_len) for p in self._heads(num_heads))

    def layout(self, q_len: int, kv_len: int, block_q: int = 64, block_kv: int = 64) -> Layout:
        """The visited blocks, without the dense mask; use ``for_head(h)`` if the pattern is per head."""
        return layout(self, q_len, kv_len, block_q, block_kv)

    def to_json(self) -> str:
        """The notation that ``attnopt.patterns.parse`` reads back."""
        return repr(self)

    def __and__(self, other: Pattern) -> Pattern:
        return all_of((self, other)) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        return any_of((self, other)) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        return Not(self)

    def __repr__(self) -> str:
        values = {f.name: repr(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        named = values.values() if len(values) == 1 else [f"{name}={value}" for name, value in values.items()]
        return f"{type(self).__name__}({', '.join(named)})"

    def _repr_html_(self) -> str:
        return shown(self, "html")

    def _heads(self, num_heads: int | None) -> list[Pattern]:
        if not self.is_per_head:
            return [self]
        if num_heads is not None and num_heads < self.named_heads:
            raise PolicyError(f"{self} names head {self.named_heads - 1}, but there are only {num_heads} heads")
        return [self.for_head(h) for h in range(max(1, self.named_heads) if num_heads is None else num_heads)]


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    """Every query sees every key."""

    @property
    def is_positional(self) -> bool:
        return False

    @property
    def bands(self) -> Bands:
        return (Band(),)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i == i) & (j == j)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return Reach.between(0, kv_len, 0, kv_len)

    def beyond(self, i: Tensor, kv_len: int) -> Tensor:
        return torch.zeros_like(i)


FULL = Full()


@dataclass(frozen=True, repr=False)
class _Joined(Pattern):
    """A flat combination of distinct patterns, built by ``&`` and ``|``."""

    joined: tuple[Pattern, ...]
    sign: ClassVar[str]

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self.joined

    @staticmethod
    @abstractmethod
    def join(parts: Iterable[Pattern]) -> Pattern:
        """What the sign means."""

    def neighbours(self, tile: tuple[int, ...]) -> Iterator[Pattern]:
        for place, part in enumerate(self.joined):
            for changed in part.neighbours(tile):
                yield self.join((*self.joined[:place], changed, *self.joined[place + 1 :]))

    def for_head(self, place: int) -> Pattern:
        return self.join(p.for_head(place) for p in self.joined)

    def for_heads(self, places: Sequence[int]) -> Pattern:
        return self.join(p.for_heads(places) for p in self.joined)

    def at_length(self, kv_len: int) -> Pattern:
        return self.join(p.at_length(kv_len) for p in self.joined)

    def __repr__(self) -> str:
        return f" {self.sign} ".join(f"({p!r})" if isinstance(p, _Joined) else repr(p) for p in self.joined)


@dataclass(frozen=True, repr=False)
class And(_Joined):
    """Visible in every operand; written ``a & b``."""

    sign: ClassVar[str] = "&"

    @staticmethod
    def join(parts: Iterable[Pattern]) -> Pattern:
        return all_of(parts)

    @property
    def look_back(self) -> Past | None:
        return widest(p.look_back for p in self.joined if not _hides_later_keys_alone(p))

    @property
    def bands(self) -> Bands | None:
        return intersection(p.bands for p in self.joined)

    @property
    def is_causal(self) -> bool:
        return any(p.is_causal for p in self.joined)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return reduce(Tensor.__and__, (p.visible(i, j) for p in self.joined))

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return reduce(Reach.__and__, (p.reach(first, last, kv_len) for p in self.joined))


@dataclass(frozen=True, repr=False)
class Or(_Joined):
    """Visible in at least one operand; written ``a | b``."""

    sign: ClassVar[str] = "|"

    @staticmethod
    def join(parts: Iterable[Pattern]) -> Pattern:
        return any_of(parts)

    @property
    def look_back(self) -> Past | None:
        return widest(p.look_back for p in self.joined)

    @property
    def bands(self) -> Bands | None:
        return union(p.bands for p in self.joined)

    @property
    def is_causal(self) -> bool:
        return all(p.is_causal for p in self.joined)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return reduce(Tensor.__or__, (p.visible(i, j) for p in self.joined))

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return reduce(Reach.__or__, (p.reach(first, last, kv_len) for p in self.joined))


@dataclass(frozen=True, repr=False)
class Not(Pattern):
    """The complement; written ``~a``."""

    inner: Pattern

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return (self.inner,)

    def for_head(self, place: int) -> Pattern:
        return ~self.inner.for_head(place)

    def for_heads(self, places: Sequence[int]) -> Pattern:
        return ~self.inner.for_heads(places)

    def at_length(self, kv_len: int) -> Pattern:
        return ~self.inner.at_length(kv_len)

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return ~self.inner.visible(i, j)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        return self.inner.reach(first, last, kv_len).outside(kv_len)

    def __invert__(self) -> Pattern:
        return self.inner

    def __repr__(self) -> str:
        return f"~({self.inner!r})" if isinstance(self.inner, _Joined) else f"~{self.inner!r}"


def all_of(patterns: Iterable[Pattern]) -> Pattern:
    """The conjunction: flat, each operand once, without ``Full``."""
    flat = _flat(And, patterns)
    parts = tuple(p for p in flat if p != Full())
    return And(parts) if len(parts) > 1 else next(iter(parts), Full())


def any_of(patterns: Iterable[Pattern]) -> Pattern:
    """The disjunction: flat, each operand once; ``Full`` if any operand is (``patterns`` must not be empty)."""
    parts = _flat(Or, patterns)
    if Full() in parts:
        return Full()
    return Or(parts) if len(parts) > 1 else parts[0]


def _is_full(made: object, of_queries: object, of_keys: object) -> bool:
    """The size is not broadcast, if it is a number."""
    is_one = [isinstance(size, int) and size == 1 for size in (made, of_queries, of_keys)]
    return not is_one[0] or all(is_one)


def _hides_later_keys_alone(p: Pattern) -> bool:
    return p.bands is not None and all(band == Band(high=band.high) for band in p.bands)


def _overlap(a: range, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _flat(kind: type[_Joined], patterns: Iterable[Pattern]) -> tuple[Pattern, ...]:
    flat: dict[Pattern, None] = {}
    for p in patterns:
        try:
            flat.update(dict.fromkeys(p.parts if isinstance(p, kind) else (p,)))
        except TypeError as e:
            raise PluginError(f"pattern {p!r}: {e}", hint="make it a dataclass(frozen=True, repr=False)") from e
    return tuple(flat)
