"""Keys and values of all heads: the maps from each head to a shared one, and what is lost.

Keys of head g are seen as ``N_g = K_g S_g``, where S_g S_g' is the second moment of the queries that read them, so that an
error in N_g is an error in the scores.  A shared key ``c = sum_g N_g U_g`` with U the leading eigenvectors of the group's
joint moments gives back ``N_g ~ c U_g'``: the best approximation of the scores of its rank (Eckart-Young).  Values go the
same way with the output weights instead of the queries.  With rotary positions, this holds per frequency, with
complex numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.fit.absorbable_maps import Mixing, ScoreMixing, as_real
from attnopt.fit.least_squares import require_tokens
from attnopt.ir.activations import Activations
from attnopt.ir.kv_partition import Group, Loss
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic

FLOOR = 1e-6  # of the largest eigenvalue: smaller ones are clamped to it


@dataclass(frozen=True)
class Merged:
    """For each head of a group, the map into the shared head, and the map from the shared head to its readers."""

    into: tuple[Tensor, ...]
    back: tuple[Tensor, ...]


@dataclass(frozen=True)
class Side:
    """Keys or values of all heads: ``moments`` [G * D, G * D] of ``x_g S_g``, and the S_g with their inverses.

    ``pairs``: features that stay together as complex numbers; then ``moments`` are [D / 2, G, G], one matrix a frequency.
    """

    moments: Tensor
    scale: tuple[Tensor, ...]
    inverse: tuple[Tensor, ...]
    size: int
    pairs: tuple[tuple[int, int], ...] | None = None

    def loss(self, groups: Sequence[Sequence[int]]) -> Tensor:
        """For each group (all of equal size), the fraction of the moments that one head cannot represent."""
        total = _trace(self.moments)
        if len(groups[0]) == 1:
            return torch.zeros(len(groups), dtype=torch.float64)
        if self.pairs is not None:
            index = torch.tensor([list(g) for g in groups])
            blocks = self.moments[:, index[:, :, None], index[:, None, :]]
            return _rest(blocks, 1).sum(0) / total
        index = torch.tensor([[g * self.size + i for g in group for i in range(self.size)] for group in groups])
        blocks = self.moments[index[:, :, None], index[:, None, :]]
        return _rest(blocks, self.size) / total

    def merge(self, group: Sequence[int]) -> Merged:
        if self.pairs is not None:
            return self._merge_pairs(group, self.pairs)
        index = torch.tensor([g * self.size + i for g in group for i in range(self.size)])
        u = torch.linalg.eigh(self.moments[index][:, index])[1][:, -self.size :].reshape(len(group), -1, self.size)
        return Merged(
            tuple(self.scale[g] @ u[n] for n, g in enumerate(group)),
            tuple(self.inverse[g] @ u[n] for n, g in enumerate(group)),
        )

    def align(self, group: Sequence[int]) -> Merged:
        """The mean of the heads, each aligned with the first (arXiv:2412.20677): orthogonal maps are lossless."""
        turns = [self._turn(g, group[0]) for g in group]
        return Merged(tuple(t / len(group) for t in turns), tuple(turns))

    def _merge_pairs(self, group: Sequence[int], pairs: tuple[tuple[int, int], ...]) -> Merged:
        index = torch.tensor(list(group))
        u = torch.linalg.eigh(self.moments[:, index[:, None], index[None]])[1][..., -1]  # [D / 2, r]
        into, back = [], []
        for n, g in enumerate(group):
            into.append(as_real(pairs, self.scale[g] * u[:, n], self.size))
            back.append(as_real(pairs, self.inverse[g] * u[:, n], self.size))
        return Merged(tuple(into), tuple(back))

    def _turn(self, g: int, first: int) -> Tensor:
        if g == first:
            return torch.eye(self.size, dtype=torch.float64)
        if self.pairs is not None:
            across = self.moments[:, g, first]
            return as_real(self.pairs, across / across.abs().clamp(min=1e-300), self.size)
        rows, columns = (slice(h * self.size, (h + 1) * self.size) for h in (g, first))
        u, _, vh = torch.linalg.svd(self.moments[rows, columns])
        turn: Tensor = u @ vh
        return turn


@dataclass(frozen=True)
class Sides(Statistic[tuple[Side, Side]]):
    """Keys and values.  ``weighted``: by the queries and by the output projection.  Raises CalibrationError."""

    weighted: bool

    def measure(self, site: Site) -> tuple[Side, Side]:
        mixing, now = ScoreMixing().of(site), site.activations
        assert mixing is not None
        assert now is not None
        require_tokens(site, now)
        return _keys(site, now, mixing, self.weighted), _values(site, now, self.weighted)


def loss_at(site: Site, weighted: bool) -> Loss:
    """What merging the heads (original numbers) of each group loses of the keys and of the values, measured at its first
    call."""
    place = {h: n for n, h in enumerate(site.spec.kv_heads)}

    def loss(groups: Sequence[Group]) -> Tensor:
        known = _Losses(weighted).of(site)
        places = [tuple(place[h] for h in group) for group in groups]
        if missing := [p for p in dict.fromkeys(places) if p not in known]:
            keys, values = Sides(weighted).of(site)
            known.update(zip(missing, (keys.loss(missing) + values.loss(missing)).tolist(), strict=True))
        return torch.tensor([known[p] for p in places], dtype=torch.float64)

    return loss


@dataclass(frozen=True)
class _Losses(Statistic[dict[Group, float]]):
    """Of groups of places, filled as they are asked for: partitions into other numbers of groups ask for the same ones."""

    weighted: bool

    def measure(self, site: Site) -> dict[Group, float]:
        return {}


def _keys(site: Site, activations: Activations, mixing: Mixing, weighted: bool) -> Side:
    """Keys, centred in each sequence (a common offset does not change the attention).  ``weighted``: by the queries."""
    spec = site.spec
    G, D = site.num_kv_heads, site.head_dim
    readers = [[n for n, g in enumerate(spec.kv_of_head) if g == kv] for kv in range(G)]
    k_moments = torch.zeros(G * D, G * D, dtype=torch.float64)
    q_moments = torch.zeros(G, D, D, dtype=torch.float64)
    for o, weight in ((o, weight) for now, weight in activations.weighted for o in now.batches):
        k = o.k[:, list(spec.kv_heads)].transpose(1, 2).flatten(2).double()
        seen = o.seen[..., None].double()
        k = (k - (k * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)) * seen
        k_moments += weight * (k.flatten(0, 1).T @ k.flatten(0, 1))
        q = o.q[:, list(spec.heads)].transpose(1, 2)[o.real].double()
        for g in range(G):
            mine = q[:, readers[g]].flatten(0, 1)
            q_moments[g] += weight * (mine.T @ mine)
    if mixing.pairs is not None:
        return _paired(k_moments, q_moments if weighted else None, mixing.pairs, G, D)
    scale, inverse = roots(q_moments if weighted else None, G, D)
    s = diagonal(scale)
    return Side(s.T @ k_moments @ s, scale, inverse, D)


def _values(site: Site, activations: Activations, weighted: bool) -> Side:
    """Values as attention mixes them, the mean over the heads' mixtures.  ``weighted``: by the output projection."""
    spec = site.spec
    G, D = site.num_kv_heads, site.value_dim
    moments = torch.zeros(G * D, G * D, dtype=torch.float64)
    for now, weight in activations.weighted:
        for p, o in zip(now.weights(spec), now.batches, strict=True):
            v = o.v[:, list(spec.kv_heads)].transpose(1, 2).flatten(2)
            for h in range(site.num_heads):
                mixed = (p[:, h] @ v)[o.real]
                moments += weight * (mixed.T @ mixed)  # a batch in its own precision, their sum in float64
    scale, inverse = roots(output_moments(site) if weighted else None, G, D)
    s = diagonal(scale)
    return Side(s.T @ moments @ s, scale, inverse, D)


