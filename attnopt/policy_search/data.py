"""The calibration data of a search: what alternatives are fitted to, and what they are judged on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.compiler.compile import Compiled
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.compiler.random_tokens import for_encoders
from attnopt.errors import PolicyError
from attnopt.graph.nodes import module_path
from attnopt.match.find import Found

HELD_BACK = 4  # one of so many batches is held back


@dataclass(frozen=True)
class Split:
    """``fitted``: batches that alternatives are fitted to; ``judged``: those that they are judged on."""

    fitted: tuple[CallInputs, ...]
    judged: tuple[CallInputs, ...]


def split(batches: Sequence[CallInputs], learns: bool) -> Split:
    """Every fourth batch is held back, the last one at least; all are judged on if nothing is fitted.

    Of a single batch, the last quarter of the sequences is.  Raises PolicyError if it has only one."""
    if not learns:
        return Split((), tuple(batches))
    if len(batches) == 1:
        batches = _halves(batches[0])
    held = {i for i in range(len(batches)) if i % HELD_BACK == HELD_BACK - 1} or {len(batches) - 1}
    fitted = tuple(b for i, b in enumerate(batches) if i not in held)
    return Split(fitted, tuple(b for i, b in enumerate(batches) if i in held))


@dataclass(frozen=True)
class Judged:
    """``pieces``: of the data that candidates are judged on, in the form of the graph.  ``has_random_tokens``: every second one
    has random tokens in the place of its words."""

    pieces: tuple[CallInputs, ...]
    has_random_tokens: bool

    @property
    def texts(self) -> range:
        """The numbers of the pieces of the data itself."""
        return range(0, len(self.pieces), 2 if self.has_random_tokens else 1)


def judged_on(compiled: Compiled, fitted: Sequence[CallInputs], held: Sequence[CallInputs], seed: int) -> Judged:
    """The held-back batches, each with one of random tokens beside it if the model reads tokens and is no decoder.

    What little text is held back is of one domain; random tokens tell as much of others."""
    invented = for_encoders(compiled.program.module, compiled.findings.found, [*fitted, *held], seed)[len(fitted) :]
    if not invented:
        return Judged(tuple(held), False)
    return Judged(tuple(piece for both in zip(held, invented, strict=True) for piece in both), True)


def _halves(batch: CallInputs) -> list[CallInputs]:
    """One batch as two, of sequences."""
    leaves, spec = pytree.tree_flatten(batch)
    counts = {len(x) for x in leaves if isinstance(x, Tensor) and x.dim()}
    if len(counts) != 1 or min(counts) < 2:
        raise PolicyError(
            "search: one batch of one sequence cannot be both fitted to and judged on", hint="give at least two batches"
        )
    (count,) = counts
    at = max(1, count - max(1, count // HELD_BACK))

    def part(start: int, stop: int) -> CallInputs:
        cut = [x[start:stop] if isinstance(x, Tensor) and x.dim() else x for x in leaves]
        made: CallInputs = pytree.tree_unflatten(cut, spec)
        return made

    return [part(0, at), part(at, count)]


def resized(inputs: CallInputs, sizes: tuple[int | None, int | None]) -> CallInputs:
    """The example inputs at another batch and length, by repeating or cutting: axis 0 of every tensor, and each later axis but
    the last of three that is as long as axis 1 of the first.  Raises PolicyError."""
    leaves, spec = pytree.tree_flatten(inputs)
    first = _first(inputs)
    if sizes == (None, None) or first is None:
        return inputs
    batch, length = sizes
    was = (len(first), first.shape[1] if first.dim() > 1 else None)
    if length is not None and (was[1] is None or first.dim() > 3):
        raise PolicyError(
            f"search: the example inputs have no axis of tokens for a length of {length}", hint="give at=batch"
        )

    def fitted(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        for axis in range(x.dim()):
            is_batch = axis == 0 and len(x) == was[0]
            is_length = axis > 0 and x.shape[axis] == was[1] and not (x.dim() == 3 and axis == 2)
            wanted = batch if is_batch else length if is_length else None
            if wanted is not None:
                x = x.index_select(axis, torch.arange(wanted, device=x.device) % x.shape[axis])
        return x

    made: CallInputs = pytree.tree_unflatten([fitted(x) for x in leaves], spec)
    return made


def length_of(inputs: CallInputs) -> int:
    """Axis 1 of the first tensor, which counts tokens; 1 if it has none."""
    first = _first(inputs)
    return 1 if first is None or first.dim() < 2 else int(first.shape[1])


def batch_of(inputs: CallInputs) -> int:
    """Axis 0 of the first tensor, which counts sequences; 1 if it has none."""
    first = _first(inputs)
    return 1 if first is None else len(first)


def _first(inputs: CallInputs) -> Tensor | None:
    return next((x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.dim()), None)


def real_tokens(gm: fx.GraphModule, found: Sequence[Found], batches: Sequence[CallInputs]) -> Iterator[list[Tensor]]:
    """For each batch, the masks [B, L] of tokens that are no padding: of the last attention over its own tokens."""
    own = [f for f in found if not f.site.is_cross][-1:]
    for batch in batches:
        masks: list[Tensor] = []
        for _, activations in Stream(gm, own, [batch]).sites():
            masks += [t.real for t in activations.batches]
        yield masks


def last_module(gm: fx.GraphModule) -> str:
    """The module that computes the first output."""
    node = next((n for n in gm.graph.output_node().all_input_nodes), None)
    return "" if node is None else module_path(node)
