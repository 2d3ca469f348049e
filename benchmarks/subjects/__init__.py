"""Trained models, data to calibrate on, other data to test on, and what is to be compared on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from attnopt.passes import GroupedQuery, PruneHeads


@dataclass(frozen=True)
class Rewrite:
    """``left``: what of the model is left; ``policy``: a pass, or from a seed to a pass; ``varies``: with the seed."""

    left: str
    method: str
    policy: Any
    varies: bool = True

    def of(self, seed: int) -> Any:
        return self.policy(seed) if callable(self.policy) else self.policy


class Subject(Protocol):
    name: str
    title: str
    drawn: str  # the figure to draw

    def model(self) -> torch.nn.Module:
        """The trained model, in eval mode."""

    def calibration(self, seed: int) -> Sequence[tuple[torch.Tensor, ...]]:
        """Batches of the model's inputs."""

    def dynamic_shapes(self) -> Any:
        """What of the inputs varies."""

    def rewrites(self) -> Iterator[Rewrite]:
        """What is compared."""

    def figures(self, model: torch.nn.Module) -> Mapping[str, float]:
        """What the model is worth, on data that calibration has not seen."""


def pruned(left: str, fraction: float, heads: int) -> Iterator[Rewrite]:
    """The best known of each kind, and the default; ``heads`` of one layer."""
    yield _at_random(left, fraction, heads, "none")
    yield _with(left, fraction, "weights", "none")
    yield _with(left, fraction, "flap", "bias")
    yield Rewrite(left, "default: one budget for all layers", PruneHeads(fraction))


def pruned_in_every_way(left: str, fraction: float, heads: int) -> Iterator[Rewrite]:
    """Every importance with and without the fit besides."""
    yield from pruned(left, fraction, heads)
    yield _at_random(left, fraction, heads, "least-squares")
    yield _with(left, fraction, "weights", "least-squares")
    for importance in ("wanda", "flap", "obs"):
        for compensate in ("none", "least-squares"):
            yield _with(left, fraction, importance, compensate)


def _at_random(left: str, fraction: float, heads: int, compensate: str) -> Rewrite:
    def policy(seed: int) -> PruneHeads:
        scores = torch.rand(heads, generator=torch.Generator().manual_seed(seed)).tolist()
        return PruneHeads(fraction, importance=scores, compensate=compensate, budget="site")

    return Rewrite(left, f"random, {compensate}", policy)


def _with(left: str, fraction: float, importance: str, compensate: str) -> Rewrite:
    policy = PruneHeads(fraction, importance=importance, compensate=compensate, budget="site")
    return Rewrite(left, f"{importance}, {compensate}", policy, (importance, compensate) != ("weights", "none"))


def grouped(left: str, kv_heads: int) -> Iterator[Rewrite]:
    """Every merge with and without the fit, and the default."""
    for merge in ("mean", "procrustes", "svd", "score-optimal"):
        for compensate in ("none", "least-squares"):
            grouping = "optimal" if merge == "score-optimal" else "adjacent"
            policy = GroupedQuery(kv_heads, merge, grouping, compensate, "site")
            yield Rewrite(left, f"{merge}, {grouping}, {compensate}", policy, (merge, compensate) != ("mean", "none"))
    yield Rewrite(left, "default: one budget for all layers", GroupedQuery(kv_heads))
