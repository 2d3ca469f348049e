"""Restrict every query to the keys that a pattern allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnopt.errors import PolicyError
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import (
    refuse_looking_ahead,
    refuse_other_keys,
    refuse_other_lengths,
    refuse_unknown_heads,
)
from attnopt.patterns import Pattern, Window, parse


@dataclass(frozen=True, init=False)
class Sparse(Pass):
    """Restrict the attention to the pairs that ``pattern`` also allows.

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

    @classmethod
    def typical(cls) -> Sparse:
        return cls(Window(1, 1))

    def check(self, site: Site) -> Refusal | None:
        named = self.pattern.named_heads
        misplaced = refuse_other_keys(site, past=True) if self.pattern.is_positional else None
        return (
            misplaced
            or refuse_other_lengths(site, self.pattern)
            or refuse_unknown_heads(site, [named - 1] if named else [])
            or refuse_looking_ahead(site, site.spec.selection, self.pattern.for_heads(site.spec.heads))
        )

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(site.spec.restricted(self.pattern.for_heads(site.spec.heads)))
