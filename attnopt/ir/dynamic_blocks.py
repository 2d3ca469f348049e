"""Input-dependent sparsity: each block of queries keeps the key blocks with the highest scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from attnopt.base.notation import evaluate
from attnopt.base.options import number, whole, wholes
from attnopt.errors import PolicyError
from attnopt.ir.block_scores import BlockSample, BlockScores
from attnopt.ir.constant import Constant
from attnopt.ir.score_registry import constructor, parse_scores


@dataclass(frozen=True, init=False, repr=False)
class DynamicBlocks:
    """Which key blocks a block of queries keeps, decided at run time for every sequence and head.

    ``scores``: a ``BlockScores`` or its text.
    ``keep``: a fraction (above 0, at most 1.0, rounded up) of the blocks that causality leaves to the row, or a number
    of blocks as an int.
    ``block``: tokens per block.
    ``sinks``: number of first blocks that are always kept; ``local``: number of blocks up to the query's own, including
    itself (without causality also on the other side).  Both count towards ``keep``.
    ``dense``: number of first blocks of queries that keep every block, such as that of a class token.
    ``local_heads``: heads, by their numbers in the trained model, that keep the nearest blocks instead of those with the
    highest scores.
    ``fitted``: what ``scores.fit`` made of calibration data, for each head.  Raises PolicyError.

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
    dense: int
    local_heads: tuple[int, ...]
    fitted: tuple[Constant, ...]
    given: tuple[Tensor, ...] = field(init=False, compare=False)  # ``fitted`` in a graph that stores them

    def __init__(
        self,
        scores: BlockScores | str = "pooled",
        keep: float | int = 0.25,
        block: int = 64,
        sinks: int = 1,
        local: int = 1,
        dense: int = 0,
        local_heads: Sequence[int] = (),
        fitted: Sequence[Constant] = (),
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
        object.__setattr__(self, "dense", whole(owner, "dense", dense))
        object.__setattr__(self, "local_heads", wholes(owner, "local_heads", local_heads))
        object.__setattr__(self, "fitted", tuple(fitted))
        object.__setattr__(self, "given", ())

    def __repr__(self) -> str:
        """ "DynamicBlocks(scores=Pooled(), keep=0.25, block=64, sinks=1, local=1)", the call that constructs it unfitted"""
        always = {name: getattr(self, name) for name in ("scores", "keep", "block", "sinks", "local")}
        options = {name: given for name in ("dense", "local_heads") if (given := getattr(self, name))}
        return f"DynamicBlocks({', '.join(f'{name}={given!r}' for name, given in (always | options).items())})"

    def select(
        self, q_BHLD: Tensor, k_BHSD: Tensor, scale: float, is_causal: bool, heads: Sequence[int] | None = None
    ) -> Tensor:
        """Bool [B, H, rows, columns]: the kept blocks; query i is at position ``i + S - L``.

        ``heads``: their numbers; None: 0, 1, ...  Raises PolicyError if the scores have not been fitted.
        """
        L, S, device = q_BHLD.shape[2], k_BHSD.shape[2], q_BHLD.device
        rows, cols = _blocks(L, self.block), _blocks(S, self.block)
        row, col = torch.arange(rows, device=device).unsqueeze(1), torch.arange(cols, device=device)
        first = row * self.block + (S - L)  # the position of the row's first query
        last = (first + self.block - 1).clamp(max=S - 1)
        before, after = (
            first // self.block - col,
            col - last // self.block,
        )  # blocks up to the row's own, and from it on
        q, k, known = self._scored(q_BHLD * scale, k_BHSD, is_causal)
        if is_causal:
            visible, near = col * self.block <= last, after > -self.local
        else:
            visible = known
            near = (before < self.local) & (after < self.local)
        forced = visible & ((col < self.sinks) | near | ((before <= 0) & (after <= 0)) | ~known | (row < self.dense))
        s = self._nearest(self._scores(q, k, known, is_causal), before.maximum(after), heads)
        forced = forced | (visible & s.isnan())  # NaN is not hidden
        s = s.masked_fill(~visible, -torch.inf).masked_fill(forced, torch.inf)
        budget = self._budget(visible.sum(1, keepdim=True)).clamp(1, cols)
        least = s.sort(-1, descending=True).values.gather(-1, (budget - 1).expand(*s.shape[:3], 1))
        above, tied = s > least, s == least
        left = budget - above.sum(-1, keepdim=True)
        chosen = above | (tied & (tied.cumsum(-1) <= left))  # of those that score the same the first
        return (chosen & visible) | forced

    def sample(
        self, q_BHLD: Tensor, k_BHSD: Tensor, scale: float, is_causal: bool, q_counts_BL: Tensor, k_counts_BS: Tensor
    ) -> BlockSample:
        """Calibration data as the scores see them; ``q_counts_BL``, ``k_counts_BS``: the tokens to fit on."""
        q, k, known = self._scored(q_BHLD * scale, k_BHSD, is_causal)
        marks = q_counts_BL[:, None, :, None], k_counts_BS[:, None, :, None]
        q_counts, k_counts, _ = self._scored(*marks, is_causal, fills=False)
        return BlockSample(q, k, known, is_causal, q_counts[:, 0, ..., 0], k_counts[:, 0, ..., 0])

    def spread(self, kept: Tensor, q_len: int, kv_len: int, size: int = 1) -> Tensor:
        """What ``select`` returned, for every query and key, bool [B, H, L, S], or for blocks of a ``size`` that divides
        these."""
        row = torch.arange(_blocks(q_len, size), device=kept.device) // (self.block // size)
        col = torch.arange(_blocks(kv_len, size), device=kept.device) // (self.block // size)
        return kept.index_select(2, row).index_select(3, col)

    def share(self, kv_len: int) -> float:
        """Approximate fraction that is kept of what causality leaves, at this length."""
        return self.keep if isinstance(self.keep, float) else min(1.0, self.keep * self.block / max(1, kv_len))

    def using(self, tensors: Sequence[Tensor]) -> DynamicBlocks:
        """The same selection, which reads ``fitted`` from these tensors of a graph."""
        made = copy(self)
        object.__setattr__(made, "given", tuple(tensors))
        return made

    def keeping(self, places: Sequence[int], kept: Collection[int]) -> DynamicBlocks:
        """The same selection for the heads at these places, whose numbers are ``kept``."""
        fitted = tuple(Constant.of(c.tensor()[list(places)]) for c in self.fitted)
        return replace(self, local_heads=tuple(h for h in self.local_heads if h in kept), fitted=fitted)

    def to_json(self) -> dict[str, Any]:
        """Plain data, which ``from_json`` reads back."""
        return {"call": repr(self), "fitted": [c.to_json() for c in self.fitted]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> DynamicBlocks:
        """The inverse of ``to_json``; raises PolicyError."""
        value = evaluate(data["call"], _constructor)
        if isinstance(value, DynamicBlocks):
            return replace(value, fitted=tuple(map(Constant.from_json, data["fitted"])))
        raise PolicyError(f"{data['call']!r} is not a block selection")

    def _scores(self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool) -> Tensor:
        if is_causal and self.scores.looks_ahead:
            raise PolicyError(f"{self.scores} chooses from the whole sequence, but the attention is causal")
        if not self.scores.needs_calibration:
            return self.scores.score(q_BHNTD, k_BHMTD, known_NM, is_causal)
        if not self.fitted:
            raise PolicyError(
                f"{self.scores} has not been fitted",
                hint="apply the pass dynamic-sparse with calibration data, and use the selection of its sites",
            )
        numbers = self.given or tuple(c.tensor(q_BHNTD.device) for c in self.fitted)
        made: Tensor = self.scores.score(q_BHNTD, k_BHMTD, known_NM, is_causal, constants=numbers)  # type: ignore[call-arg]
        return made

    def _nearest(self, s_BHNM: Tensor, apart_NM: Tensor, heads: Sequence[int] | None) -> Tensor:
        """The scores, for local heads by distance: ``apart_NM`` blocks."""
        numbers = range(s_BHNM.shape[1]) if heads is None else heads
        if not {*self.local_heads} & {*numbers}:
            return s_BHNM
        near = -apart_NM.to(s_BHNM.dtype).expand(s_BHNM.shape[0], 1, -1, -1)
        return torch.cat([near if h in self.local_heads else s_BHNM[:, i : i + 1] for i, h in enumerate(numbers)], 1)

    def _scored(
        self, q_BHLD: Tensor, k_BHSD: Tensor, is_causal: bool, fills: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys in blocks [B, H, blocks, block, D], and the key blocks that each row may depend on [rows, columns]."""
        L, S, device = q_BHLD.shape[2], k_BHSD.shape[2], q_BHLD.device
        rows, cols = _blocks(L, self.block), _blocks(S, self.block)
        row, col = torch.arange(rows, device=device).unsqueeze(1), torch.arange(cols, device=device)
        first = row * self.block + (S - L)
        known = (col + 1) * self.block <= first + 1 if is_causal else (row >= 0) & (col >= 0)
        lag = self.block - 1 if is_causal else 0
        return self._split(q_BHLD, rows, lag, fills), self._split(k_BHSD, cols, 0, fills), known

    def _split(self, x: Tensor, count: int, lag: int, fills: bool) -> Tensor:
        """[B, H, tokens, D] as [B, H, count, block, D], ``lag`` tokens earlier; beyond an end its last token is repeated if it
        ``fills``, and zero otherwise."""
        place = torch.arange(count * self.block, device=x.device) - lag
        filled = x.index_select(2, place.clamp(0, x.shape[2] - 1))
        if not fills:
            filled = filled * ((place >= 0) & (place < x.shape[2])).unsqueeze(1)
        return filled.reshape(*x.shape[:2], count, self.block, x.shape[3])

    def _budget(self, visible: Tensor) -> Tensor:
        if not isinstance(self.keep, float):
            return torch.full_like(visible, self.keep)
        part = Fraction(self.keep).limit_denominator(1 << 16)  # in whole numbers: 0.1 * 10 is a little more than 1
        return (visible * part.numerator + (part.denominator - 1)) // part.denominator


def _blocks(length: int, size: int) -> int:
    return (length + size - 1) // size  # not -(-length // size): ONNX rounds that towards zero


def _constructor(name: str) -> Callable[..., object]:
    return DynamicBlocks if name == DynamicBlocks.__name__ else constructor(name)
