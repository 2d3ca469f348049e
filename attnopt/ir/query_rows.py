"""Rows of queries that are chosen at run time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from attnopt.base.notation import evaluate
from attnopt.base.options import number, switch, whole, wholes
from attnopt.base.sizes import is_static
from attnopt.errors import PolicyError
from attnopt.ir.row_scores import ByFunction, RowScores
from attnopt.ir.score_registry import parse_row_scores, row_constructor
from attnopt.ir.tokens import told

_FINEST = 10**6  # the denominator of a share
N = TypeVar("N", int, Tensor)


@dataclass(frozen=True)
class Choice:
    """``chosen``: bool [B|1, H|1, L], the rows that are computed.  ``index``: int64 [B|1, H|1, R], their places in ascending
    order, and others after them."""

    chosen: Tensor
    index: Tensor

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows at ``index`` of an operand that broadcasts to [B, H, L, ...]."""
        if is_static(x.shape[2]) and x.shape[2] == 1:
            return x
        return self._taken(x, self.index)

    def spread(self, o_BHRD: Tensor) -> Tensor:
        """[B, H, L, D]: what was computed for ``index``, at its place; zeros elsewhere."""
        B, H, R, D = o_BHRD.shape
        o = o_BHRD.transpose(1, 2)
        rows = torch.cat([o, o.new_zeros(B, 1, H, D)], 1).transpose(1, 2)
        return self._taken(rows, torch.where(self.chosen, self.chosen.cumsum(2) - 1, R))

    def _taken(self, x: Tensor, places: Tensor) -> Tensor:
        if self.index.shape[1] != 1:
            return _rows(x, places)
        return _rows(x.transpose(1, 2).unsqueeze(1), places).squeeze(1).transpose(1, 2)  # all heads of a token at once


def _rows(x: Tensor, places_BHR: Tensor) -> Tensor:
    """Rows [B, H, R, ...] of ``x`` [B|1, H|1, L, ...]."""
    b, h, L = x.shape[:3]
    if not (is_static(b) and b == 1):
        places_BHR = places_BHR + torch.arange(b, device=x.device).reshape(-1, 1, 1) * (h * L)
    if h != 1:
        places_BHR = places_BHR + torch.arange(h, device=x.device).reshape(1, -1, 1) * L
    rows = x.flatten(0, 2).index_select(0, places_BHR.flatten())
    return rows.reshape(*places_BHR.shape, *x.shape[3:])


