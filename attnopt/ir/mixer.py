"""What mixes the values of tokens in the place of attention weights: the interface, which third parties implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

from attnopt.ir.constant import Constant, Weight
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site


@dataclass(frozen=True)
class Tokens:
    """What a mixer reads.  ``q``, ``k`` [B, H, L, D] and ``v`` [B, H, L, Dv]: those that each head reads; values of hidden tokens
    are zeros.  ``seen``: bool [B|1, L], False for hidden tokens, such as padding; None: there are none."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor | None = None


@dataclass(frozen=True)
class Pairs:
    """One batch to fit on: what a mixer reads, and ``o`` [B, H, L, Dv], the outputs of the heads in the original model.

    ``on`` and ``held``: bool [B, L], the tokens to fit on and those that are held back; padding is in neither."""

    tokens: Tokens
    o: Tensor
    on: Tensor
    held: Tensor


class Mixer(ABC):
    """A way to mix the values of tokens without attention weights: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    reads_keys: ClassVar[bool] = False  # ``mix`` reads q and k: their projections stay
    any_length: ClassVar[bool] = True  # one set of weights serves sequences of every length
    by_head: ClassVar[bool] = True  # the first axis of each weight is that of heads, each of which is mixed by itself
    looks_ahead: ClassVar[bool] = True  # what a token gets may depend on later ones

    def at(self, site: Site) -> Self:
        """The mixer with what only the site decides, such as whether it is causal."""
        return self

    def check(self, site: Site) -> Refusal | None:
        """Why it cannot take the place of this attention, or None."""
        return None

    @abstractmethod
    def mix(self, x: Tokens, weights: Sequence[Tensor]) -> Tensor:
        """The head outputs [B, H, L, Dv].  Differentiable, traceable, and the same function at every batch size."""

    def fit(self, pairs: Sequence[Pairs]) -> Sequence[Tensor] | None:
        """The weights nearest to ``pairs`` in closed form; None: they are found by gradients, from ``start``."""
        return None

    def start(self, site: Site) -> Sequence[Tensor]:
        """The weights to begin with where there is no closed form, in float32."""
        raise NotImplementedError(f"{type(self).__name__} has neither a closed form nor a start")

    def stored(self, weights: Sequence[Tensor]) -> tuple[Constant, ...]:
        """Fitted weights as part of a spec: training may change them."""
        return tuple(Weight.of(w.detach().float()) for w in weights)

    def work(self, length: int) -> int:
        """Multiplications for one channel of one sequence."""
        return length

    def to_json(self) -> str:
        """The text that ``attnopt.ir.mixer_registry.mixer`` reads back: the name, and options that differ from their default."""
        given = [f for f in fields(self) if f.init and getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        options = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in given)
        return f"{self.name}({options})" if options else self.name

    def __str__(self) -> str:
        return self.to_json()


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
