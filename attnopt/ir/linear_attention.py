"""Linear attention: products of positive features in the place of a softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.base.options import whole
from attnopt.ir.mixer import Mixer, Tokens, wide
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site


@dataclass(frozen=True)
class LinearAttention(Mixer):
    """``o = f(q) (g(k)^T v) / (f(q) g(k)^T 1)`` with learned features ``softmax([x W, -x W])`` of queries and keys (Hedgehog,
    arXiv:2402.04347).

    Time and memory are linear in the length.  ``features``: the columns of W, of which each gives two features; None: as many as
    the head has.  There is no closed form: it is distilled.  Raises PolicyError.
    """

    name: ClassVar[str] = "linear-attention"
    reads_keys: ClassVar[bool] = True
    features: int | None = None

    def __post_init__(self) -> None:
        if self.features is not None:
            whole(self.name, "features", self.features, least=1)

    def check(self, site: Site) -> Refusal | None:
        if not site.spec.is_causal:
            return None
        return site.refuse(
            "looks-ahead",
            expected="queries that may see later keys",
            found=f"{site.spec.visible_pattern}, and one sum over all keys serves every query",
            hint="use conv, which is causal here",
        )

    def mix(self, x: Tokens, weights: Sequence[Tensor]) -> Tensor:
        v = wide(x.v)
        q, k = (_features(wide(given), w.to(v.dtype)) for given, w in zip((x.q, x.k), weights, strict=True))
        if x.seen is not None:
            k = k * x.seen[:, None, :, None].to(k.dtype)
        mixed = q @ (k.mT @ v)
        total = (q * k.sum(2, keepdim=True)).sum(3, keepdim=True)
        return (mixed / total.clamp(min=torch.finfo(total.dtype).tiny)).to(x.v.dtype)

    def start(self, site: Site) -> Sequence[Tensor]:
        """As many columns of one: the features of a query and of an equal key agree."""
        D, scale = site.head_dim, abs(site.scale) ** 0.5
        eye = torch.eye(D, self.features or D) * scale
        return [eye.expand(site.num_heads, -1, -1).clone() for _ in range(2)]

    def work(self, length: int) -> int:
        return 4 * (self.features or 1) * length


def _features(x: Tensor, w: Tensor) -> Tensor:
    projected = x @ w
    return torch.cat([projected, -projected], -1).softmax(-1)
