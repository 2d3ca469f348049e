"""An axis of length 1 in the example says nothing about other lengths, and torch.export makes it constant: another example,
with a longer axis, built by repeating the user's example."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import difference, tolerance
from attnopt.capture.added_inputs import added_to
from attnopt.capture.dynamic_axes import Asked
from attnopt.capture.run_unchanged import outputs_of

Place = tuple[int, int]  # number of a leaf, axis
_PLAIN = (Tensor, int, float, str, type(None))


def longer_axes(model: nn.Module, inputs: CallInputs, asked: Asked) -> frozenset[Place]:
    """Requested axes of length 1 along which the model accepts repeated inputs and computes the same.

    First the first axes of all inputs together, usually the batch; then each alone, and the others likewise.  What only a
    policy reads stays as it is: its sizes are those of what reads it."""
    leaves = pytree.tree_leaves(inputs)
    if not all(isinstance(x, _PLAIN) for x in leaves):
        return frozenset()
    ignored = _ignored(model, inputs)
    found = [(i, a) for i, axes in enumerate(asked) for a in axes or () if i not in ignored and _is_one(leaves[i], a)]
    if not found:
        return frozenset()
    try:
        want = seeded_outputs(model, inputs)
    except Exception:
        return frozenset()
    chosen = frozenset[Place]()
    for axis in sorted({a for _, a in found}):
        here = frozenset(p for p in found if p[1] == axis)
        for more in (here, *([frozenset([p]) for p in sorted(here)] if len(here) > 1 else ())):
            if not more & chosen and _does_the_same(model, inputs, chosen | more, want):
                chosen |= more
    return chosen


def unread_axes(model: nn.Module, inputs: CallInputs, asked: Asked) -> frozenset[Place]:
    """Requested axes of length 1 of inputs that only a policy reads."""
    leaves, ignored = pytree.tree_leaves(inputs), _ignored(model, inputs)
    return frozenset(
        (i, a) for i, axes in enumerate(asked) for a in axes or () if i in ignored and _is_one(leaves[i], a)
    )


def _ignored(model: nn.Module, inputs: CallInputs) -> frozenset[int]:
    """The numbers of leaves that only a policy reads."""
    numbers, added = count(len(pytree.tree_leaves(inputs.args))), added_to(model)
    named = [(name, next(numbers)) for name, given in inputs.kwargs.items() for _ in pytree.tree_leaves(given)]
    return frozenset(i for name, i in named if name in added)


def repeated(inputs: CallInputs, places: frozenset[Place], fades: bool = True) -> CallInputs:
    """The inputs, repeated along these axes to a unique length.

    ``fades``: no two copies of floating-point numbers are equal, so mixing them up is detected."""
    leaves, spec = pytree.tree_flatten(inputs)
    length = times(leaves)
    for i, axis in sorted(places):
        leaves[i] = torch.cat([faded(leaves[i], n if fades else 0) for n in range(length)], axis)
    made: CallInputs = pytree.tree_unflatten(leaves, spec)
    return made


def times(leaves: Sequence[object]) -> int:
    lengths = {n for x in leaves if isinstance(x, Tensor) for n in x.shape}
    return next(n for n in count(2) if n not in lengths)


def _is_one(x: object, axis: int) -> bool:
    return isinstance(x, Tensor) and axis < x.dim() and x.shape[axis] == 1


def faded(x: Tensor, n: int) -> Tensor:
    """Copy ``n`` of an input: no two of floating-point numbers are equal."""
    return x * (1 - n / 16) if n and x.is_floating_point() else x


def seeded_outputs(model: nn.Module, inputs: CallInputs) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return outputs_of(model, inputs)


def _does_the_same(model: nn.Module, inputs: CallInputs, places: frozenset[Place], want: Sequence[Tensor]) -> bool:
    """The outputs are those of the user's example, or these repeated as the inputs are."""
    length = times(pytree.tree_leaves(inputs))
    try:
        got = seeded_outputs(model, repeated(inputs, places, fades=False))
        if len(got) != len(want) or any(g.dim() != w.dim() for g, w in zip(got, want, strict=True)):
            return False
        longer = [
            w.repeat([length if n == length * m else 1 for n, m in zip(g.shape, w.shape, strict=True)])
            for g, w in zip(got, want, strict=True)
        ]
        return difference(got, longer) <= 10 * tolerance(longer) and bool(
            seeded_outputs(model, repeated(inputs, places))
        )
    except Exception:
        return False
