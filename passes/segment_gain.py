"""Multiply the attention that chosen keys receive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any, ClassVar, get_args

from attnopt.base.input import Input
from attnopt.base.options import number
from attnopt.errors import PolicyError
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.weight_gains import Normalise, Part, WeightGains
from attnopt.passes.preconditions import (
    HINT_IDS,
    distinct_heads,
    note_absent_tokens,
    refuse_causal_pools,
    refuse_extended,
    refuse_other_keys,
    refuse_other_lengths,
    refuse_pooled,
    refuse_rows,
    refuse_segmented,
    refuse_unfit_inputs,
    refuse_unknown_heads,
)
from attnopt.patterns import Keys, Pattern, PerHead, Segments, parse
from attnopt.patterns.algebra import any_of

LARGEST = 1e6
_CONDITIONS = ("mass", "share")


@dataclass(frozen=True, init=False)
class SegmentGain(Pass):
    """Multiply attention weights by the segment of their keys, without ever holding a map of weights.

    ``segments``: key positions (a range, integers, or a text such as "5-580"), a pattern, or a list of these, of which the
    first that holds a pair counts.  With ``Segments`` of an ``Input``, and their pairs, each call brings the ids; ``to`` and all
    segments are then of the same input.  ``gains``: a number for all segments or one for each, from 0 to 1e6.
    ``heads``: None for all.

    ``normalise``: what keeps the sum of a row.

    - "logits": all keys do; a gain w is the same as adding log w to the scores, n is the same as n copies of the keys,
      and 0 hides them.
    - "redistribute": the keys of ``to`` receive what the segments lose, in proportion to their weights; gains up to 1.  With
      the visual sinks of a picture as ``segments`` and its other tokens as ``to``, this is visual attention redistribution
      (VAR, arXiv:2503.03321).
    - "none": nothing; the sum changes.

    ``when``: change only rows in which segments and ``to`` hold at least ``mass`` of the attention, and the segments at most
    ``share`` of that, as in ``{"mass": 0.2, "share": 0.5}``.  Raises PolicyError.
    """

    name: ClassVar[str] = "segment-gain"
    exact: ClassVar[bool] = False
    segments: tuple[Pattern, ...]
    gains: tuple[float, ...]
    heads: tuple[int, ...] | None
    normalise: Normalise
    to: Pattern | None
    when: Mapping[str, float] | None

    def __init__(
        self,
        segments: Any,
        gains: float | Iterable[float],
        heads: Iterable[int] | None = None,
        normalise: Normalise = "logits",
        to: Any = None,
        when: Mapping[str, float] | None = None,
    ) -> None:
        several = isinstance(segments, (list, tuple)) and not all(isinstance(s, int) for s in segments)
        read = tuple(map(_segment, segments)) if several else (_segment(segments),)
        if normalise not in get_args(Normalise):
            names = ", ".join(map(repr, get_args(Normalise)))
            raise PolicyError(f"{self.name}: invalid value normalise={normalise!r}: expected one of {names}")
        if (normalise == "redistribute") != (to is not None):
            told = "needs to=, the keys that receive" if to is None else f"does not use to={to!r}"
            raise PolicyError(f"{self.name}: normalise={normalise!r} {told}")
        object.__setattr__(self, "segments", read)
        object.__setattr__(self, "gains", _gains(gains, len(read), 1.0 if normalise == "redistribute" else LARGEST))
        object.__setattr__(self, "heads", None if heads is None else tuple(sorted(distinct_heads(self.name, heads))))
        object.__setattr__(self, "normalise", normalise)
        object.__setattr__(self, "to", None if to is None else _segment(to))
        object.__setattr__(self, "when", _conditions(when))
        _check_brought(self._patterns)

    @property
    def _patterns(self) -> tuple[Pattern, ...]:
        return (*self.segments, *([] if self.to is None else [self.to]))

    @property
    def inputs(self) -> tuple[Input, ...]:
        first = self.segments[0]
        return tuple(dict.fromkeys(first.inputs)) if isinstance(first, Segments) else ()

    @classmethod
    def typical(cls) -> SegmentGain:
        return cls(Keys([0]), 0.5)

    def check(self, site: Site) -> Refusal | None:
        patterns = self._patterns
        named = max(p.named_heads for p in patterns)
        found = refuse_unknown_heads(site, [*(self.heads or ()), *([named - 1] if named else [])])
        for pattern in patterns:
            if found is None and pattern.is_positional:
                found = refuse_other_keys(site, past=not pattern.reads_length)
            found = found or refuse_other_lengths(site, pattern) or self._refuse_beyond(site, pattern)
        found = found or self._refuse_twice(site) or self._refuse_inputs(site)
        found = found or refuse_rows(site, "use either segment-gain or query-rows at a site")
        return found or refuse_causal_pools(site, self.rewrite(site).spec, "leave the heads that pool out of heads=")

    def rewrite(self, site: Site) -> Rewrite:
        spec = site.spec
        chosen = set(spec.heads) if self.heads is None else {*self.heads} & {*spec.heads}
        if not chosen or all(g == 1 for g in self.gains):
            return Rewrite(spec)
        listed = list(zip(self.segments, self.gains, strict=True))
        if self.normalise == "logits" and self.when is None and not self.inputs:  # keys without weight are hidden
            hidden = [self._alone(i) for i, (_, g) in enumerate(listed) if g == 0]
            listed = [(s, g) for s, g in listed if g != 0]
            spec = _without(spec, hidden, chosen) if hidden else spec
        if all(gain == 1 for _, gain in listed):
            return Rewrite(spec)
        parts = tuple(
            Part(
                _together([s for s, _ in run]).for_heads(spec.heads),
                tuple(gain if h in chosen else 1.0 for h in spec.heads),
            )
            for gain, run in groupby(listed, key=itemgetter(1))
        )
        to = None if self.to is None else self.to.for_heads(spec.heads)
        made = WeightGains(parts, self.normalise, to, **(self.when or {}))
        named = [last for s in self.segments if (last := _last(s)) >= 0]
        return Rewrite(replace(spec, weight_gains=made), notes=note_absent_tokens(self.name, site, named))

    def _alone(self, index: int) -> Pattern:
        """The pairs of a segment that no earlier one holds."""
        earlier = self.segments[:index]
        return self.segments[index] & ~any_of(earlier) if earlier else self.segments[index]

    def _refuse_beyond(self, site: Site, pattern: Pattern) -> Refusal | None:
        """Refuse positions that no call has."""
        last = _last(pattern)
        if last < site.kv_len or site.is_dynamic:
            return None
        return site.refuse("unknown-keys", expected=f"key positions below {site.kv_len}", found=f"position {last}")

    def _refuse_inputs(self, site: Site) -> Refusal | None:
        if not self.inputs:
            return None
        if site.spec.segments is not None:
            return refuse_segmented(site)
        if site.spec.pooling is not None:
            return refuse_pooled(site, "use either gains on segments or pool-keys at a site")
        return refuse_unfit_inputs(site, self.rewrite(site).spec.of_segments, HINT_IDS)

    def _refuse_twice(self, site: Site) -> Refusal | None:
        hides = self.normalise == "logits" and self.when is None and {*self.gains} <= {0.0, 1.0}
        if hides and not self.inputs:
            return None
        if site.spec.weight_gains is None:
            return refuse_extended(site, "use either extend-keys or segment-gain at a site")
        hint = (
            "give all segments to one segment-gain; a factor that the model itself has cannot be combined with others"
        )
        found = str(site.spec.weight_gains)
        return site.refuse("already-gained", expected="weights without gains", found=found, hint=hint)


def _check_brought(patterns: Sequence[Pattern]) -> None:
    """Ids that a call brings are those of all patterns.  Raises PolicyError."""
    leaves = [leaf for p in patterns for leaf in p.leaves() if isinstance(leaf, Segments) and leaf.inputs]
    if not leaves:
        return
    alone = [p for p in patterns if isinstance(p, Segments) and p.inputs == leaves[0].inputs]
    if len(alone) < len(patterns):
        raise PolicyError(
            f"segment-gain: segments that a call brings, {leaves[0]}, beside others",
            hint="let all segments, and to=, be Segments of the same Input",
        )
    if any(p.pairs is None for p in alone):
        raise PolicyError(
            f"segment-gain: {leaves[0]} does not say which segments",
            hint="list pairs of a query segment and a key segment, as in pairs=[(None, 3)] for the keys of 3, or "
            "pairs=[(0, 0), (1, 1)]",
        )


def _together(segments: Sequence[Pattern]) -> Pattern:
    """The pairs that one of them has."""
    first = segments[0]
    if not (isinstance(first, Segments) and first.inputs):
        return any_of(segments)
    return Segments(
        first.ids, [pair for s in segments if isinstance(s, Segments) for pair in s.pairs or ()], first.keys
    )


def _last(pattern: Pattern) -> int:
    """The last position that it names; -1 if it names none."""
    return max((k.positions[-1][1] - 1 for k in pattern.leaves() if isinstance(k, Keys) and k.positions), default=-1)


def _segment(given: Any) -> Pattern:
    if isinstance(given, Pattern):
        return given
    made = parse(given) if isinstance(given, str) and not given.strip()[:1].isdigit() else Keys(given)
    if made == Keys(()):
        raise PolicyError(f"segment-gain: invalid segment {given!r}: expected at least one key position")
    return made


def _gains(given: Any, count: int, most: float) -> tuple[float, ...]:
    listed = [given] * count if isinstance(given, (int, float)) else list(given)
    if len(listed) != count:
        raise PolicyError(f"segment-gain: invalid value gains={given!r}: expected one number or {count} of them")
    read = tuple(number("segment-gain", "gains", g) for g in listed)
    if any(not 0 <= g <= most for g in read):
        raise PolicyError(f"segment-gain: invalid value gains={given!r}: expected numbers from 0 to {most:g}")
    return read


def _conditions(given: Any) -> dict[str, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or not given or set(given) - set(_CONDITIONS):
        raise PolicyError(
            f'segment-gain: invalid value when={given!r}: expected a mapping such as {{"mass": 0.2, "share": 0.5}}'
        )
    read = {name: number("segment-gain", name, value) for name, value in given.items()}
    if any(not 0 <= value <= 1 for value in read.values()):
        raise PolicyError(f"segment-gain: invalid value when={given!r}: expected fractions from 0 to 1")
    return read


def _without(spec: AttentionSpec, segments: Sequence[Pattern], heads: set[int]) -> AttentionSpec:
    """The same attention without these keys in ``heads``."""
    hidden = ~any_of(segments)
    if heads == set(spec.heads):
        return spec.restricted(hidden.for_heads(spec.heads))
    return spec.restricted(PerHead({tuple(sorted(heads)): hidden}).for_heads(spec.heads))
