"""Restrict every query to the keys that a pattern allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attnopt.base.options import switch
from attnopt.errors import PolicyError
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.zero_keys import ZeroKeys
from attnopt.passes.preconditions import (
    refuse_other_keys,
    refuse_other_lengths,
    refuse_pooled,
    refuse_unknown_heads,
)
from attnopt.patterns import Full, Pattern, Window, parse


@dataclass(frozen=True, init=False)
class Sparse(Pass):
    """Restrict the attention to the pairs that ``pattern`` also allows.

    ``pattern``: a pattern from ``attnopt.patterns``, or its text.  Its heads are numbered as in the trained model.  A
    causal attention stays causal; a fully masked query gives zeros.
    ``zero_pad``: the keys that a window has beyond the edges of the sequence or grid are zeros, with values of zeros, and not
    masked, as timm's HaloNet pads its blocks.  For ``Blocks``, ``Window``, and ``Neighborhood`` with edge="clip", also behind a
    ``Prefix`` or in some heads, of an attention without a bias that shows all keys.  Raises PolicyError.
    """

    name: ClassVar[str] = "sparse"
    exact: ClassVar[bool] = False
    pattern: Pattern
    zero_pad: bool

    def __init__(self, pattern: Pattern | str, zero_pad: bool = False) -> None:
        read = parse(pattern) if isinstance(pattern, str) else pattern
        if not isinstance(read, Pattern):
            raise PolicyError(
                f"sparse: invalid value pattern={pattern!r}: expected a pattern from attnopt.patterns or its text"
            )
        if switch("sparse", "zero_pad", zero_pad) and not ZeroKeys.known(read, range(read.named_heads + 1)):
            raise PolicyError(
                f"sparse: zero_pad=True: {read} has no windows that are clipped at the edges",
                hint='use Blocks, Window, or Neighborhood with edge="clip", alone, behind a Prefix, or in a PerHead',
            )
        object.__setattr__(self, "pattern", read)
        object.__setattr__(self, "zero_pad", zero_pad)

    @classmethod
    def typical(cls) -> Sparse:
        return cls(Window(1, 1))

    def check(self, site: Site) -> Refusal | None:
        named, grows = self.pattern.named_heads, not (self.pattern.reads_length or self.zero_pad)
        misplaced = refuse_other_keys(site, past=grows) if self.pattern.is_positional else None
        return (
            misplaced
            or refuse_other_lengths(site, self.pattern)
            or refuse_unknown_heads(site, [named - 1] if named else [])
            or (_refuse_padding(site) if self.zero_pad else None)
        )

    def rewrite(self, site: Site) -> Rewrite:
        pattern = self.pattern.for_heads(site.spec.heads)
        spec = site.spec.restricted(pattern)
        return Rewrite(replace(spec, zero_keys=ZeroKeys(pattern)) if self.zero_pad else spec)


def _refuse_padding(site: Site) -> Refusal | None:
    """Refuse an attention that does not tell what a key beyond the edge scores, or who sees it."""
    if site.spec.has_bias:
        return site.refuse(
            "bias-beyond-edge",
            expected="scores without a bias",
            found="a bias, which has no entries for keys beyond the edge",
            hint="leave zero_pad out: keys beyond the edge are then masked",
        )
    if site.spec.visible_pattern != Full() or site.spec.zero_keys is not None:
        return site.refuse(
            "keys-already-hidden",
            expected="queries that see all keys",
            found=str(site.spec.zero_keys or site.spec.visible_pattern),
            hint="leave zero_pad out, or let the zero-padded pattern come first",
        )
    return refuse_pooled(site, "use either zero_pad or pool-keys at a site")
