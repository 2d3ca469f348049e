"""Estimates of how much a block of queries attends to each block of keys, from queries and keys alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.base.options import whole
from attnopt.errors import PolicyError
from attnopt.ir.constant import Constant


@dataclass(frozen=True)
class BlockSample:
    """One calibration batch as ``BlockScores.score`` sees it: q [B, H, N, T, D], k [B, H, M, T, D], known [N, M].

    ``q_counts`` [B, N, T] and ``k_counts`` [B, M, T] (bool): the tokens to fit on.  The others are padding, held back to check
    the fit, or repeated to complete a block.
    """

    q: Tensor
    k: Tensor
    known: Tensor
    is_causal: bool
    q_counts: Tensor
    k_counts: Tensor


class BlockScores(ABC):
    """A way to score blocks: a frozen dataclass whose repr is the call that constructs it."""

    needs_calibration: ClassVar[bool] = (
        False  # ``score`` takes ``constants=``, which ``fit`` makes from calibration data
    )

    @property
    def looks_ahead(self) -> bool:
        """The scores of a row depend on all tokens of the sequence: not for causal attentions."""
        return False

    def check(self, block: int) -> None:
        """Raises PolicyError if blocks of this size cannot be scored."""
        return

    def fit(self, samples: Sequence[BlockSample]) -> tuple[Constant, ...]:
        """What ``score`` gets as ``constants``, as tensors.  The first axis of each is that of the H heads; of a head that is
        removed later, its part goes, too.  Only called if it ``needs_calibration``.  Raises CalibrationError.
        """
        return ()

    @abstractmethod
    def score(self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool) -> Tensor:
        """Scores [B, H, N, M] of N blocks of T queries (which include the attention scale) and M blocks of T keys.

        Scores are compared within a row.  ``known_NM`` (bool): the key blocks that a row may depend on; the scores of
        these must not depend on the others, except on the first block, which every row after the first may use.
        """

    def to_json(self) -> str:
        """The text that ``parse_scores`` reads back."""
        return repr(self)


@dataclass(frozen=True)
class Pooled(BlockScores):
    """The product of the mean query and the mean key (MInference, arXiv:2407.02490)."""

    def score(self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool) -> Tensor:
        return q_BHNTD.mean(3) @ k_BHMTD.mean(3).mT


@dataclass(frozen=True)
class Antidiagonal(BlockScores):
    """Sums along every ``stride``-th antidiagonal of a block, softmax over them (XAttention, arXiv:2503.16428)."""

    stride: int = 8

    def __post_init__(self) -> None:
        whole("Antidiagonal", "stride", self.stride, least=1)

    def check(self, block: int) -> None:
        if block % self.stride:
            raise PolicyError(f"Antidiagonal: stride={self.stride} does not divide blocks of {block} tokens")

    def score(self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool) -> Tensor:
        B, H, N, T, D = q_BHNTD.shape
        M, parts = k_BHMTD.shape[2], T // self.stride
        q = q_BHNTD.reshape(B, H, N * parts, self.stride, D).flip(3).flatten(3)
        k = k_BHMTD.reshape(B, H, M * parts, self.stride * D)
        known = known_NM.repeat_interleave(parts, 0).repeat_interleave(parts, 1)
        s = (q @ k.mT / self.stride).masked_fill(~known, torch.finfo(q.dtype).min)
        return s.softmax(-1).reshape(B, H, N, parts, M, parts).sum((3, 5))


@dataclass(frozen=True)
class KMeans(BlockScores):
    """The fraction of (query, key) pairs assigned to the same centroid (Routing Transformer, arXiv:2003.05997).

    The centroids result from ``steps`` steps of spherical k-means on the keys, starting from ``clusters`` evenly spaced
    ones.  In a causal attention, only the keys of the first block are used: later rows have no other key in common.
    """

    clusters: int = 16
    steps: int = 4

    def __post_init__(self) -> None:
        whole("KMeans", "clusters", self.clusters, least=1)
        whole("KMeans", "steps", self.steps)

    def score(self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool) -> Tensor:
        q, k = F.normalize(q_BHNTD, dim=-1), F.normalize(k_BHMTD, dim=-1)
        source = k[:, :, 0] if is_causal else k.flatten(2, 3)
        count = source.shape[2]
        centroids = source.index_select(2, torch.arange(self.clusters, device=k.device) * count // self.clusters)
        for _ in range(self.steps):
            member = nearest(source, centroids)
            moved = F.normalize(member.mT @ source, dim=-1)
            centroids = torch.where(member.sum(2).unsqueeze(-1) > 0, moved, centroids)
        centroids = centroids.unsqueeze(2)
        return nearest(q, centroids).mean(3) @ nearest(k, centroids).mean(3).mT


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The centroid with the largest product, one-hot [..., clusters]."""
    found = (vectors @ centroids.mT).argmax(-1, keepdim=True)
    return (found == torch.arange(centroids.shape[-2], device=vectors.device)).to(vectors.dtype)
