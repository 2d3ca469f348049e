"""Block scores by name."""

from __future__ import annotations

import re

from attnopt.base.notation import Lookup, evaluate
from attnopt.base.registry import Registry
from attnopt.errors import PolicyError
from attnopt.ir.block_scores import Antidiagonal, BlockScores, KMeans, Pooled
from attnopt.ir.low_rank_scores import LowRank
from attnopt.ir.routing_scores import Routing

SCORES = Registry(
    "attnopt.block_scores",
    "block score",
    BlockScores,  # type: ignore[type-abstract]
    {kind.__name__: kind for kind in (Pooled, Antidiagonal, KMeans, LowRank, Routing)},
)

_NAME = re.compile(r"\s*[A-Za-z][\w.-]*")


def constructor(name: str) -> type[BlockScores]:
    """The block score class of this name, case-insensitive; raises PolicyError."""
    return SCORES.load(next((known for known in SCORES.listed() if known.lower() == name.lower()), name))


def parse_scores(text: str, lookup: Lookup = constructor) -> BlockScores:
    """Read a name with or without options, such as ``"antidiagonal(stride=16)"`` or ``"low-rank"``; raises PolicyError."""
    value = evaluate(_NAME.sub(lambda m: m[0].replace("-", ""), text, count=1), lookup, shown=text)
    if isinstance(value, BlockScores):
        return value
    raise PolicyError(f"unknown block scores {text!r}", hint=f"use one of {', '.join(map(spelled, SCORES.listed()))}")


def spelled(name: str) -> str:
    """The name of a class as texts write it: "low-rank"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
