"""Scores of blocks and of rows, by name."""

from __future__ import annotations

import re
from typing import TypeVar

from attnopt.base.notation import Lookup, evaluate
from attnopt.base.registry import Registry
from attnopt.errors import PolicyError
from attnopt.ir.block_scores import Antidiagonal, BlockScores, KMeans, Pooled
from attnopt.ir.low_rank_scores import LowRank
from attnopt.ir.routing_scores import Routing
from attnopt.ir.row_scores import Norm, Received, RowScores

SCORES = Registry(
    "attnopt.block_scores",
    "block score",
    BlockScores,  # type: ignore[type-abstract]
    {kind.__name__: kind for kind in (Pooled, Antidiagonal, KMeans, LowRank, Routing)},
)
ROW_SCORES = Registry(
    "attnopt.row_scores",
    "row score",
    RowScores,  # type: ignore[type-abstract]
    {kind.__name__: kind for kind in (Norm, Received)},
)

T = TypeVar("T")
_NAME = re.compile(r"\s*[A-Za-z][\w.-]*")


def constructor(name: str) -> type[BlockScores]:
    """The block score class of this name, case-insensitive; raises PolicyError."""
    return _loaded(SCORES, name)


def row_constructor(name: str) -> type[RowScores]:
    """The row score class of this name, case-insensitive; raises PolicyError."""
    return _loaded(ROW_SCORES, name)


def parse_scores(text: str, lookup: Lookup = constructor) -> BlockScores:
    """Read a name with or without options, such as ``"antidiagonal(stride=16)"`` or ``"low-rank"``; raises PolicyError."""
    return _parsed(SCORES, text, lookup)


def parse_row_scores(text: str, lookup: Lookup = row_constructor) -> RowScores:
    """Read a name with or without options, such as ``"received(stride=8)"``; raises PolicyError."""
    return _parsed(ROW_SCORES, text, lookup)


def spelled(name: str) -> str:
    """The name of a class as texts write it: "low-rank"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


def _loaded(kinds: Registry[T], name: str) -> type[T]:
    return kinds.load(next((known for known in kinds.listed() if known.lower() == name.lower()), name))


def _parsed(kinds: Registry[T], text: str, lookup: Lookup) -> T:
    value = evaluate(_NAME.sub(lambda m: m[0].replace("-", ""), text, count=1), lookup, shown=text)
    if isinstance(value, kinds.base):
        return value
    raise PolicyError(f"unknown {kinds.kind}s {text!r}", hint=f"use one of {', '.join(map(spelled, kinds.listed()))}")
