"""Calibration batches that need no data: the given ones with random token ids in the place of their words.

What a model computes on them is spread over its whole vocabulary: a fit that holds on them, too, depends less on the domain of
the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.graph import ops
from attnopt.graph.nodes import calls, inputs_of, operand, value
from attnopt.graph.ops import Kind
from attnopt.match.find import Found

VOCABULARY = 256  # rows of an embedding from which on it is one of tokens: kinds of segments are fewer
SEQUENCES = 8  # from which on it is known which ids are in most sequences
_UNCHANGED = ops.of(Kind.COPY, Kind.CAST, Kind.RESHAPE, Kind.ONES)


def for_encoders(
    gm: fx.GraphModule, found: Sequence[Found], batches: Sequence[CallInputs], seed: int
) -> list[CallInputs]:
    """``with_random_tokens``; none for decoders, where it is not known to help."""
    return [] if any(f.site.spec.is_causal for f in found) else with_random_tokens(gm, batches, seed)


def with_random_tokens(gm: fx.GraphModule, batches: Sequence[CallInputs], seed: int) -> list[CallInputs]:
    """``batches``, in the form of the graph, with other token ids; none if its inputs hold no tokens, or too few sequences.

    Ids that half of the sequences hold stay: marks of beginning, end and padding.  Everything else is as given, masks too.
    """
    sizes = _embedded(gm)
    found = {place: [pytree.tree_leaves(batch)[place] for batch in batches] for place in sizes}
    tokens = [place for place, given in found.items() if not all(map(_ascends, given))]
    if not tokens:
        return []
    place = max(tokens, key=sizes.__getitem__)
    given, rows = found[place], sizes[place]
    if sum(map(len, given)) < SEQUENCES:
        return []
    common = _common(given, rows)
    generator = torch.Generator().manual_seed(seed)
    made: list[CallInputs] = []
    for batch, ids in zip(batches, given, strict=True):
        drawn = torch.randint(rows, ids.shape, generator=generator).to(ids)
        leaves, form = pytree.tree_flatten(batch)
        leaves[place] = torch.where(common.to(ids.device)[ids], ids, drawn)
        made.append(pytree.tree_unflatten(leaves, form))
    return made


def _embedded(gm: fx.GraphModule) -> dict[int, int]:
    """The places of the inputs that index an embedding as large as a vocabulary, and its rows."""
    inputs = inputs_of(gm.graph)
    sizes: dict[int, int] = {}
    for node in gm.graph.nodes:
        if not calls(node, ops.of(Kind.EMBEDDING)):
            continue
        ids = operand(node, 1)
        while calls(ids, _UNCHANGED):
            ids = operand(ids)
        if ids in inputs and value(ids).dim() == 2:
            sizes[inputs.index(ids)] = int(value(operand(node)).shape[0])
    return {place: rows for place, rows in sizes.items() if rows >= VOCABULARY}


def _common(given: Sequence[Tensor], rows: int) -> Tensor:
    """[rows]: whether at least half of the sequences hold the id."""
    counts, sequences = torch.zeros(rows, dtype=torch.long), 0
    for ids in given:
        for own in ids.cpu():
            counts[own.unique()] += 1
            sequences += 1
    return 2 * counts >= sequences


def _ascends(ids: Tensor) -> bool:
    """As positions do."""
    return bool((ids.diff(dim=1) >= 0).all())
