"""Restrict every query to the keys that a pattern allows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attnopt.base.input import Input
from attnopt.base.options import switch
from attnopt.errors import PolicyError
from attnopt.ir.call_segments import CallSegments, separated
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.zero_keys import ZeroKeys
from attnopt.passes.preconditions import (
    HINT_IDS,
    refuse_causal_pools,
    refuse_causal_rows,
    refuse_looking_ahead,
    refuse_other_keys,
    refuse_other_lengths,
    refuse_pooled,
    refuse_rows,
    refuse_segmented,
    refuse_unfit_inputs,
    refuse_unknown_heads,
)
from attnopt.patterns import Full, Pattern, Segments, Window, parse


@dataclass(frozen=True, init=False)
class Sparse(Pass):
    """Restrict the attention to the pairs that ``pattern`` also allows.

    ``Segments`` of an ``Input`` in it may stand alone, be joined with ``&``, or be those of some heads in ``PerHead``.

    ``pattern``: a pattern from ``attnopt.patterns``, or its text.  Its heads are numbered as in the trained model.  A
    causal attention stays causal; a fully masked query gives zeros.
    ``zero_pad``: the keys that a window has beyond the edges of the sequence or grid are zeros, with values of zeros, and not
    masked, as timm's HaloNet pads its blocks.  For ``Blocks``, ``Window``, and ``Neighborhood`` with edge="clip", also behind a
    ``Prefix`` or in some heads, of an attention without a bias that shows all keys.  Raises PolicyError.
    """

    name: ClassVar[str] = "sparse"
    exact: ClassVar[bool] = False
    head_maps: ClassVar[bool] = True
    linear: ClassVar[bool] = True
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
        separated(read, range(read.named_heads + 1))  # and one of all others

    @property
    def inputs(self) -> tuple[Input, ...]:
        return tuple(dict.fromkeys(i for p in self.pattern.leaves() if isinstance(p, Segments) for i in p.inputs))

    @classmethod
    def typical(cls) -> Sparse:
        return cls(Window(1, 1))

    def check(self, site: Site) -> Refusal | None:
        named = self.pattern.named_heads
        known, segments = separated(self.pattern, site.spec.heads)
        return (
            _refuse_segments(site, segments)
            or self._refuse_other_keys(site)
            or refuse_other_lengths(site, self.pattern)
            or refuse_unknown_heads(site, [named - 1] if named else [])
            or refuse_causal_pools(site, site.spec.restricted(known), "leave the heads that pool out of the pattern")
            or (_refuse_padding(site) if self.zero_pad else None)
            or refuse_looking_ahead(site, site.spec.selection, known)
            or refuse_causal_rows(site, site.spec.restricted(known))
        )

    def rewrite(self, site: Site) -> Rewrite:
        known, segments = separated(self.pattern, site.spec.heads)
        spec = site.spec.restricted(known)
        if segments is not None:
            spec = replace(spec, segments=segments)
        return Rewrite(replace(spec, zero_keys=ZeroKeys(known)) if self.zero_pad else spec)

    def _refuse_other_keys(self, site: Site) -> Refusal | None:
        if not self.pattern.is_positional:
            return None
        refused = refuse_other_keys(site, past=not (self.pattern.reads_length or self.zero_pad))
        if refused is None or not self.inputs:
            return refused
        hint = "name the input with the segments of the keys: Segments(..., keys=Input(...))"
        return replace(refused, hint=hint)


def _refuse_segments(site: Site, segments: CallSegments | None) -> Refusal | None:
    """Refuse segments that the site, or what the call brings for it, has no room for."""
    if segments is None:
        return None
    if site.spec.call_segments is not None:
        return refuse_segmented(site)
    if site.spec.pooling is not None:
        return refuse_pooled(site, "use either segments or pool-keys at a site")
    if site.spec.rows is not None:
        return refuse_rows(site, "use either segments of the call or query-rows at a site")
    return refuse_unfit_inputs(site, segments.tensors, HINT_IDS)


def _refuse_padding(site: Site) -> Refusal | None:
    """Refuse an attention that does not tell what a key beyond the edge scores, or who sees it."""
    if site.spec.other_weights:
        expected, hint = "a softmax, of which zeros take their share", "leave zero_pad out: they have no weight here"
        return site.refuse("no-softmax", expected=expected, found=site.spec.other_weights, hint=hint)
    if site.spec.has_bias:
        return site.refuse(
            "bias-beyond-edge",
            expected="scores without a bias",
            found="a bias, which has no entries for keys beyond the edge",
            hint="leave zero_pad out: keys beyond the edge are then masked",
        )
    if site.spec.visible_pattern != Full() or site.spec.zero_keys is not None or site.spec.segments is not None:
        return site.refuse(
            "keys-already-hidden",
            expected="queries that see all keys",
            found=str(site.spec.zero_keys or site.spec.segments or site.spec.visible_pattern),
            hint="leave zero_pad out, or let the zero-padded pattern come first",
        )
    return refuse_pooled(site, "use either zero_pad or pool-keys at a site")
