"""Restrict every query to the keys that a pattern allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attnopt.base.input import Input
from attnopt.errors import PolicyError
from attnopt.ir.call_segments import separated
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import (
    refuse_causal_pools,
    refuse_other_keys,
    refuse_other_lengths,
    refuse_pooled,
    refuse_unfit_ids,
    refuse_unknown_heads,
)
from attnopt.patterns import Pattern, Segments, Window, parse


@dataclass(frozen=True, init=False)
class Sparse(Pass):
    """Restrict the attention to the pairs that ``pattern`` also allows.

    ``Segments`` of an ``Input`` in it may stand alone, be joined with ``&``, or be those of some heads in ``PerHead``.

    ``pattern``: a pattern from ``attnopt.patterns``, or its text.  Its heads are numbered as in the trained model.  A
    causal attention stays causal; a fully masked query gives zeros.  Raises PolicyError.
    """

    name: ClassVar[str] = "sparse"
    exact: ClassVar[bool] = False
    pattern: Pattern

    def __init__(self, pattern: Pattern | str) -> None:
        read = parse(pattern) if isinstance(pattern, str) else pattern
        if not isinstance(read, Pattern):
            raise PolicyError(
                f"sparse: invalid value pattern={pattern!r}: expected a pattern from attnopt.patterns or its text"
            )
        object.__setattr__(self, "pattern", read)
        separated(read, range(read.named_heads + 1))  # and one of all others

    @property
    def inputs(self) -> tuple[Input, ...]:
        return tuple(dict.fromkeys(i for p in self.pattern.leaves() if isinstance(p, Segments) for i in p.inputs))

    @classmethod
    def typical(cls) -> Sparse:
        return cls(Window(1, 1))

    def check(self, site: Site) -> Refusal | None:
        named = self.pattern.named_heads
        if (unfit := self._refuse_inputs(site)) is not None:
            return unfit
        misplaced = refuse_other_keys(site, past=True) if self.pattern.is_positional else None
        if misplaced is not None and self.inputs:
            misplaced = replace(
                misplaced, hint="name the input with the segments of the keys: Segments(..., keys=Input(...))"
            )
        return (
            misplaced
            or refuse_other_lengths(site, self.pattern)
            or refuse_unknown_heads(site, [named - 1] if named else [])
            or refuse_causal_pools(site, self.rewrite(site).spec, "leave the heads that pool out of the pattern")
        )

    def rewrite(self, site: Site) -> Rewrite:
        known, segments = separated(self.pattern, site.spec.heads)
        spec = site.spec.restricted(known)
        return Rewrite(spec if segments is None else replace(spec, segments=segments))

    def _refuse_inputs(self, site: Site) -> Refusal | None:
        _, segments = separated(self.pattern, site.spec.heads)
        if segments is None:
            return None
        if site.spec.segments is not None:
            hint = "number the intersections of both as segments of one input"
            return site.refuse(
                "already-segmented", expected="an attention without segments", found=site.spec.segments, hint=hint
            )
        if site.spec.pooling is not None:
            return refuse_pooled(site, "use either segments or pool-keys at a site")
        lengths = {segments.queries: site.q_len, segments.keys: site.kv_len}
        return next((r for i, n in lengths.items() if (r := refuse_unfit_ids(site, i, n)) is not None), None)