@dataclass(frozen=True, init=False, repr=False)
class ChosenRows:
    """The queries that ``heads`` compute; the output of the others is zero.

    ``scores``: a ``RowScores``, its text, or a function like its ``score``.
    ``keep``: a fraction (above 0, at most 1.0, rounded up) of the rows after the prefix, padding not counted, or a number of
    them as an int.
    ``prefix``: number of first rows, such as a class token, that are always computed.
    ``heads``: their numbers in the trained model.
    ``bias_hides``: the bias may be a mask, such as one of padding.  Raises PolicyError.
    """

    scores: RowScores
    keep: float | int
    prefix: int
    heads: tuple[int, ...]
    bias_hides: bool

    def __init__(
        self,
        scores: RowScores | str | Callable[..., Tensor],
        keep: float | int,
        prefix: int = 0,
        heads: Sequence[int] = (),
        bias_hides: bool = False,
        *,
        owner: str = "ChosenRows",
    ) -> None:
        object.__setattr__(self, "scores", _read(owner, scores))
        if isinstance(keep, float) and not 0 < number(owner, "keep", keep) <= 1:
            raise PolicyError(f"{owner}: invalid value keep={keep!r}: expected a fraction above 0 and at most 1.0")
        if not isinstance(keep, float):
            whole(owner, "keep", keep, least=1)
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "prefix", whole(owner, "prefix", prefix))
        object.__setattr__(self, "heads", wholes(owner, "heads", heads))
        object.__setattr__(self, "bias_hides", switch(owner, "bias_hides", bias_hides))

    def __repr__(self) -> str:
        """ "ChosenRows(scores=Norm(), keep=0.5, prefix=1, heads=(0, 1))", the call that constructs it"""
        hides = ", bias_hides=True" if self.bias_hides else ""
        return (
            f"ChosenRows(scores={self.scores!r}, keep={self.keep!r}, prefix={self.prefix}, heads={self.heads}{hides})"
        )

    def __str__(self) -> str:
        """ "heads 0 to 3 compute the first row and 50% of the others by Norm()" """
        which = f"{told(self.heads).replace('token', 'head')} compute{'s' if len(self.heads) == 1 else ''}"
        first = f"the first {self.prefix} rows and " if self.prefix > 1 else "the first row and " if self.prefix else ""
        many = f"{self.keep:.4g}" if isinstance(self.keep, int) else f"{100 * self.keep:.4g}%"
        return f"{which} {first}{many} of the {'others' if self.prefix else 'rows'} by {self.scores}"

    def count(self, q_len: int) -> int:
        """The number of rows that are computed for ``q_len`` queries, which may be symbolic."""
        if is_static(q_len):
            left = max(0, int(q_len) - self.prefix)
            more = min(left, self.keep) if isinstance(self.keep, int) else self._share(left)
            return min(int(q_len), self.prefix + more)
        return self.prefix + (self.keep if isinstance(self.keep, int) else self._share(q_len - self.prefix))

    def choose(self, scores: Tensor, real_BL: Tensor | None) -> Choice:
        """``scores`` [B, L] or [B, H, L]."""
        s = scores if scores.dim() == 3 else scores.unsqueeze(1)
        L = s.shape[2]
        place = torch.arange(L, device=s.device)
        ahead, most = place < self.prefix, torch.finfo(s.dtype).max
        free = ~ahead if real_BL is None else ~ahead & real_BL.unsqueeze(1)  # these compete
        s = s.masked_fill(s.isnan(), most).clamp(-most, most).masked_fill(~free, -torch.inf)
        free = free.expand(s.shape)
        many = free.sum(2, keepdim=True)
        count = many.clamp(max=self.keep) if isinstance(self.keep, int) else self._share(many)
        least = s.sort(-1, descending=True).values.gather(2, (count - 1).clamp(min=0))
        above, tied = s > least, (s == least) & free
        left = count - above.sum(2, keepdim=True)
        chosen = above | (tied & (tied.cumsum(2) <= left)) | ahead
        order = torch.where(chosen, place, place + L).sort(-1).values
        order = order.index_select(2, torch.arange(self.count(L), device=s.device).clamp(max=L - 1))
        return Choice(chosen, torch.where(order < L, order, order - L))

    def keeping(self, kept: Collection[int]) -> ChosenRows | None:
        """The same with the kept heads alone; None if none of them chooses."""
        heads = [h for h in self.heads if h in kept]
        return ChosenRows(self.scores, self.keep, self.prefix, heads, self.bias_hides) if heads else None

    def to_json(self) -> str:
        """The text that ``from_json`` reads back."""
        return repr(self)

    @staticmethod
    def from_json(text: str) -> ChosenRows:
        """The inverse of ``to_json``; raises PolicyError."""
        value = evaluate(text, _constructor)
        if isinstance(value, ChosenRows):
            return value
        raise PolicyError(f"{text!r} does not describe chosen rows")

    def _share(self, rows: N) -> N:
        """``keep`` of so many rows, rounded up."""
        share = max(Fraction(self.keep).limit_denominator(_FINEST), Fraction(1, _FINEST))
        return (rows * share.numerator + share.denominator - 1) // share.denominator


def _read(owner: str, scores: object) -> RowScores:
    if isinstance(scores, str):
        return parse_row_scores(scores)
    if isinstance(scores, RowScores):
        return scores
    if callable(scores) and not isinstance(scores, type):
        return ByFunction(scores)
    raise PolicyError(f"{owner}: invalid value score={scores!r}: expected row scores, their text, or a function")


def _constructor(name: str) -> Callable[..., object]:
    return ChosenRows if name == ChosenRows.__name__ else row_constructor(name)
