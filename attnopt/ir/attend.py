"""An attention as a function of tensors."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Attend(Protocol):
    """A lowered attention: a plain function of tensors.

    ``q`` [B, H, L, D], ``k`` [B, G, S, D], ``v`` [B, G, S, Dv]; ``bias`` and ``mask`` broadcast to [B, H, L, S],
    ``sinks`` to [B, H, L, 1]; each of the last three is None unless the spec has it.  Returns [B, H, L, Dv].
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor: ...


class AttendWithLse(Protocol):
    """As ``Attend``, with the log-sum-exp of each row of scores, sink included, in two parts whose sum it is, [B, H, L], float32
    or wider: the largest score, -inf where a query sees nothing, and the logarithm of the sum of exponentials relative to it, 0
    there.  Apart, because the second would be lost beside scores of -1e9.  Gradients flow to the second alone.

    Outputs over disjoint keys merge into that over all of them with weights ``exp`` of the log-sum-exps."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class RoutedAttend(Protocol):
    """As ``Attend``; rows outside ``wanted``, bool [B, H, L], may be anything finite."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        mask: Tensor | None,
        sinks: Tensor | None,
        wanted: Tensor | None = None,
    ) -> Tensor: ...
