"""A map that is mixed into attention weights, as operands of the canonical attention."""

from __future__ import annotations

from torch import fx

from attnopt.base.sizes import is_static
from attnopt.graph.axes import Axes, Axis, resolve_all
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, dtype, shape, value
from attnopt.graph.select import Selection
from attnopt.match.mixture import Computed, Mixture, Value
from attnopt.match.read_scores import Operand
from attnopt.match.rearrange import Arranger
from attnopt.match.region import Region
from attnopt.slicing.pull import pull
from attnopt.slicing.selection import trim


def mixed_in(emit: Emitter, at: Arranger, r: Region, mixture: Mixture) -> tuple[fx.Node | None, fx.Node]:
    """``keep`` [B|1, H|1, L|1, 1], None for 1, and ``added`` [B|1, H|1, L|1, S]."""
    groups = (r.batch, r.heads, r.queries, r.keys)
    added = _emitted(emit, at, groups, mixture.added)
    assert isinstance(added, fx.Node), "a map has a number for each key"
    if mixture.keep == 1.0:
        return None, added
    keep = _emitted(emit, at, groups, mixture.keep)
    if isinstance(keep, float):
        device = value(added).device
        keep = emit.call(aten.full.default, [1, 1, 1, 1], keep, dtype=dtype(added), device=device)
    return keep, added


def _emitted(emit: Emitter, at: Arranger, groups: Axes, x: Value) -> fx.Node | float:
    if isinstance(x, float):
        return x
    if isinstance(x, Operand):
        once = _without_copies(emit, x, groups[0])
        return at.arrange(once.node, once.axes, groups)
    args = [_emitted(emit, at, groups, a) if isinstance(a, (float, Operand, Computed)) else a for a in x.args]
    return emit.call(x.target, *args)


def _without_copies(emit: Emitter, x: Operand, batch: Axis) -> Operand:
    """``x`` once, if it is the same for all sequences."""
    axes, node = resolve_all(x.axes), x.node

    def is_repeated(i: int) -> bool:
        others = range(1, shape(node)[i]) if is_static(value(node).shape[i]) else (1,)
        return all(_repeats(node, {i: (0,)}, {i: (n,)}) for n in others)

    along = [i for i, axis in enumerate(axes) if axis and set(axis) <= set(batch) and is_repeated(i)]
    if not along:
        return x
    once = _selected(emit, node, dict.fromkeys(along, (0,)))
    return Operand(once, tuple(() if i in along else axis for i, axis in enumerate(axes)))


def _repeats(node: fx.Node, one: Selection, other: Selection) -> bool:
    """Both selections of ``node`` are computed alike from the same tensors."""
    one, other = trim(node, one), trim(node, other)
    if one == other:
        return True
    first, second = pull(node, one), pull(node, other)
    if first is None or second is None or len(first.demands) != len(second.demands):
        return False
    if first.build is None and len(first.demands) > 1:
        return False
    pairs = zip(first.demands, second.demands, strict=True)
    return all(above is same and _repeats(above, a, b) for (above, a), (same, b) in pairs)


def _selected(emit: Emitter, node: fx.Node, selection: Selection) -> fx.Node:
    """``node`` at a selection that ``_repeats``, computed from whole tensors."""
    selection = trim(node, selection)
    if not selection:
        return node
    pulled = pull(node, selection)
    assert pulled is not None
    found = [_selected(emit, above, demanded) for above, demanded in pulled.demands]
    if pulled.build is None:
        return found[0]
    target, args, kwargs = pulled.build(found)
    return emit.call(target, *args, **kwargs)
