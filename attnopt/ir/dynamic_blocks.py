"""Input-dependent sparsity: each block of queries keeps the key blocks with the highest scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.base.notation import evaluate
from attnopt.base.options import number, whole
from attnopt.errors import PolicyError
from attnopt.ir.block_scores import BlockScores, constructor, parse_scores


@dataclass(frozen=True, init=False)
class DynamicBlocks:
    """Which key blocks a block of queries keeps, decided at run time for every sequence and head.

    ``scores``: a ``BlockScores`` or its text.
    ``keep``: a fraction (above 0, at most 1.0, rounded up) of the blocks that causality leaves to the row, or a number
    of blocks as an int.
    ``block``: tokens per block.
    ``sinks``: number of first blocks that are always kept; ``local``: number of blocks up to the query's own, including
    itself (without causality also on the other side).  Both count towards ``keep``.  Raises PolicyError.

    In a causal attention, the choice never depends on a later token: row r is scored with the ``block`` queries that
    end at its first one, and only blocks whose keys are not later than that query compete; the row's own block is kept.
    Rows begin at the first query of a call, so a text processed in parts may keep other blocks than in one piece.
    Scores ignore masks, biases and the pattern.
    """

    scores: BlockScores
    keep: float | int
    block: int
    sinks: int
    local: int

    def __init__(
        self,
        scores: BlockScores | str = "pooled",
        keep: float | int = 0.25,
        block: int = 64,
        sinks: int = 1,
        local: int = 1,
    ) -> None:
        owner = "DynamicBlocks"
        read = parse_scores(scores) if isinstance(scores, str) else scores
        if not isinstance(read, BlockScores):
            raise PolicyError(f"{owner}: invalid value scores={scores!r}: expected block scores or their text")
        if isinstance(keep, float) and not 0 < number(owner, "keep", keep) <= 1:
            raise PolicyError(f"{owner}: invalid value keep={keep!r}: expected a fraction above 0 and at most 1.0")
        if not isinstance(keep, float):
            whole(owner, "keep", keep, least=1)
        read.check(whole(owner, "block", block, least=1))
        object.__setattr__(self, "scores", read)
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "block", block)
        object.__setattr__(self, "sinks", whole(owner, "sinks", sinks))
        object.__setattr__(self, "local", whole(owner, "local", local, least=1))

    def select(self, q_BHLD: Tensor, k_BHSD: Tensor, scale: float, is_causal: bool) -> Tensor:
        """Bool [B, H, rows, columns]: the kept blocks; query i is at position ``i + S - L``."""
        L, S = q_BHLD.shape[2], k_BHSD.shape[2]
        rows, cols = _blocks(L, self.block), _blocks(S, self.block)
        row, col = torch.arange(rows, device=q_BHLD.device).unsqueeze(1), torch.arange(cols, device=q_BHLD.device)
        first = row * self.block + (S - L)  # the position of the row's first query
        last = (first + self.block - 1).clamp(max=S - 1)
        own = (col >= first // self.block) & (col <= last // self.block)
        if is_causal:
            known, visible = (col + 1) * self.block <= first + 1, col * self.block <= last
            near = col > last // self.block - self.local
        else:
            known = visible = (row >= 0) & (col >= 0)
            near = (col > first // self.block - self.local) & (col < last // self.block + self.local)
        forced = visible & ((col < self.sinks) | near | own | ~known)
        lag = self.block - 1 if is_causal else 0
        q, k = self._split(q_BHLD * scale, rows, lag), self._split(k_BHSD, cols, 0)
        s = self.scores.score(q, k, known, is_causal)
        forced = forced | (visible & s.isnan())  # NaN is not hidden
        s = s.masked_fill(~visible, -torch.inf).masked_fill(forced, torch.inf)
        budget = self._budget(visible.sum(1, keepdim=True)).clamp(1, cols)
        least = s.sort(-1, descending=True).values.gather(-1, (budget - 1).expand(*s.shape[:3], 1))
        above, tied = s > least, s == least
        left = budget - above.sum(-1, keepdim=True)
        chosen = above | (tied & (tied.cumsum(-1) <= left))  # of those that score the same the first
        return (chosen & visible) | forced

    def spread(self, kept: Tensor, q_len: int, kv_len: int, size: int = 1) -> Tensor:
        """What ``select`` returned, for every query and key, bool [B, H, L, S], or for blocks of a ``size`` that divides
        these."""
        row = torch.arange(_blocks(q_len, size), device=kept.device) // (self.block // size)
        col = torch.arange(_blocks(kv_len, size), device=kept.device) // (self.block // size)
        return kept.index_select(2, row).index_select(3, col)

    def share(self, kv_len: int) -> float:
        """Approximate fraction that is kept of what causality leaves, at this length."""
        return self.keep if isinstance(self.keep, float) else min(1.0, self.keep * self.block / max(1, kv_len))

    def to_json(self) -> str:
        """The text that ``from_json`` reads back."""
        return repr(self)

    @staticmethod
    def from_json(text: str) -> DynamicBlocks:
        """The inverse of ``to_json``; raises PolicyError."""
        value = evaluate(text, _constructor)
        if isinstance(value, DynamicBlocks):
            return value
        raise PolicyError(f"{text!r} is not a block selection")

    def _split(self, x: Tensor, count: int, lag: int) -> Tensor:
        """[B, H, tokens, D] as [B, H, count, block, D], ``lag`` tokens earlier; beyond an end its last token is repeated."""
        place = torch.arange(count * self.block, device=x.device) - lag
        filled = x.index_select(2, place.clamp(0, x.shape[2] - 1))
        return filled.reshape(*x.shape[:2], count, self.block, x.shape[3])

    def _budget(self, visible: Tensor) -> Tensor:
        if isinstance(self.keep, float):
            return (visible.double() * self.keep - 1e-9).ceil().long()  # 0.1 * 10 is a little more than 1
        return torch.full_like(visible, self.keep)


def _blocks(length: int, size: int) -> int:
    return (length + size - 1) // size  # not -(-length // size): ONNX rounds that towards zero


def _constructor(name: str) -> Callable[..., object]:
    return DynamicBlocks if name == DynamicBlocks.__name__ else constructor(name)
