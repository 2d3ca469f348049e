"""Values of all batches, kept, or reduced as they come, so that their number costs no memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.base.options import choice
from attnopt.errors import PolicyError
from attnopt.ir.operands import HIDING
from attnopt.observe.chosen import REDUCTIONS
from attnopt.observe.taps import Answer
from attnopt.report.collected import Value, own

UNDERFLOW = 104.0  # exp(-104) is 0 in float32

Own = Callable[[Tensor, Tensor], Tensor]  # the caller's own: (value, which of its tokens count) -> what to keep
Reduce = str | Own | None


class Reduced(ABC):
    """One kind of values of one attention."""

    @abstractmethod
    def add(self, answer: Answer) -> None:
        """The values of one more batch."""

    @abstractmethod
    def result(self) -> Value: ...


class Kept(Reduced):
    """The values of each batch, or what the caller's own function makes of them, on the CPU."""

    def __init__(self, own_reduction: Own | None, site: str) -> None:
        self.own, self.site, self.found = own_reduction, site, list[Tensor]()

    def add(self, answer: Answer) -> None:
        x = answer.value
        if self.own is not None:
            counted = answer.columns if answer.rows is None else answer.rows
            x = self.own(x, torch.ones(0) if counted is None else counted)
            if not isinstance(x, Tensor):
                raise PolicyError(
                    f"collect: reduce returned {type(x).__name__} for {self.site or '(root)'}, expected a tensor",
                    hint="reduce takes (value, real), where real [B, L] is True for tokens that count, and returns a tensor",
                )
        self.found.append(own(x))

    def result(self) -> Value:
        return tuple(self.found)


class Sum(Reduced):
    """The sum, or the mean, over sequences and tokens; of maps over sequences alone, at each pair of positions.

    Padding does not count, nor do pairs in scores that are hidden, or left without a weight.  The mean of nothing is NaN.
    """

    def __init__(self, is_mean: bool) -> None:
        self.is_mean = is_mean
        self.total = torch.zeros((), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, answer: Answer) -> None:
        x = answer.value
        if answer.rows is not None and answer.columns is not None:
            counted = answer.rows[:, None, :, None] & answer.columns[:, None, None, :] & _has_weight(x)
            self._add(_sum(x, counted, (0,)), counted.sum(0))
            return
        tokens = answer.columns if answer.rows is None else answer.rows
        assert tokens is not None
        sizes = [tokens.shape[1] if axis == answer.axis else 1 for axis in range(1, x.dim())]
        self._add(_sum(x, tokens.reshape(len(tokens), *sizes), (0, answer.axis)), tokens.sum())

    def _add(self, total: Tensor, count: Tensor) -> None:
        self.total = _joined(self.total, total.detach().double().cpu())
        self.count = _joined(self.count, count.double().cpu())

    def result(self) -> Value:
        made = self.total / self.count if self.is_mean else self.total
        return made.float()


class ColumnMean(Reduced):
    """The mean over sequences of the mean weight that each key gets: [H, C].  Sequences in which a key is padding do not count
    at its position."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, answer: Answer) -> None:
        seen = answer.columns
        assert seen is not None
        self.total = _joined(self.total, _sum(answer.value, seen[:, None, :], (0,)).double().cpu())
        self.count = _joined(self.count, seen.sum(0).double().cpu())

    def result(self) -> Value:
        return (self.total / self.count).float()


def reduction(reduce: object, kinds: tuple[str, ...]) -> Callable[[str], Reduced]:
    """What starts the reduction of one kind of the attention of a name.  Raises PolicyError."""
    if reduce is None or (callable(reduce) and not isinstance(reduce, str)):
        return partial(Kept, reduce)
    choice("collect", "reduce", reduce, REDUCTIONS)
    if reduce == "column-mean":
        without = [kind for kind in kinds if kind != "weights"]
        if without:
            raise PolicyError(
                f"collect: reduce='column-mean' is of weights, not of {', '.join(map(repr, without))}",
                hint="ask for them in a call of their own, with reduce='mean'",
            )
        return lambda _: ColumnMean()
    return lambda _: Sum(reduce == "mean")


def _has_weight(x: Tensor) -> Tensor:
    """Of scores, which a model may also hide with a finite number: those that leave a weight."""
    return (x > HIDING) & (x > x.amax(-1, keepdim=True) - UNDERFLOW)


def _sum(x: Tensor, counted: Tensor, axes: tuple[int, ...]) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide if bool(counted.all()) else wide.masked_fill(~counted, 0.0)).sum(axes)


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """The sum at each position, where the lengths of batches may differ."""
    if a.dim() == 0 or a.shape == b.shape:
        return a + b
    sizes = [max(m, n) for m, n in zip(a.shape, b.shape, strict=True)]
    return sum((_padded(x, sizes) for x in (a, b)), torch.zeros((), dtype=a.dtype))


def _padded(x: Tensor, sizes: list[int]) -> Tensor:
    return F.pad(x, [i for size, n in zip(reversed(sizes), reversed(x.shape), strict=True) for i in (0, size - n)])
