"""``scores * m + bias`` with a mask m of 0 and 1, beside a padding mask that the inputs make."""

from __future__ import annotations

from torch import Tensor, fx

from attnopt.graph import value
from attnopt.probing import as_visible, evaluate, inputs_behind, is_plain, other_sizes, symbols

_HIDDEN = -1e4


def hides_beside_flags(gm: fx.GraphModule, bias: fx.Node | None, factor: fx.Node) -> bool:
    """Every key whose score ``factor`` wipes out is hidden by the bias, whether the inputs' flags hide others or none.

    A query whose other keys the flags hide all may see what is wiped: its score is 0 there, and not the product.
    """
    if bias is None or not is_plain(bias) or not is_plain(factor) or inputs_behind(factor):
        return False
    flags = [value(n) for n in inputs_behind(bias)]
    if not flags or any(not isinstance(x, Tensor) or x.dtype.is_floating_point for x in flags):
        return False
    return all(_hides(gm, bias, factor, sizes) for sizes in other_sizes(symbols(gm.graph)))


def _hides(gm: fx.GraphModule, bias: fx.Node, factor: fx.Node, sizes: dict[object, int]) -> bool:
    try:
        kept, seen, hidden = evaluate(gm, factor, sizes), evaluate(gm, bias, sizes, 1), evaluate(gm, bias, sizes, 0)
    except (ValueError, RuntimeError, IndexError, TypeError):
        return False
    visible = as_visible(seen, beside=True)
    if visible is None:
        return False
    wiped = (kept == 0) & ~visible & (hidden <= _HIDDEN)
    return bool(((kept == 1) | wiped).all())
