"""Keys and values that are averaged over pools of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from attnopt.base.notation import evaluate
from attnopt.base.options import whole, whole_tuple, wholes
from attnopt.errors import PolicyError

_LARGEST_SHOWN = 64  # pool size in a hint
Sizes = int | Sequence[int]  # one for all axes of a grid, or one for each


@dataclass(frozen=True, init=False)
class PooledKeys:
    """Each key and value that ``heads`` read is the mean of its pool, and a pool counts as one key in the softmax.

    ``size``: tokens of a pool along each axis of ``grid``, the sizes of the grid of keys in row-major order; None: one axis
    of any length.  Each size of the grid is a multiple of the pool's.
    ``prefix``: number of first keys, before the grid, that stay as they are.
    ``heads``: their numbers in the trained model.  Raises PolicyError.
    """

    size: tuple[int, ...]
    heads: tuple[int, ...]
    grid: tuple[int, ...] | None
    prefix: int

    def __init__(
        self,
        size: Sizes,
        heads: Sequence[int],
        grid: Sizes | None = None,
        prefix: int = 0,
        *,
        owner: str = "PooledKeys",
    ) -> None:
        sides = None if grid is None else whole_tuple(owner, "grid", grid, None, least=1)
        sizes = whole_tuple(owner, "size", size, 1 if sides is None else len(sides), least=1)
        for side, n in zip(sides or sizes, sizes, strict=True):
            if side % n:
                divisors = ", ".join(str(d) for d in range(1, min(side, _LARGEST_SHOWN) + 1) if side % d == 0)
                raise PolicyError(
                    f"{owner}: grid={sides!r} cannot be cut into pools of {_times(sizes)}: {side} is not a multiple of {n}",
                    hint=f"use a size that divides {side} ({divisors}), or pad the tokens to whole pools",
                )
        object.__setattr__(self, "size", sizes)
        object.__setattr__(self, "heads", wholes(owner, "heads", heads))
        object.__setattr__(self, "grid", sides)
        object.__setattr__(self, "prefix", whole(owner, "prefix", prefix))

    @property
    def tokens(self) -> int:
        """The tokens of a pool."""
        return prod(self.size)

    def fits(self, kv_len: int, step: int = 0) -> bool:
        """Whether ``kv_len`` keys make whole pools, and ``kv_len`` and any multiple of ``step`` keys, too."""
        if self.grid is not None:
            return step == 0 and kv_len == self.prefix + prod(self.grid)
        return kv_len >= self.prefix and (kv_len - self.prefix) % self.tokens == 0 and step % self.tokens == 0

    def pools(self, kv_len: int) -> int:
        """The number of pools."""
        return self.prefix + (kv_len - self.prefix) // self.tokens

    def mean(self, x_BGSD: Tensor) -> Tensor:
        """Keys or values [B, G, S, D] as the means of their pools, [B, G, pools, D]."""
        boxes = self._split(x_BGSD, list(zip(self._along(x_BGSD.shape[2]), self.size, strict=True)))
        return self._after_prefix(x_BGSD, boxes.mean(self._inner).flatten(2, -2))

    def spread(self, means_BGPD: Tensor, kv_len: int) -> Tensor:
        """What ``mean`` returned for S keys, once for each of them: [B, G, S, D]."""
        boxes = self._split(means_BGPD, [(n, 1) for n in self._along(kv_len)])
        sizes = [-1] * boxes.dim()
        for axis, r in zip(self._inner, self.size, strict=True):
            sizes[axis] = r
        return self._after_prefix(means_BGPD, boxes.expand(sizes).flatten(2, -2))

    def log_weights(self, kv_len: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[S]: minus the logarithm of the size of each key's pool."""
        pooled = torch.arange(kv_len, device=device) >= self.prefix
        return pooled.to(dtype) * -math.log(self.tokens)

    def applied(self, heads: Sequence[int], x_BHSD: Tensor) -> Tensor:
        """Keys or values of these heads; those that pool have the mean of its pool in the place of each key."""
        own = self.spread(self.mean(x_BHSD), x_BHSD.shape[2])
        return torch.cat([(own if h in self.heads else x_BHSD)[:, i : i + 1] for i, h in enumerate(heads)], 1)

    def log_weights_of(self, heads: Sequence[int], kv_len: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[H, 1, S]: ``log_weights`` for heads that pool, zeros for the others."""
        own = self.log_weights(kv_len, dtype, device)
        return torch.stack([own if h in self.heads else torch.zeros_like(own) for h in heads]).unsqueeze(1)

    def keeping(self, kept: Collection[int]) -> PooledKeys | None:
        """The same with the kept heads alone; None if none of them pools."""
        heads = [h for h in self.heads if h in kept]
        return PooledKeys(self.size, heads, self.grid, self.prefix) if heads else None

    def to_json(self) -> str:
        """The text that ``from_json`` reads back."""
        return repr(self)

    @staticmethod
    def from_json(text: str) -> PooledKeys:
        """The inverse of ``to_json``; raises PolicyError."""
        value = evaluate(text, _constructor)
        if isinstance(value, PooledKeys):
            return value
        raise PolicyError(f"{text!r} does not describe pooled keys")

    def __str__(self) -> str:
        """ "heads 2, 3 read keys pooled by 2 x 2" """
        which, read = ("head", "reads") if len(self.heads) == 1 else ("heads", "read")
        return f"{which} {', '.join(map(str, self.heads))} {read} keys pooled by {_times(self.size)}"

    @property
    def _inner(self) -> list[int]:
        """The axes within pools, of keys whose token axis is split into a pair of axes for each side."""
        return [3 + 2 * i for i in range(len(self.size))]

    def _along(self, kv_len: int) -> list[int]:
        """The number of pools along each side."""
        sides = self.grid or (kv_len - self.prefix,)
        return [side // r for side, r in zip(sides, self.size, strict=True)]

    def _split(self, x: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """The tokens after the prefix, in two axes for each side."""
        return x[:, :, self.prefix :].reshape(*x.shape[:2], *(n for pair in pairs for n in pair), x.shape[3])

    def _after_prefix(self, x: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([x[:, :, : self.prefix], rest], 2) if self.prefix else rest


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _constructor(name: str) -> Callable[..., Any]:
    if name == PooledKeys.__name__:
        return PooledKeys
    raise PolicyError(f"unknown name {name!r}")
