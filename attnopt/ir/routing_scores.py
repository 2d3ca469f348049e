"""Block scores from clusters of queries and keys that calibration data show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.base.options import number, switch, whole
from attnopt.errors import CalibrationError, PolicyError
from attnopt.ir.block_scores import BlockSample, BlockScores, nearest
from attnopt.ir.constant import Constant

_MOST = 1 << 12  # queries of a head to cluster, and keys
_STEPS = 10


@dataclass(frozen=True)
class Routing(BlockScores):
    """The number of pairs of a query and a key that have a cluster in common (Routing Transformer, arXiv:2003.05997).

    The ``clusters`` centroids of each head are those of spherical k-means on its queries and keys in the calibration data,
    from a k-means++ start drawn with ``seed``.
    ``balanced``: each centroid takes the ``width`` * L / clusters queries, and as many keys, that are nearest to it, as in the
    paper.  Which these are depends on the whole sequence, so a causal attention is refused.  Otherwise a centroid takes
    the queries that are as near as this fraction of those in the calibration data, and the keys likewise: whether a
    token is taken depends on no other.
    """

    needs_calibration: ClassVar[bool] = True
    clusters: int = 16
    balanced: bool = True
    width: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        whole("Routing", "clusters", self.clusters, least=1)
        switch("Routing", "balanced", self.balanced)
        if not 0 < number("Routing", "width", self.width) <= self.clusters:
            expected = f"expected a number above 0 and at most clusters={self.clusters}"
            raise PolicyError(f"Routing: invalid value width={self.width!r}: {expected}")
        whole("Routing", "seed", self.seed)

    @property
    def looks_ahead(self) -> bool:
        return self.balanced

    def fit(self, samples: Sequence[BlockSample]) -> tuple[Constant, ...]:
        """The centroids, [H, clusters, D], and how near to each of them a query, or a key, has to be, [H, 2, clusters]."""
        queries = _directions([(s.q, s.q_counts) for s in samples])
        keys = _directions([(s.k, s.k_counts) for s in samples])
        vectors = torch.cat([queries, keys], 1)
        if vectors.shape[1] < self.clusters:
            raise CalibrationError(
                f"{vectors.shape[1]} queries and keys are fewer than the {self.clusters} clusters",
                hint="pass more calibration data, or use fewer clusters",
            )
        centroids = self._drawn(vectors)
        for _ in range(_STEPS):
            member = nearest(vectors, centroids)
            moved = F.normalize(member.mT @ vectors, dim=-1)
            centroids = torch.where(member.sum(1).unsqueeze(-1) > 0, moved, centroids)
        bounds = []
        for x in (queries, keys):
            bounds.append((x @ centroids.mT).sort(1, descending=True).values[:, self._share(x.shape[1]) - 1])
        return Constant.of(centroids.float()), Constant.of(torch.stack(bounds, 1).float())

    def score(
        self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool, constants: Sequence[Tensor] = ()
    ) -> Tensor:
        centroids, bounds = (c.to(q_BHNTD.dtype) for c in constants)
        members = []
        for role, x_BHNTD in enumerate((q_BHNTD, k_BHMTD)):
            near = F.normalize(x_BHNTD, dim=-1).flatten(2, 3) @ centroids.mT
            taken = self._taken(near) if self.balanced else near >= bounds[:, role].unsqueeze(1)
            sizes = (*x_BHNTD.shape[:4], self.clusters)
            members.append(taken.to(near.dtype).reshape(sizes).sum(3))
        made: Tensor = members[0] @ members[1].mT
        return made

    def _taken(self, near_BHLC: Tensor) -> Tensor:
        """Bool, [B, H, L, clusters]: for each centroid as many tokens, the nearest; of tokens as near the first."""
        count = self._share(near_BHLC.shape[2])
        place = torch.full((*near_BHLC.shape[:2], 1, self.clusters), 1, device=near_BHLC.device) * (count - 1)
        least = near_BHLC.sort(2, descending=True).values.gather(2, place)
        above, tied = near_BHLC > least, near_BHLC == least
        left = count - above.sum(2, keepdim=True)
        return above | (tied & (tied.cumsum(2) <= left))

    def _share(self, tokens: int) -> int:
        """How many of the tokens a centroid takes; in whole numbers, because ONNX rounds fractions otherwise."""
        part = Fraction(self.width).limit_denominator(1 << 16) / self.clusters
        return (tokens * part.numerator + part.denominator - 1) // part.denominator

    def _drawn(self, vectors_HPD: Tensor) -> Tensor:
        """Vectors that are far from each other: each is drawn in proportion to its distance from those drawn before."""
        g = torch.Generator().manual_seed(self.seed)
        every = torch.arange(vectors_HPD.shape[0])
        apart = torch.ones(vectors_HPD.shape[:2], dtype=torch.float64)
        drawn: list[Tensor] = []
        for _ in range(self.clusters):
            place = torch.multinomial(apart.clamp(min=1e-12), 1, generator=g)[:, 0]
            drawn.append(vectors_HPD[every, place])
            apart = torch.minimum(
                apart if len(drawn) > 1 else 2 * apart, 1 - (vectors_HPD @ drawn[-1].unsqueeze(-1))[..., 0]
            )
        return torch.stack(drawn, 1)


def _directions(given: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The tokens [B, H, N, T, D] that count [B, N, T], at most ``_MOST`` of them, as unit vectors [H, tokens, D]."""
    found = torch.cat([x.transpose(0, 1)[:, counts] for x, counts in given], 1)
    every = 1 + (found.shape[1] - 1) // _MOST
    return F.normalize(found[:, ::every].double().cpu(), dim=-1)
