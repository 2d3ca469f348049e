"""Block scores from queries and keys of few features, which calibration data choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.base.options import number, whole
from attnopt.errors import CalibrationError, PolicyError
from attnopt.ir.block_scores import BlockSample, BlockScores
from attnopt.ir.constant import Constant


@dataclass(frozen=True)
class LowRank(BlockScores):
    """The attention of means of ``queries`` queries to means of ``keys`` keys, with ``rank`` features instead of D, summed over
    blocks (after Sparsifiner, arXiv:2303.13755, whose predictor is trained; this one is fitted in closed form).

    ``rank``: a number of features, at most D, or a fraction of D (above 0, at most 1.0, rounded up).

    The maps of queries and keys to these features are, head by head, those of this rank whose products are nearest to the
    scores on the calibration data, keys less their mean over the sequence, which changes no softmax: the truncated SVD
    of the root of the queries' second moments times that of the keys'.
    """

    needs_calibration: ClassVar[bool] = True
    rank: int | float = 0.25
    queries: int = 8
    keys: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.rank, float) and not 0 < number("LowRank", "rank", self.rank) <= 1:
            expected = "expected an integer from 1, or a fraction above 0 and at most 1.0"
            raise PolicyError(f"LowRank: invalid value rank={self.rank!r}: {expected}")
        if not isinstance(self.rank, float):
            whole("LowRank", "rank", self.rank, least=1)
        whole("LowRank", "queries", self.queries, least=1)
        whole("LowRank", "keys", self.keys, least=1)

    def check(self, block: int) -> None:
        for option in ("queries", "keys"):
            if block % (size := getattr(self, option)):
                raise PolicyError(f"LowRank: {option}={size} does not divide blocks of {block} tokens")

    def fit(self, samples: Sequence[BlockSample]) -> tuple[Constant, ...]:
        """The maps of queries and of keys, [H, D, rank] each."""
        features = samples[0].q.shape[-1]
        tokens = sum(int(s.k_counts.sum()) for s in samples)
        if tokens < features:
            raise CalibrationError(
                f"{tokens} calibration tokens are fewer than the {features} features of a head",
                hint='pass more calibration data, or use scores="antidiagonal"',
            )
        of_q = [_moments(*_means(s.q, s.q_counts, self.queries), is_centred=False) for s in samples]
        of_k = [_moments(*_means(s.k, s.k_counts, self.keys), is_centred=True) for s in samples]
        (root_q, inverse_q), (root_k, inverse_k) = (_roots(torch.stack(of).sum(0)) for of in (of_q, of_k))
        u, sizes, v = torch.linalg.svd(root_q @ root_k)
        rank = min(features, self.rank if isinstance(self.rank, int) else ceil(self.rank * features - 1e-9))
        half = sizes[:, None, :rank].sqrt()
        made = inverse_q @ (u[..., :rank] * half), inverse_k @ (v.mT[..., :rank] * half)
        return tuple(Constant.of(x.float()) for x in made)

    def score(
        self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool, constants: Sequence[Tensor] = ()
    ) -> Tensor:
        B, H, N, T, D = q_BHNTD.shape
        M, of_row, of_column = k_BHMTD.shape[2], T // self.queries, T // self.keys
        map_q, map_k = (c.to(q_BHNTD.dtype) for c in constants)
        q = q_BHNTD.reshape(B, H, N * of_row, self.queries, D).mean(3) @ map_q
        k = k_BHMTD.reshape(B, H, M * of_column, self.keys, D).mean(3) @ map_k
        known = known_NM.repeat_interleave(of_row, 0).repeat_interleave(of_column, 1)
        s = (q @ k.mT).masked_fill(~known, torch.finfo(q.dtype).min)
        return s.softmax(-1).reshape(B, H, N, of_row, M, of_column).sum((3, 5))


def _means(x_BHNTD: Tensor, counts_BNT: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The means over ``size`` tokens each, of those that count, [B, H, P, D], and how many these are, [B, 1, P, 1]; float64."""
    B, H, N, T, D = x_BHNTD.shape
    counts = counts_BNT.double().reshape(B, 1, N * T // size, size, 1)
    many = counts.sum(3)
    x = (x_BHNTD.double().reshape(B, H, N * T // size, size, D) * counts).sum(3)
    return x / many.clamp(min=1), many


def _moments(x_BHPD: Tensor, many: Tensor, is_centred: bool) -> Tensor:
    """The sums of products of two features, [H, D, D]."""
    if is_centred:
        x_BHPD = x_BHPD - (x_BHPD * many).sum(2, keepdim=True) / many.sum(2, keepdim=True).clamp(min=1)
    return torch.einsum("bhpd,bhpe->hde", x_BHPD * many, x_BHPD)


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric roots, and their inverses on the space in which there is anything."""
    sizes, vectors = torch.linalg.eigh(moments)
    there = sizes > 1e-10 * sizes[:, -1:]
    roots = sizes.clamp(min=0).sqrt()
    inverses = torch.where(there, 1 / roots.masked_fill(~there, 1.0), 0.0)
    return (vectors * roots[:, None]) @ vectors.mT, (vectors * inverses[:, None]) @ vectors.mT
