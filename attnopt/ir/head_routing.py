"""Routing of tokens to heads, by a router that reads the queries of the token."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from attnopt.ir.call_tensor import Source
from attnopt.ir.constant import Constant
from attnopt.ir.head_edits import HeadEdit, HeadMap


@dataclass(frozen=True)
class SoftGates:
    """The factors of used heads: ``shared`` for those that serve every token; for the others, ``routed`` times their number times
    softmax(``sharpness`` * score) over those that the token uses, so that their mean is ``routed``.

    These are the gates of MoH (arXiv:2410.11842), with alpha_1 and alpha_2 the same for all tokens, and shared heads that count
    alike.
    """

    shared: float
    routed: float
    sharpness: float

    def of_routed(self, scores_BRL: Tensor, chosen_BRL: Tensor, count: int) -> Tensor:
        """0 where a head is not chosen."""
        if count == 0:
            return torch.zeros_like(scores_BRL)
        logits = (self.sharpness * scores_BRL).masked_fill(~chosen_BRL, -torch.inf)
        return self.routed * count * logits.softmax(1)

    def __str__(self) -> str:
        return f", weighted {self.shared:.3g} and {self.routed:.3g} x softmax({self.sharpness:.3g} x score)"


@dataclass(frozen=True)
class Routed(HeadEdit):
    """Heads ``shared`` serve every token; of the heads ``routed``, each token uses the ``count`` with the highest
    scores (ties go to the first), and the output of the others is zero.

    ``router`` None: the score of a head is the norm of its query.  Otherwise float32 [H * D + 1, len(routed)]: scores
    linear in the concatenated queries of all heads, with the bias in the last row.  NaN counts as the highest score.

    ``soft``: heads that are used are also multiplied, as in MoH; None: by 1.
    """

    kind: ClassVar[str] = "routed"
    shared: tuple[int, ...]
    routed: tuple[int, ...]
    count: int
    router: Constant | None = None
    soft: SoftGates | None = None

    @property
    def changed(self) -> tuple[int, ...]:
        return ()

    @property
    def share(self) -> float:
        """The fraction of (token, head) pairs that are used."""
        return (len(self.shared) + self.count) / (len(self.shared) + len(self.routed))

    @property
    def tensors(self) -> tuple[Source, ...]:
        return () if self.router is None else (self.router,)

    def gates(self, spec: HeadMap, q: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Bool [B, H, L]: the heads that each token uses."""
        chosen = _highest(self._scores(spec, q, tensors), self.count)
        return self._of_all(spec, chosen, torch.ones_like(chosen[:, :1]))

    def apply(self, spec: HeadMap, o: Tensor, q: Tensor, v: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        if self.soft is not None:
            return o * self.weights(spec, q, tensors).unsqueeze(-1).to(o.dtype)
        return o.masked_fill(~self.gates(spec, q, tensors).unsqueeze(-1), 0.0)

    def weights(self, spec: HeadMap, q: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """[B, H, L]: the factor of each head for each token."""
        assert self.soft is not None
        scores = self._scores(spec, q, tensors)
        routed = self.soft.of_routed(scores, _highest(scores, self.count), self.count)
        return self._of_all(spec, routed, torch.full_like(routed[:, :1], self.soft.shared))

    def _of_all(self, spec: HeadMap, routed: Tensor, shared: Tensor) -> Tensor:
        """[B, H, L] from what is of the routed heads, [B, R, L], and of each shared one, [B, 1, L]."""
        order = {h: i for i, h in enumerate(self.routed)}
        return torch.cat([routed[:, i : i + 1] if (i := order.get(h)) is not None else shared for h in spec.heads], 1)

    def _scores(self, spec: HeadMap, q: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """[B, len(routed), L]"""
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        if self.router is None:
            squared = wide.square().sum(-1)
            places = [spec.heads.index(h) for h in self.routed]
            return torch.cat([squared[:, place : place + 1] for place in places], 1)
        (router,) = tensors
        router = router.to(wide.dtype)
        return (wide.transpose(1, 2).flatten(2) @ router[:-1] + router[-1]).transpose(1, 2)

    def keeping(self, kept: Collection[int]) -> Routed:
        if not {*self.shared, *self.routed} <= set(kept):
            raise ValueError("heads that tokens are routed to cannot be removed; prune before routing")
        return self

    def to_json(self) -> dict[str, Any]:
        router = None if self.router is None else self.router.to_json()
        return {
            "kind": self.kind, "shared": list(self.shared), "routed": list(self.routed), "count": self.count,
            "router": router, "soft": None if self.soft is None else asdict(self.soft),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        router = None if data["router"] is None else Constant.from_json(data["router"])
        shared, routed = (tuple(map(int, data[name])) for name in ("shared", "routed"))
        soft = None if data["soft"] is None else SoftGates(**{name: float(x) for name, x in data["soft"].items()})
        return cls(shared, routed, int(data["count"]), router, soft)

    def __str__(self) -> str:
        always = f"heads {', '.join(map(str, self.shared))} and " if self.shared else ""
        by = "query norm" if self.router is None else "a linear router"
        return f"{always}{self.count} of {len(self.routed)} heads for each token by {by}{self.soft or ''}"


def _highest(scores_BRL: Tensor, count: int) -> Tensor:
    """Bool: the ``count`` highest over the second axis, of equal ones the first."""
    if count == 0:
        return torch.zeros_like(scores_BRL, dtype=torch.bool)
    least = scores_BRL.topk(count, 1).values[:, -1:]
    above, tied = scores_BRL > least, scores_BRL == least
    left = count - above.sum(1, keepdim=True)
    return above | (tied & (tied.cumsum(1) <= left)) | scores_BRL.isnan()
