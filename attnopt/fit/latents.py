"""Latents: fewer numbers of a token, of which its keys and values are linear maps, in closed form.

What the key and value projections give of a token is y = [k, v], before any rotation by position.  Its best approximation of
a rank, y P, is that of y S (Eckart-Young), if S_k S_k' is the second moment of the queries that read the keys and S_v S_v' that
of the output weights, so that errors count as those of scores and outputs (as CARE and TransMLA, arXiv:2502.07864, weigh by
the covariance of the inputs, which y has in it).  Keys are compared with queries at every distance, so the moments of the
queries are averaged over the rotations between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.base.closeness import tolerance
from attnopt.fit.absorbable_maps import Pairs, ScoreMixing, as_real
from attnopt.fit.kv_sides import diagonal, output_moments, roots
from attnopt.fit.least_squares import require_tokens
from attnopt.ir.activations import Activations
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.site import Site
from attnopt.ir.statistic import Statistic

DISTANCES = 14  # between a query and its keys, at which rotations are averaged
ROUNDING = 10.0  # how much more than one operator's rounding a rotated projection may show


@dataclass(frozen=True)
class Projected:
    """Of each batch what the key and value projections give of each token without their biases, ``y`` [B, S, n], keys of all
    heads first; and the rotations of the keys, complex [B, S, D / 2], where there are some."""

    y: tuple[Tensor, ...]
    turns: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class FromOneInput(Statistic[Projected | None]):
    """None where keys are no rotated projection of what the values are projected from."""

    def measure(self, site: Site) -> Projected | None:
        mixing, now = ScoreMixing().of(site), site.activations
        assert mixing is not None
        assert now is not None
        y = _through_values(site, now, stacked(site, "k", "v"))
        keys = _keys(site, y)
        of_batch = [o.k[:, list(site.spec.kv_heads)].transpose(1, 2) for o in now.batches]
        if mixing.pairs is None:
            return Projected(y, None) if _is_multiple(of_batch, keys) else None
        turns = _turns(of_batch, keys, mixing.pairs)
        return None if turns is None else Projected(y, turns)


@dataclass(frozen=True)
class Energies(Statistic["KeysAndValues"]):
    """Raises CalibrationError."""

    def measure(self, site: Site) -> KeysAndValues:
        mixing, now, found = ScoreMixing().of(site), site.activations, FromOneInput().of(site)
        assert mixing is not None
        assert now is not None
        assert found is not None, "a pass checks it first"
        require_tokens(site, now)
        tokens = torch.cat([y[o.seen] for y, o in zip(found.y, now.batches, strict=True)]).double()
        mean = tokens.mean(0) if _has_biases(site) else torch.zeros_like(tokens[0])
        tokens = tokens - mean
        queries = _query_moments(site, now, found.turns, mixing.pairs)
        scale_k, inverse_k = roots(queries, site.num_kv_heads, site.head_dim)
        scale_v, inverse_v = roots(output_moments(site), site.num_kv_heads, site.value_dim)
        keys, values = (diagonal(scale_k), diagonal(inverse_k)), (diagonal(scale_v), diagonal(inverse_v))
        return KeysAndValues(tokens.T @ tokens / len(tokens), mean, keys, values)


@dataclass(frozen=True)
class KeysAndValues:
    """``moments`` [n, n] of y less its ``mean``; the S of keys and of values, each with its inverse."""

    moments: Tensor
    mean: Tensor
    keys: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]

    def onto(self, rank: int, weight: float) -> Tensor:
        """P [n, n] of this rank.  ``weight``: of the keys, where 1 gives their errors the same share as those of values."""
        split = len(self.keys[0])
        of_keys, of_values = self.moments[:split, :split], self.moments[split:, split:]
        energies = [float((s.T @ m @ s).trace()) for m, s in ((of_keys, self.keys[0]), (of_values, self.values[0]))]
        by = weight * (energies[1] / energies[0]) ** 0.5 if min(energies) > 0 else weight
        scale = diagonal([by * self.keys[0], self.values[0]])
        inverse = diagonal([self.keys[1] / by, self.values[1]])
        leading = torch.linalg.eigh(scale.T @ self.moments @ scale)[1][:, -rank:]
        made: Tensor = scale @ leading @ leading.T @ inverse
        return made


def latent_edits(site: Site, rank: int, weight: float) -> tuple[HeadWeights, ...]:
    """New weights of keys and values, of this rank together, and their biases.  Raises CalibrationError."""
    found = Energies().of(site)
    onto = found.onto(rank, weight)
    rows = onto.T @ stacked(site, "k", "v")
    shift = found.mean - found.mean @ onto
    edits, at = list[HeadWeights](), 0
    for role, size in (("k", site.head_dim), ("v", site.value_dim)):
        for head in site.spec.kv_heads:
            bias = site.head_bias(role, head)
            own = slice(at, at + size)
            edits.append(HeadWeights(role, head, rows[own], None if bias is None else bias.double() + shift[own]))
            at += size
    return tuple(edits)


def stacked(site: Site, *roles: str) -> Tensor:
    """[n, in] in float64: the weights of all key/value heads, role after role."""
    weights = [site.head_weight(role, h) for role in roles for h in site.spec.kv_heads]
    return torch.cat([w.double() for w in weights if w is not None])


# ------------------------------------------------------------ what the projections give
def _through_values(site: Site, now: Activations, rows: Tensor) -> tuple[Tensor, ...]:
    """For each batch [B, S, n] of other ``rows`` [n, in] in the place of the values': these reach the attention as they are."""
    heads, size = site.spec.kv_heads, site.value_dim
    room, parts = len(heads) * size, list[list[Tensor]]()
    for chunk in torch.split(rows, room):
        filled = torch.cat([chunk, torch.zeros(room - len(chunk), rows.shape[1], dtype=rows.dtype)])
        zero = None if site.projections["v"].bias is None else torch.zeros(size, dtype=rows.dtype)
        edits = [HeadWeights("v", h, w, zero) for h, w in zip(heads, torch.split(filled, size), strict=True)]
        there = now.edited(edits)
        parts.append([o.v[:, list(heads)].transpose(1, 2).flatten(2)[..., : len(chunk)] for o in there.batches])
    return tuple(torch.cat(of_batch, -1) for of_batch in zip(*parts, strict=True))


