"""Positions of tokens as options name them: from 0 on, and from -1 back from the end, for every length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attnopt.base.bit_table import indices, runs_of
from attnopt.base.sizes import is_static

SHOWN = 6  # runs in a text


def among(tokens: Sequence[int], at: Tensor, length: int) -> Tensor:
    """Bool: which of the positions ``at`` in a sequence of ``length`` (also a SymInt) are ``tokens``."""
    found = torch.zeros_like(at, dtype=torch.bool)
    for run in runs_of(tokens):
        place = at if run.start >= 0 else at - length
        hit = (place >= run[0]) & (place <= run[-1])
        found = found | (hit & ((place - run[0]) % run.step == 0) if run.step > 1 else hit)
    return found


def only_at(tokens: Sequence[int] | None, old: Tensor, new: Tensor, length: int) -> Tensor:
    """Of [B, H, N, D], ``new`` for the tokens at these positions (None: all), ``old`` for the others.  They are the last of a
    sequence of ``length`` (also a SymInt)."""
    if tokens is None:
        return new
    at = torch.arange(old.shape[2], device=old.device) + (length - old.shape[2])
    return torch.where(among(tokens, at, length).reshape(1, 1, -1, 1), new, old)


def positions(tokens: Sequence[int], length: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The positions [T] of ``tokens`` in a sequence of ``length`` (also a SymInt), and bool [T]: which of them are there and
    not listed before; None if all are.  The others have position 0."""
    if is_static(length):
        return indices(sorted({t % length for t in tokens if -length <= t < length}), device), None
    first = [t for t in tokens if t >= 0]
    last = indices([t for t in tokens if t < 0], device) + length
    listed_once = (last >= 0) & ~among(first, last, length)
    ahead = indices(first, device)
    there = torch.cat([ahead < length, listed_once])
    return torch.cat([ahead, last]).masked_fill(~there, 0), there


def out_of_range(tokens: Iterable[int], length: int) -> list[int]:
    """Those of ``tokens`` that a sequence of ``length`` does not have."""
    return [t for t in tokens if not -length <= t < length]


def shortest(tokens: Iterable[int]) -> int:
    """The length of the shortest sequence that has all of ``tokens``."""
    return max((t + 1 if t >= 0 else -t for t in tokens), default=0)


def told(tokens: Sequence[int] | None) -> str:
    """ "all tokens", "token 3", "tokens 0 to 4 and -1" """
    if tokens is None:
        return "all tokens"
    runs = [_run_told(run) for run in runs_of(sorted(tokens, key=lambda t: (t < 0, t)))]
    many = "s" if len(tokens) != 1 else ""
    if len(runs) > SHOWN:
        return f"{len(tokens)} tokens, {', '.join(runs[: SHOWN - 1])}, ..., {runs[-1]}"
    return f"token{many} {' and '.join(filter(None, (', '.join(runs[:-1]), *runs[-1:])))}"


def _run_told(run: range) -> str:
    if len(run) == 1:
        return str(run[0])
    return f"{run[0]} to {run[-1]}" + (f" by {run.step}" if run.step > 1 else "")
