"""Softmax weights mixed with a map that no input changes, as values of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx.node import Target

from attnopt.graph.axes import Axes
from attnopt.match.read_scores import Operand


@dataclass(frozen=True)
class Computed:
    """A tensor computed from others: ``args`` are values, and plain arguments of ``target``."""

    target: Target
    args: tuple[Any, ...]


Value = float | Operand | Computed


@dataclass(frozen=True)
class Mixture:
    """``keep * weights + added``, laid out along ``axes``.  Neither depends on an input, and ``keep`` not on the keys."""

    keep: Value
    added: Value
    axes: Axes

    @property
    def operands(self) -> Iterator[Operand]:
        """The tensors of the graph that both are computed from."""
        yield from operands_of(self.keep)
        yield from operands_of(self.added)


def operands_of(value: object) -> Iterator[Operand]:
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, Computed):
        for x in value.args:
            yield from operands_of(x)
