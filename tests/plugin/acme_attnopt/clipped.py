"""A head edit, and a pass that requests it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnopt import AttentionSpec, HeadEdit, Pass, Rewrite, Site


@dataclass(frozen=True)
class Clipped(HeadEdit):
    """Clip the outputs of some heads to ``bound``."""

    kind: ClassVar[str] = "acme.clipped"
    heads: tuple[int, ...]
    bound: float

    @property
    def changed(self) -> tuple[int, ...]:
        return self.heads

    def apply(self, spec: AttentionSpec, o: Tensor, q: Tensor, v: Tensor, constants: Sequence[Tensor]) -> Tensor:
        of_head = dict(zip(spec.heads, o.split(1, 1), strict=True))
        return torch.cat([x.clamp(-self.bound, self.bound) if h in self.heads else x for h, x in of_head.items()], 1)

    def keeping(self, kept: Collection[int]) -> HeadEdit | None:
        left = tuple(h for h in self.heads if h in kept)
        return replace(self, heads=left) if left else None


@dataclass(frozen=True)
class Clip(Pass):
    """Clip every head output to ``bound``."""

    name: ClassVar[str] = "acme.clip"
    exact: ClassVar[bool] = False
    bound: float = 1.0

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(site.spec.followed_by(Clipped(site.spec.heads, self.bound)))
