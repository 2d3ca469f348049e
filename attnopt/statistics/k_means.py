"""Groups of vectors that lie near each other: k-means."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 20
STARTS = 8  # of which the best result counts
SAME = 1e-5  # of the longest vector: closer ones differ by rounding


def coded(x_ND: Tensor, codes: int) -> Tensor:
    """For each vector the number of its centroid, [N]: k-means, started from vectors that lie far apart."""
    return _settled(x_ND, x_ND[_far_apart(x_ND, codes)])[0]


def clustered(x_ND: Tensor, clusters: int, seed: int) -> Tensor:
    """For each vector the number of its cluster, [N]: the best of several starts, those of k-means++ (Arthur and
    Vassilvitskii, 2007) and ``coded``.  The largest cluster is number 0; of equally large ones, that of the first vector."""
    generator = torch.Generator().manual_seed(seed)
    starts = [_far_apart(x_ND, clusters), *(_spread(x_ND, clusters, generator) for _ in range(STARTS - 1))]
    member, _ = min((_settled(x_ND, x_ND[start]) for start in starts), key=lambda found: found[1])
    first = {c: i for i, c in reversed(list(enumerate(member.tolist())))}
    counts = torch.bincount(member).tolist()
    order = sorted(first, key=lambda c: (-counts[c], first[c]))
    return torch.tensor([order.index(c) for c in member.tolist()])


def _far_apart(x_ND: Tensor, count: int) -> list[int]:
    """Vectors of which each is the farthest from those before; fewer if no others differ from them."""
    chosen, noise = [0], _noise(x_ND)
    while len(chosen) < count:
        nearest = torch.cdist(x_ND, x_ND[chosen]).amin(1)
        if float(nearest.amax()) <= noise:
            break
        chosen.append(int(nearest.argmax()))
    return chosen


def _spread(x_ND: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Vectors drawn by their squared distance from those before."""
    chosen, noise = [int(torch.randint(len(x_ND), (1,), generator=generator))], _noise(x_ND)
    while len(chosen) < count:
        nearest = torch.cdist(x_ND, x_ND[chosen]).amin(1)
        if float(nearest.amax()) <= noise:
            break
        chosen.append(int(torch.multinomial(nearest.cpu() ** 2, 1, generator=generator)))
    return chosen


def _settled(x_ND: Tensor, centroids: Tensor) -> tuple[Tensor, float]:
    """The number of the centroid of each vector after some steps, and the sum of the squared distances."""
    for _ in range(STEPS):
        member = torch.cdist(x_ND, centroids).argmin(1)
        counts = torch.bincount(member, minlength=len(centroids)).unsqueeze(1)
        moved = torch.zeros_like(centroids).index_add(0, member, x_ND) / counts.clamp(min=1)
        centroids = torch.where(counts > 0, moved, centroids)
    apart, member = torch.cdist(x_ND, centroids).min(1)
    return member, float((apart**2).sum())


def _noise(x_ND: Tensor) -> float:
    return SAME * float(x_ND.norm(dim=1).amax())
