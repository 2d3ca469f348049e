"""Shared values, fitted under the attention weights: one half of alternating least squares.

With the new attention weights p_h and the current values v of a group, the shared value is ``v T``; the layer outputs
``sum_h (p_h v) T O_h``.  For fixed output weights O_h that is linear in the T of all groups, and solved for them together
by conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.fit.least_squares import output_weights, with_ones
from attnopt.ir.activations import Activations
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec

ROUNDS = 30  # of conjugate gradients, at most
ENOUGH = 1e-8  # of the squared residual at the start
SHRINKAGE = 1e-3  # of the mean square of a regressor
LARGEST = 2560  # regressors beyond which the values stay as they are


@dataclass(frozen=True)
class _Block:
    """The regressors of one query head: (p_h v) of the heads in its group."""

    head: int  # index of the query head
    group: int
    at: slice


def better_values(
    site: Site, now: Activations, spec: AttentionSpec, groups: Sequence[Sequence[int]], maps: Sequence[Tensor],
    out: Tensor,
) -> list[Tensor] | None:  # fmt: skip
    """For each group, the map [len(group) * Dv, Dv] from the current values to the shared one; None if too large.

    ``now``: the activations of the site with its new weights under ``spec``; ``maps``: the current maps; ``out``
    [H * Dv + 1, out]: the output weights, fixed meanwhile.
    """
    blocks, start = list[_Block](), 0
    for head, group in enumerate(spec.kv_of_head):
        size = len(groups[group]) * spec.value_dim
        blocks.append(_Block(head, group, slice(start, start + size)))
        start += size
    if start > LARGEST:
        return None
    per_head = out[:-1].reshape(spec.num_heads, spec.value_dim, -1)
    gram, across = (m.float() for m in _moments(site, now, spec, groups, blocks, out))
    maps, per_head = [m.float() for m in maps], per_head.float()

    def through(image: Tensor) -> list[Tensor]:
        """[regressors, out] with respect to the maps."""
        found = [torch.zeros_like(m) for m in maps]
        for b in blocks:
            found[b.group] += image[b.at] @ per_head[b.head].T
        return found

    def apply(steps: Sequence[Tensor]) -> list[Tensor]:
        image = gram @ torch.cat([steps[b.group] @ per_head[b.head] for b in blocks])
        return [f + reg * t for f, t in zip(through(image), steps, strict=True)]

    reg = SHRINKAGE * float(gram.diagonal().mean() * per_head.square().sum() / per_head[0, :, 0].numel() / len(groups))
    return [(m + s).double() for m, s in zip(maps, _conjugate_gradients(apply, through(across)), strict=True)]


def _moments(
    site: Site, now: Activations, spec: AttentionSpec, groups: Sequence[Sequence[int]], blocks: Sequence[_Block],
    out: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of the regressors, and with the residual of the layer."""
    wanted = output_weights(now.site)
    assert wanted is not None
    assert site.activations is not None
    size = blocks[-1].at.stop
    gram = torch.zeros(size, size, dtype=torch.float64)
    across = torch.zeros(size, out.shape[1], dtype=torch.float64)
    streams = (
        (weight, *of_batch)
        for (part, weight), (before, _) in zip(now.weighted, site.activations.weighted, strict=True)
        for of_batch in zip(
            part.weights(spec), part.outputs(spec), part.given, before.batches, part.counted(False), strict=True
        )
    )
    for weight, p, z, y, operands, counted in streams:
        values = [operands.v[:, [site.spec.kv_heads[g] for g in group]].transpose(1, 2).flatten(2) for group in groups]
        mixed = torch.cat([(p[:, b.head] @ values[b.group])[counted] for b in blocks], 1).float()
        wrong = (with_ones(y, counted) @ wanted - with_ones(z, counted) @ out).float()
        gram += weight * (mixed.T @ mixed)  # single precision is enough: the step is shrunk, and checked afterwards
        across += weight * (mixed.T @ wrong)
    return gram, across


def _conjugate_gradients(apply: Callable[[Sequence[Tensor]], list[Tensor]], right: list[Tensor]) -> list[Tensor]:
    """x with apply(x) = right, for a symmetric positive ``apply``."""
    x, residual = [torch.zeros_like(r) for r in right], right
    direction, size = residual, _dot(residual, residual)
    start = size
    for _ in range(ROUNDS):
        if size <= ENOUGH * start:
            break
        image = apply(direction)
        step = size / _dot(direction, image)
        x = [a + step * b for a, b in zip(x, direction, strict=True)]
        residual = [a - step * b for a, b in zip(residual, image, strict=True)]
        new = _dot(residual, residual)
        direction = [a + (new / size) * b for a, b in zip(residual, direction, strict=True)]
        size = new
    return x


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