def _keys(site: Site, y: Sequence[Tensor]) -> list[Tensor]:
    """[B, S, G, D] with their biases."""
    G, D = site.num_kv_heads, site.head_dim
    biases = [b for h in site.spec.kv_heads if (b := site.head_bias("k", h)) is not None]
    bias = torch.stack(biases) if biases else 0.0
    return [part[..., : G * D].reshape(*part.shape[:2], G, D) + bias for part in y]


def _is_multiple(keys: Sequence[Tensor], projected: Sequence[Tensor]) -> bool:
    """``keys`` are the others times one factor."""
    size = sum(float(p.double().square().sum()) for p in projected)
    factor = sum(float((k.double() * p.double()).sum()) for k, p in zip(keys, projected, strict=True)) / max(
        size, 1e-300
    )
    return all(_is_close(k, factor * p) for k, p in zip(keys, projected, strict=True))


def _turns(keys: Sequence[Tensor], projected: Sequence[Tensor], pairs: Pairs) -> tuple[Tensor, ...] | None:
    """By which complex number each pair of features of a token is multiplied, in all heads; None if there is none, or if it
    changes lengths at some tokens."""
    after, before = ([_as_complex(x, pairs) for x in many] for many in (keys, projected))
    of_pairs = [torch.stack([x.abs().square().sum((0, 1, 2)) for x in many]).sum(0) for many in (after, before)]
    stretch = (of_pairs[0] / of_pairs[1].clamp(min=1e-300)).sqrt()  # a factor of rotations, the same at all tokens
    found = []
    for a, b in zip(after, before, strict=True):
        turn = (b.conj() * a).sum(2) / b.abs().square().sum(2).clamp(min=1e-300)  # [B, S, D / 2]
        lengths = _is_close(a.abs().square().sum(2).sqrt(), (b.abs().square().sum(2)).sqrt() * stretch, like=keys[0])
        if not lengths or not _is_close(a, b * turn.unsqueeze(2), like=keys[0]):
            return None
        found.append(turn)
    return tuple(found)


def _is_close(got: Tensor, want: Tensor, like: Tensor | None = None) -> bool:
    allowed = ROUNDING * tolerance([got if like is None else like])
    return bool((got - want).abs().max() <= allowed * got.abs().max())


def _as_complex(x: Tensor, pairs: Pairs) -> Tensor:
    i, j = torch.tensor(pairs).T
    return torch.complex(x[..., i].double(), x[..., j].double())


def _has_biases(site: Site) -> bool:
    return all(site.projections[role].bias is not None for role in "kv")


# ------------------------------------------------------------ what errors count
def _query_moments(site: Site, now: Activations, turns: Sequence[Tensor] | None, pairs: Pairs | None) -> Tensor:
    """[G, D, D] of the queries that read each key/value head, turned to where its keys are projected."""
    spec, D = site.spec, site.head_dim
    found = torch.zeros(site.num_kv_heads, D, D, dtype=torch.float64)
    is_own = turns is not None and all(o.q.shape[2] == o.k.shape[2] for o in now.batches)
    for n, o in enumerate(now.batches):
        q = o.q[:, list(spec.heads)].transpose(1, 2).double()  # [B, L, H, D]
        if is_own and turns is not None and pairs is not None:
            q = _as_real(_as_complex(q, pairs) * turns[n].conj().unsqueeze(2), pairs, D)
        q = q[o.real]
        for g in range(site.num_kv_heads):
            mine = q[:, [h for h, read in enumerate(spec.kv_of_head) if read == g]].flatten(0, 1)
            found[g] += mine.T @ mine
    if turns is None or pairs is None:
        return found
    if not is_own:  # at all distances alike
        return _mean([found, *(_turned(found, pairs, torch.full((len(pairs),), z)) for z in (1j, -1.0, -1j))])
    apart = _rotations(turns[0][0][now.batches[0].seen[0]])
    both = apart if site.spec.is_causal else [*apart, *(z.conj() for z in apart)]
    return _mean([_turned(found, pairs, z) for z in both])


def _rotations(turns: Tensor) -> list[Tensor]:
    """Of [S, D / 2], those between the first token and others, at distances that grow by a factor."""
    unit = turns / turns.abs().clamp(min=1e-300)
    last = len(unit) - 1
    places = sorted({0, *(round(last ** (n / (DISTANCES - 1))) for n in range(DISTANCES) if last)})
    return [unit[place] * unit[0].conj() for place in places]


def _turned(moments: Tensor, pairs: Pairs, values: Tensor) -> Tensor:
    """Of vectors whose pairs of features are multiplied by ``values``."""
    by = as_real(pairs, values, moments.shape[-1])
    return by.T @ moments @ by


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).mean(0)


def _as_real(x: Tensor, pairs: Pairs, size: int) -> Tensor:
    i, j = torch.tensor(pairs).T
    made = torch.zeros(*x.shape[:-1], size, dtype=torch.float64)
    made[..., i], made[..., j] = x.real, x.imag
    return made
