"""Multiply each head output by a factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from attnopt.base.input import Input
from attnopt.base.options import number, numbers, whole
from attnopt.errors import PolicyError
from attnopt.ir.call_gains import ScaledByCall
from attnopt.ir.call_tensor import BATCH, CallTensor
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import refuse_unfit_inputs, refuse_unknown_heads
from attnopt.passes.tensor_options import input_of


@dataclass(frozen=True, init=False)
class ScaleHeads(Pass):
    """Multiply the output of head h by ``gains[h]``.

    ``gains``: one number per head of the trained model, or a mapping from some heads to their gains (stored as sorted
    pairs); or an ``Input``, for which each call brings [B or 1, heads], the gains of each sample for all heads of the trained
    model.  Heads that were already pruned are ignored, and so are their gains.
    The output projection absorbs known gains, and not those of a call: these cost one multiplication.  Nothing checks their
    values: NaN or an infinity in the gain of a head goes where the output of that head goes.  Raises PolicyError.
    """

    name: ClassVar[str] = "scale-heads"
    exact: ClassVar[bool] = False
    channels: ClassVar[bool] = True
    head_maps: ClassVar[bool] = True
    linear: ClassVar[bool] = True
    gains: tuple[float, ...] | tuple[tuple[int, float], ...] | Input

    def __init__(
        self, gains: Sequence[float] | Sequence[tuple[int, float]] | Mapping[int, float] | Mapping[str, str] | Input
    ) -> None:
        if (brought := input_of(gains)) is not None:
            object.__setattr__(self, "gains", brought)
            return
        pairs = list(gains.items()) if isinstance(gains, Mapping) else _pairs(gains)
        if pairs is None:
            object.__setattr__(self, "gains", numbers(self.name, "gains", gains))
            return
        of_head = {whole(self.name, "gains", head): number(self.name, "gains", gain) for head, gain in pairs}
        if len(of_head) < len(pairs):
            raise PolicyError(f"{self.name}: invalid value gains={gains!r}: expected one number per head")
        object.__setattr__(self, "gains", tuple(sorted(of_head.items())))

    @property
    def edited_heads(self) -> tuple[int, ...]:
        pairs = None if isinstance(self.gains, Input) else _pairs(self.gains)
        return tuple(head for head, _ in pairs or ())

    def check(self, site: Site) -> Refusal | None:
        if isinstance(self.gains, Input):
            return refuse_unfit_inputs(site, [self._brought(site)], "give one gain for each head of the trained model")
        pairs = _pairs(self.gains)
        if pairs is not None:
            return refuse_unknown_heads(site, (head for head, _ in pairs))
        count = site.trained_heads
        if len(self.gains) == count:
            return None
        found = f"{len(self.gains)} gains"
        return site.refuse("wrong-number-of-gains", expected=f"one gain per head ({count})", found=found)

    def rewrite(self, site: Site) -> Rewrite:
        if isinstance(self.gains, Input):
            heads = site.spec.heads
            return Rewrite(site.spec.followed_by(ScaledByCall(heads, self._brought(site).keeping(heads))))
        of_head = dict(_pairs(self.gains) or enumerate(numbers(self.name, "gains", self.gains)))
        return Rewrite(site.spec.scaled(of_head))

    def _brought(self, site: Site) -> CallTensor:
        assert isinstance(self.gains, Input)
        return CallTensor(self.gains, (BATCH, site.trained_heads))


def _pairs(gains: object) -> list[tuple[int, float]] | None:
    """``gains`` as pairs of a head and its gain, or None if it is not a sequence of pairs."""
    if not isinstance(gains, (list, tuple)) or not gains or not all(isinstance(g, (list, tuple)) for g in gains):
        return None
    if any(len(pair) != 2 for pair in gains):
        raise PolicyError(
            f"scale-heads: invalid value gains={gains!r}: expected numbers, or pairs of a head and its gain"
        )
    return [(head, gain) for head, gain in gains]
