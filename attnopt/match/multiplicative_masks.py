"""Multiplicative masks: ``scores * m + bias`` with a 0/1 mask m, together with a padding mask from the inputs."""

from __future__ import annotations

from torch import Tensor, fx

from attnopt.graph.evaluate import inputs_behind, is_plain
from attnopt.graph.nodes import value
from attnopt.match.mask_patterns import Sample, as_visible, samples

_HIDDEN = -1e4


def hides_beside_flags(gm: fx.GraphModule, bias: fx.Node | None, factor: fx.Node) -> bool:
    """Every key whose score ``factor`` zeroes is hidden by the bias, whatever the inputs' flags hide.

    A query whose other keys are all hidden by the flags may see zeroed keys: their score is 0, not the product.
    """
    if bias is None or not is_plain(bias) or not is_plain(factor) or inputs_behind(factor):
        return False
    flags = [value(n) for n in inputs_behind(bias)]
    if not flags or any(not isinstance(x, Tensor) or x.dtype.is_floating_point for x in flags):
        return False
    flagged, unflagged = (samples(gm, [factor, bias], fill=fill) for fill in (1, 0))
    if flagged is None or unflagged is None:
        return False
    return all(_hides(*pair) for pair in zip(flagged, unflagged, strict=True))


def _hides(flagged: Sample, unflagged: Sample) -> bool:
    kept, hidden = flagged.values[0], unflagged.values[1]
    visible = as_visible(flagged.values[1], beside=True, whole_rows=flagged.whole_rows)
    if visible is None:
        return False
    wiped = (kept == 0) & ~visible & (hidden <= _HIDDEN)
    return bool(((kept == 1) | wiped).all())
