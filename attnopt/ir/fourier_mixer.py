"""A filter over all tokens by a Fourier transform: one complex weight for each frequency and channel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.errors import CalibrationError
from attnopt.ir.linear_mixer import RIDGES, LinearMixer, least_squares
from attnopt.ir.local_mixers import read_places
from attnopt.ir.mixer import Pairs

FEWEST = 8  # sequences, of which one is held back


@dataclass(frozen=True)
class FourierFilter(LinearMixer):
    """A circular convolution over all tokens, as a product in the frequency domain (GFNet, arXiv:2107.00645).

    ``grid``: (height, width): over both axes.  ``prefix``: as that of ``conv``.  Its weights are those of one length.  Fitted to
    whole sequences without padding, at least 8.  Raises PolicyError.
    """

    name: ClassVar[str] = "fft"
    any_length: ClassVar[bool] = False
    grid: tuple[int, ...] | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        read_places(self)

    def terms(self, v: Tensor, seen: Tensor | None) -> Sequence[Tensor]:
        """Its products with the frequencies are not formed one by one: see ``local``."""
        return ()

    def local(self, v: Tensor, seen: Tensor | None, weights: Tensor) -> Tensor:
        """``weights`` [H, 2 * frequencies, Dv]: the real parts, then the imaginary ones."""
        re, im = torch.view_as_real(self._spectrum(v)).unbind(-1)
        of_re, of_im = weights.mT.chunk(2, 2)
        product = torch.stack([re * of_re - im * of_im, re * of_im + im * of_re], -1)
        return self._tokens(torch.view_as_complex(product), v.shape[2])

    def work(self, length: int) -> int:
        return 2 * length * (length - 1).bit_length() + 2 * length

    def fit(self, pairs: Sequence[Pairs]) -> Sequence[Tensor]:
        whole = [_whole(one) for one in pairs]
        count = sum(int((one.on | one.held).all(1).sum()) for one in whole)
        if count < FEWEST:
            raise CalibrationError(
                f"{count} whole sequences, and fft is fitted to at least {FEWEST}",
                hint="pass more sequences without padding, or use a mixer of neighbours, such as conv",
            )
        return super().fit(whole)

    def _of_others(self, pairs: Sequence[Pairs]) -> tuple[Tensor, Tensor]:
        """Frequencies are orthogonal, so that each is fitted by itself; frequency 0 with all else that is the same for every
        token."""

        def mean(v: Tensor, seen: Tensor | None) -> Sequence[Tensor]:
            return () if self.prefix else (v.mean(2, keepdim=True).expand_as(v),)

        at_zero, shared = self._split(least_squares(self._of_rest(pairs, mean)))
        on, held = (list(self._products(pairs, counted)) for counted in ("on", "held"))
        power, cross = _sums(on)
        check = _sums(held or on)
        scale = power[:, 1:].mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        filters = [cross / (power + strength * scale) for strength in RIDGES]

        def error(w: Tensor) -> float:
            power, cross = check
            each = w.abs().square() * power - 2 * (w.conj() * cross).real
            return float((each * times)[:, 1:].sum())

        times = self._times(pairs[0].o.shape[2] - self.prefix).to(power).unsqueeze(-1)
        best = min(filters, key=error)
        best[:, :1] = at_zero if at_zero.shape[1] else 0.0
        return torch.cat([best.real, best.imag], 1), shared

    def _products(self, pairs: Sequence[Pairs], counted: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the sequences that count, batch by batch: the power of values [H, F, Dv], and their products with the outputs."""
        p = self.prefix
        for one in pairs:
            some = getattr(one, counted).all(1)
            if not bool(some.any()):
                continue  # MKL transforms no empty tensors
            v, o = (self._spectrum(x[some, :, p:].double()).mT for x in (one.tokens.v, one.o))
            yield v.abs().square().sum(0), (v.conj() * o).sum(0)

    def _times(self, tokens: int) -> Tensor:
        """How often each frequency counts: most stand for themselves and their conjugate."""
        rows, length = (1, tokens) if self.grid is None else self.grid
        times = torch.full((length // 2 + 1,), 2.0)
        times[0] = 1.0
        if length % 2 == 0:
            times[-1] = 1.0
        return times.repeat(rows)

    def _spectrum(self, v: Tensor) -> Tensor:
        """Complex [B, H, Dv, frequencies]"""
        x = v.mT
        if self.grid is None:
            found: Tensor = torch.fft.rfft(x, dim=3)
            return found
        image = x.reshape(*x.shape[:3], *self.grid)
        found = torch.fft.fft(torch.fft.rfft(image, dim=4), dim=3)
        return found.flatten(3, 4)

    def _tokens(self, spectrum_BHDF: Tensor, length: int) -> Tensor:
        """[B, H, L, Dv]"""
        if self.grid is None:
            found: Tensor = torch.fft.irfft(spectrum_BHDF, n=length, dim=3)
            return found.mT
        height, width = self.grid
        z = spectrum_BHDF.reshape(*spectrum_BHDF.shape[:3], height, width // 2 + 1)
        found = torch.fft.irfft(torch.fft.ifft(z, dim=3), n=width, dim=4)
        return found.flatten(3, 4).mT


def _whole(one: Pairs) -> Pairs:
    """Only whole sequences count."""
    on, held = (x & x.all(1, keepdim=True) for x in (one.on, one.held))
    return replace(one, on=on, held=held)


def _sums(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    power, cross = zip(*parts, strict=True)
    return torch.stack(power).sum(0), torch.stack(cross).sum(0)
