"""Mixers that are linear in their weights, and least squares for each channel by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from attnopt.errors import CalibrationError
from attnopt.ir.mixer import Mixer, Pairs, Tokens, wide
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site

RIDGES = (1e-7, 1e-5, 1e-3, 1e-2, 1e-1)  # relative to the mean square of the terms
Terms = Callable[[Tensor, Tensor | None], Sequence[Tensor]]
AT_ONCE = 1 << 24  # numbers of terms that are held at the same time


class LinearMixer(Mixer):
    """A sum of terms with a weight for each channel.

    ``prefix`` tokens, such as a class token, come before the others, which have no ``grid`` or are one of it, in row-major order.
    Every token reads the terms of its place among the others, the prefix tokens and, if there are any, the mean of the others;
    a prefix token only the last two; and each adds a bias.  Weights: [H, terms, Dv] of the others, and [H, 1 + prefix, read, Dv]
    of what all read, for each prefix token and then for the others.
    """

    grid: tuple[int, ...] | None = None
    prefix: int = 0

    @abstractmethod
    def terms(self, v: Tensor, seen: Tensor | None) -> Sequence[Tensor]:
        """The terms [B, H, R, Dv] of the tokens after the prefix, ``v`` [B, H, R, Dv]; ``seen`` as in ``Tokens``."""

    def local(self, v: Tensor, seen: Tensor | None, weights: Tensor) -> Tensor:
        """The sum of the terms with ``weights`` [H, terms, Dv]."""
        parts = [x * w.unsqueeze(1) for x, w in zip(self.terms(v, seen), weights.unbind(1), strict=True)]
        return sum(parts[1:], parts[0])

    def check(self, site: Site) -> Refusal | None:
        return self._refuse_lengths(site) or self._refuse_causal(site)

    def mix(self, x: Tokens, weights: Sequence[Tensor]) -> Tensor:
        v, p = wide(x.v), self.prefix
        of_place, of_all = (w.to(v.dtype) for w in weights)
        shared = (self._shared(v, x.seen).unsqueeze(2) * of_all).sum(3)  # [B, H, 1 + prefix, Dv]
        seen = x.seen if x.seen is None else x.seen[:, p:]
        rest = self.local(v[:, :, p:] if p else v, seen, of_place) + shared[:, :, p:]
        return (torch.cat([shared[:, :, :p], rest], 2) if p else rest).to(x.v.dtype)

    def fit(self, pairs: Sequence[Pairs]) -> Sequence[Tensor]:
        of_place, shared = self._of_others(pairs)
        of_all = [least_squares(self._of_prefix(pairs, i)) for i in range(self.prefix)]
        return of_place, torch.stack([*of_all, shared], 1)

    def work(self, length: int) -> int:
        return self.count * length

    @property
    def count(self) -> int:
        """How many terms there are."""
        return len(self.terms(torch.zeros(1, 1, prod(self.grid) if self.grid else 1, 1), None))

    def _of_others(self, pairs: Sequence[Pairs]) -> tuple[Tensor, Tensor]:
        """The weights of the terms of the others, and of what all read for them."""
        return self._split(least_squares(self._of_rest(pairs, self.terms)))

    def _split(self, found: Tensor) -> tuple[Tensor, Tensor]:
        read = 1 + self.prefix + (self.prefix > 0)
        return found[:, :-read], found[:, -read:]

    def _of_rest(self, pairs: Sequence[Pairs], terms: Terms) -> Iterator[Sample]:
        p = self.prefix
        for one in map(_double, pairs):
            rest = one.tokens.v[:, :, p:]
            own = terms(rest, None if one.tokens.seen is None else one.tokens.seen[:, p:])
            shared = [s.unsqueeze(2).expand_as(rest) for s in self._shared(one.tokens.v, one.tokens.seen).unbind(2)]
            yield Sample(torch.stack([*own, *shared]), one.o[:, :, p:], one.on[:, p:], one.held[:, p:])

    def _of_prefix(self, pairs: Sequence[Pairs], i: int) -> Iterator[Sample]:
        for one in map(_double, pairs):
            shared = self._shared(one.tokens.v, one.tokens.seen).unsqueeze(3).unbind(2)
            at = slice(i, i + 1)
            yield Sample(torch.stack(shared), one.o[:, :, at], one.on[:, at], one.held[:, at])

    def _shared(self, v: Tensor, seen: Tensor | None) -> Tensor:
        """[B, H, read, Dv]: the prefix tokens, the mean of the others, and 1 for the bias."""
        p, one = self.prefix, torch.ones_like(v[:, :, :1])
        if not p:
            return one
        if seen is None:
            mean = v[:, :, p:].mean(2, keepdim=True)
        else:
            count = seen[:, None, p:, None].to(v.dtype).sum(2, keepdim=True).clamp(min=1)
            mean = v[:, :, p:].sum(2, keepdim=True) / count
        return torch.cat([v[:, :, :p], mean, one], 2)

    def _refuse_lengths(self, site: Site) -> Refusal | None:
        expected = f"{self.prefix} and " if self.prefix else ""
        if self.grid is not None:
            fits, told = site.q_len == self.prefix + prod(self.grid), " x ".join(map(str, self.grid))
            expected = f"{expected}{told} tokens, {self.prefix + prod(self.grid)} in all"
        else:
            fits, expected = site.q_len > self.prefix, f"{expected}further tokens"
        fixed = self.grid is not None or not self.any_length
        if not fits:
            hint = "give the grid of the tokens, with the number of class and register tokens before it as prefix="
            return site.refuse("wrong-length", expected=expected, found=f"{site.q_len} tokens", hint=hint)
        if fixed and site.is_dynamic:
            return site.refuse(
                "wrong-length",
                expected=f"{site.q_len} tokens in every call, for which {self.name} has its weights",
                found="a dynamic length",
                hint="remove the sequence axis from dynamic_shapes, or use a mixer of any length, such as conv without grid",
            )
        return None

    def _refuse_causal(self, site: Site) -> Refusal | None:
        if not site.spec.is_causal or not (self.looks_ahead or self.prefix or self.grid):
            return None
        what = "class tokens and grids see" if not self.looks_ahead else f"{self.name} reads"
        return site.refuse(
            "looks-ahead",
            expected="queries that may see later keys",
            found=f"{site.spec.visible_pattern}, and {what} all tokens",
            hint="use conv without grid and prefix, which is causal here",
        )


@dataclass(frozen=True)
class Sample:
    """``terms`` [P, B, H, N, Dv], ``target`` [B, H, N, Dv], both in double precision; ``on`` and ``held``: bool [B, N]."""

    terms: Tensor
    target: Tensor
    on: Tensor
    held: Tensor


class _Moments:
    """Of the terms of each channel: T'T [H, Dv, P, P], T'o [H, Dv, P] and the sum of o^2."""

    def __init__(self) -> None:
        self.tt = self.to = torch.zeros(())
        self.tokens = 0

    def add(self, terms_PHND: Tensor, target_HND: Tensor) -> None:
        t = terms_PHND.permute(1, 3, 0, 2)  # [H, Dv, P, N]
        self.tt = self.tt + t @ t.mT
        self.to = self.to + (t @ target_HND.permute(0, 2, 1).unsqueeze(-1)).squeeze(-1)
        self.tokens += target_HND.shape[1]

    def error(self, w: Tensor) -> float:
        """The sum of squared errors of weights [H, Dv, P], without that of o^2."""
        of_channel = (w * ((self.tt @ w.unsqueeze(-1)).squeeze(-1) - 2 * self.to)).sum()
        return float(of_channel)


def least_squares(samples: Iterator[Sample]) -> Tensor:
    """The weights [H, P, Dv] of the terms that are nearest to the target, each channel by itself.

    How much they are held back from large numbers is chosen on held-back tokens, for all channels alike."""
    fitting, held = _Moments(), _Moments()
    for sample in samples:
        for some in _in_pieces(sample):
            for moments, counted in ((fitting, some.on), (held, some.held)):
                terms = some.terms.permute(0, 2, 1, 3, 4)[:, :, counted]
                moments.add(terms, some.target.transpose(0, 1)[:, counted])
    if not fitting.tokens:
        raise CalibrationError("no calibration token is left to fit a mixer to", hint="pass more data, or less padding")
    check = held if held.tokens else fitting
    scale = fitting.tt.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=torch.finfo(torch.float64).tiny)
    eye = torch.eye(fitting.tt.shape[-1], dtype=torch.float64, device=fitting.tt.device)
    solutions = [_solved(fitting.tt + strength * scale * eye, fitting.to) for strength in RIDGES]
    return min(solutions, key=check.error).mT


def _solved(a: Tensor, b: Tensor) -> Tensor:
    factor, _ = torch.linalg.cholesky_ex(a)
    found = torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1)
    return found.nan_to_num(0.0, 0.0, 0.0)  # of channels that are always zero


def _in_pieces(sample: Sample) -> Iterator[Sample]:
    """A few sequences at a time."""
    _, B, *sizes = sample.terms.shape
    step = max(1, AT_ONCE // (len(sample.terms) * prod(sizes)))
    for i in range(0, B, step):
        some = slice(i, i + step)
        yield Sample(sample.terms[:, some], sample.target[some], sample.on[some], sample.held[some])


def _double(one: Pairs) -> Pairs:
    x = one.tokens
    return replace(one, tokens=replace(x, v=x.v.double()), o=one.o.double())
