"""How much the rows of queries matter, from queries, keys and the weight that tokens receive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.base.options import whole
from attnopt.errors import PluginError

STEPS = 4096  # of a logarithm: what differs by less than rounding could tell counts as the same
Receive = Callable[[int], Tensor]


class RowScores(ABC):
    """A way to score queries: a frozen dataclass whose repr is the call that constructs it."""

    of_keys: ClassVar[bool] = False  # it scores tokens as keys: queries and keys have to be the same tokens

    @abstractmethod
    def score(self, q_BHLD: Tensor, k_BHSD: Tensor, *, real_BL: Tensor | None, received: Receive) -> Tensor:
        """Scores [B, L], or [B, H, L] for a choice of each head's own, in any floating-point type.  The highest are kept, of
        equal ones the first; NaN counts as the highest.

        ``q_BHLD``, ``k_BHSD``: of the heads that choose, as the scores of the attention read them.
        ``real_BL``: False for padding, which is never chosen; None: there is none.
        ``received(n)``: [B, L], the weight that each token receives, as a key, from every n-th query and all heads, relative to
        the mean of all tokens.
        """

    def voters(self, q_len: int) -> int:
        """The number of queries whose products with all keys it computes."""
        return 0

    def to_json(self) -> str:
        """The text that ``parse_row_scores`` reads back."""
        return repr(self)


@dataclass(frozen=True)
class Norm(RowScores):
    """The norm of the queries of all heads: what is large is likely to be decided.  It costs next to nothing."""

    def score(self, q_BHLD: Tensor, k_BHSD: Tensor, *, real_BL: Tensor | None, received: Receive) -> Tensor:
        wide = torch.promote_types(q_BHLD.dtype, torch.float32)
        return q_BHLD.to(wide).square().sum((1, 3))


@dataclass(frozen=True)
class Received(RowScores):
    """The weight that a token receives as a key, averaged over heads and over every ``stride``-th query (as H2O scores cached
    keys, arXiv:2306.14048).

    Weights that differ by less than 1 in 4,000 count as the same.  All queries (``stride=1``) cost about as much as a
    whole attention.
    """

    of_keys: ClassVar[bool] = True
    stride: int = 1

    def __post_init__(self) -> None:
        whole("Received", "stride", self.stride, least=1)

    def score(self, q_BHLD: Tensor, k_BHSD: Tensor, *, real_BL: Tensor | None, received: Receive) -> Tensor:
        weight = received(self.stride)
        logarithm = weight.clamp(min=torch.finfo(weight.dtype).tiny).log()
        return (logarithm * STEPS).round() / STEPS

    def voters(self, q_len: int) -> int:
        return (q_len + self.stride - 1) // self.stride


@dataclass(frozen=True)
class ByFunction(RowScores):
    """``function(q, k, real_BL=..., received=...)``, as ``RowScores.score``."""

    function: Callable[..., Tensor]

    def score(self, q_BHLD: Tensor, k_BHSD: Tensor, *, real_BL: Tensor | None, received: Receive) -> Tensor:
        try:
            return self.function(q_BHLD, k_BHSD, real_BL=real_BL, received=received)
        except Exception as e:
            raise PluginError(
                f"row score {self} failed: {type(e).__name__}: {e}",
                hint="it is called as score(q, k, real_BL=..., received=...)",
            ) from e

    def __repr__(self) -> str:
        return str(getattr(self.function, "__qualname__", type(self.function).__name__))
