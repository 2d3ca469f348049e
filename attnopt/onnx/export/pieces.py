"""New nodes of a file compared one by one, each on the file's own values.

Where a file rounds activations to few bits, a difference that rounding makes may come out as a whole step and grow from layer
to layer; within one piece it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from attnopt.base.closeness import ROOM, difference, tolerance
from attnopt.onnx.export.builder import Array
from attnopt.onnx.load.read import read
from attnopt.onnx.load.unread import Runs


@dataclass(frozen=True)
class Piece:
    """``module`` computes in torch what the file calls ``output``.  ``inputs``: weights, and names of values in the file."""

    module: fx.GraphModule
    inputs: tuple[str | Tensor, ...]
    output: str


def agree(pieces: Sequence[Piece], file: Path, feed: Mapping[str, Array]) -> bool:
    """Every piece computes in ``file`` what it computes in torch."""
    names = [name for p in pieces for name in (*p.inputs, p.output) if isinstance(name, str)]
    values = Runs(read(file), (dict(feed),)).example(list(dict.fromkeys(names)))
    there = {name: torch.from_numpy(x) for name, x in values.items()}
    return all(_agrees(p, there) for p in pieces)


def _agrees(piece: Piece, there: Mapping[str, Tensor]) -> bool:
    (want,) = piece.module(*(there[x] if isinstance(x, str) else x for x in piece.inputs))
    return difference([there[piece.output].to(want.dtype)], [want]) <= ROOM * tolerance([want])
