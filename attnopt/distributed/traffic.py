"""Sizes of one attention, and what a rank is sent in one step: for the choice between methods, and for plans."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnopt.errors import PolicyError


@dataclass(frozen=True, eq=False)
class Arriving:
    """What each rank is sent in each step [steps, ranks]: the messages, one from each rank that sends, and their bytes."""

    messages: NDArray[np.int64]
    bytes: NDArray[np.int64]

    @classmethod
    def evenly(cls, messages: int, size: int) -> Arriving:
        """In one step, the same for every rank."""
        return cls(np.array([[messages]]), np.array([[size]]))

    @property
    def totals(self) -> tuple[int, ...]:
        """The bytes that each rank is sent in all steps."""
        return tuple(self.bytes.sum(0).tolist())


@dataclass(frozen=True)
class Link:
    """A model of the way between two ranks: a message of n bytes takes ``latency + n / bandwidth``, in seconds and bytes a second
    of each rank."""

    latency: float = 1e-5
    bandwidth: float = 2.5e10

    def __post_init__(self) -> None:
        if not (self.latency >= 0 and self.bandwidth > 0):
            raise PolicyError(f"invalid value {self}: expected a latency of at least 0 and a bandwidth of more than 0")

    def seconds(self, steps: Arriving) -> float:
        """Of steps that begin when the slowest rank has ended the one before."""
        each = steps.messages * self.latency + steps.bytes / self.bandwidth
        return fsum(each.max(1).tolist())  # the same on every machine, since ranks choose by it


@dataclass(frozen=True)
class Sizes:
    """q [B, H, .., D], k [B, G, .., D], v [B, G, .., Dv] of one attention."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Sizes:
        (B, H, _, D), G = q.shape, k.shape[1]
        return cls(B, H, G, D, v.shape[3], (q.dtype, k.dtype, v.dtype))

    @property
    def of_key(self) -> int:
        """Bytes of one token's keys and values, as they travel together."""
        _, k, v = self.dtypes
        return self.batch * self.kv_heads * (self.dim + self.value_dim) * torch.promote_types(k, v).itemsize

    @property
    def of_sum(self) -> int:
        """Bytes of one token's output so far, and the two parts of its log-sum-exp."""
        return (
            self.batch * self.heads * (self.value_dim + 2) * torch.promote_types(self.dtypes[0], torch.float32).itemsize
        )

    def of_operands(self, heads: int, kv_heads: int) -> int:
        """Bytes of one token's queries, keys and values of some heads, as they travel together."""
        q, k, v = self.dtypes
        kind = torch.promote_types(q, torch.promote_types(k, v))
        return self.batch * (heads * self.dim + kv_heads * (self.dim + self.value_dim)) * kind.itemsize

    def of_output(self, heads: int) -> int:
        """Bytes of one token's output of some heads."""
        return self.batch * heads * self.value_dim * self.dtypes[2].itemsize