def output_moments(site: Site) -> Tensor:
    """[G, Dv, Dv] of the output weights that read each key/value head."""
    found = torch.zeros(site.num_kv_heads, site.value_dim, site.value_dim, dtype=torch.float64)
    for h, g in zip(site.spec.heads, site.spec.kv_of_head, strict=True):
        out = site.head_weight("out", h)
        assert out is not None
        found[g] += out.double() @ out.double().T
    return found


def roots(moments: Tensor | None, count: int, size: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The symmetric roots of these matrices and their inverses; of the identity if there are none."""
    if moments is None:
        eye = torch.eye(size, dtype=torch.float64)
        return (eye,) * count, (eye,) * count
    found = []
    for m in moments:
        w, u = torch.linalg.eigh(m)
        w = w.clamp(min=max(FLOOR * float(w[-1]), 1e-300)).sqrt()
        found.append(((u * w) @ u.T, (u / w) @ u.T))
    return tuple(s for s, _ in found), tuple(i for _, i in found)


def _paired(k_moments: Tensor, q_moments: Tensor | None, pairs: tuple[tuple[int, int], ...], G: int, D: int) -> Side:
    """Per frequency the inner products of the heads' keys as complex numbers, each scaled by its queries' size."""
    i, j = torch.tensor(pairs).T
    k = k_moments.reshape(G, D, G, D)  # [g, d, g', d']
    real = k[:, i, :, i] + k[:, j, :, j]  # [F, g, g'] of Re conj(x) y
    imaginary = k[:, i, :, j] - k[:, j, :, i]
    hermitian = torch.complex(real, imaginary)
    scale = torch.ones(G, len(pairs), dtype=torch.float64)
    if q_moments is not None:
        size = q_moments.diagonal(dim1=1, dim2=2)
        scale = (size[:, i] + size[:, j]).clamp(min=1e-300).sqrt()
    hermitian = hermitian * scale.T[:, :, None] * scale.T[:, None, :]
    return Side(hermitian, tuple(scale), tuple(1 / scale), D, pairs)


def _rest(blocks: Tensor, kept: int) -> Tensor:
    """The sum of all but the ``kept`` largest eigenvalues of each matrix."""
    narrow = torch.complex64 if blocks.is_complex() else torch.float32  # only compared between groups
    rest: Tensor = torch.linalg.eigvalsh(blocks.to(narrow)).double()[..., :-kept].clamp(min=0).sum(-1)
    return rest


def diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """The blocks along the diagonal of one matrix."""
    made: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return made


def _trace(moments: Tensor) -> float:
    return max(float(moments.diagonal(dim1=-2, dim2=-1).real.sum()), 1e-300)
