"""A mixer fitted to the outputs of one attention: in closed form where there is one, else layer by layer distilled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.errors import CalibrationError
from attnopt.fit.descent import descend
from attnopt.ir.activations import of_heads
from attnopt.ir.blame import blamed, check_output, fault
from attnopt.ir.mixer import Mixer, Pairs, Tokens
from attnopt.ir.operands import HIDING, OperandTensors
from attnopt.ir.semantics import heads_of
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.statistic import Statistic

RATE = 1e-2  # of Adam
LOOK_EVERY = 20  # steps, after which the error on held-back tokens is measured
MOST_PLACES = 64  # from which on other tokens are tried
PATIENCE = 5  # looks without a better one, after which the fit stops


@dataclass(frozen=True)
class FittedMixer:
    """``r2``: the share of the variance of head outputs that it explains on ``tokens``, which are held back from the fit."""

    mixer: Mixer
    weights: tuple[Tensor, ...]
    r2: float
    tokens: int
    steps: int  # of gradient descent; 0: it has a closed form


@dataclass(frozen=True)
class MixerFit(Statistic[FittedMixer]):
    """``steps``: at most so many, where there is no closed form."""

    mixer: Mixer
    steps: int
    seed: int

    def measure(self, site: Site) -> FittedMixer:
        pairs = list(pairs_of(site))
        with torch.random.fork_rng(devices=[]), blamed(self.mixer, "mixer", "the fit", site.name):
            torch.manual_seed(self.seed)
            mixer = self.mixer.at(site)
            taken, weights = 0, mixer.fit(pairs)
            if weights is None:
                taken, weights = _distilled(
                    mixer, mixer.start(site), pairs, self.steps, f"fitting {mixer} to {site.name}"
                )
            weights = tuple(w.detach() for w in weights)
            if not all(bool(w.isfinite().all()) for w in weights):
                raise fault(mixer, "mixer", "its fitted weights are not finite", site.name)
            r2, tokens = _explained(mixer, weights, pairs)
        return FittedMixer(mixer, weights, r2, tokens, taken)


def pairs_of(site: Site) -> Iterator[Pairs]:
    """What a mixer of the site reads on the calibration data, and what it is to give."""
    now = site.activations
    assert now is not None
    rows = zip(now.batches, now.given, now.counted(False), now.counted(True), strict=True)
    for operands, o, on, held in rows:
        yield Pairs(tokens_of(site.spec, operands), o[:, list(site.spec.heads)], on, held)


def tokens_of(spec: AttentionSpec, operands: OperandTensors) -> Tokens:
    """What a mixer of ``spec`` reads."""
    t, seen = of_heads(spec, operands), operands.seen
    v = heads_of(spec, t.v).masked_fill(~seen[:, None, :, None], 0.0)
    return Tokens(t.q, heads_of(spec, t.k), v, None if bool(seen.all()) else seen)


def hides_pairs(spec: AttentionSpec, operands: OperandTensors) -> bool:
    """Whether masks hide from a query that counts a key that the pattern shows it and that another query sees."""
    t = operands
    hidden = torch.zeros((), dtype=torch.bool) if t.mask is None else ~t.mask
    if t.bias is not None:
        hidden = hidden | (t.bias < HIDING)
    shown = spec.visible_pattern.mask(t.q.shape[2], t.k.shape[2], num_heads=spec.num_heads, device=t.q.device)
    wanted = shown & t.seen[:, None, None, :] & t.real[:, None, :, None]
    return bool((wanted & hidden).any())


def _distilled(
    mixer: Mixer, start: Sequence[Tensor], pairs: Sequence[Pairs], steps: int, what: str
) -> tuple[int, list[Tensor]]:
    """The number of steps, and the weights with the least error on held-back tokens."""
    weights = [w.to(pairs[0].o.device, copy=True).requires_grad_() for w in start]
    if not weights:
        return 0, []
    best, least, looks = [w.detach().clone() for w in weights], _error(mixer, weights, pairs), 0
    fitting = [one for one in pairs if bool(one.on.any())]
    if not fitting:
        raise CalibrationError("no calibration token is left to fit a mixer to", hint="pass more data, or less padding")

    def loss(step: int) -> Tensor:
        one = fitting[step % len(fitting)]
        return (mixer.mix(one.tokens, weights) - one.o).transpose(1, 2)[one.on].square().mean()

    def is_done(step: int) -> bool:
        nonlocal best, least, looks
        if (step + 1) % LOOK_EVERY and step + 1 < steps:
            return False
        error = _error(mixer, weights, pairs)
        looks = 0 if error < least else looks + 1
        if error < least:
            best, least = [w.detach().clone() for w in weights], error
        return looks == PATIENCE

    history = descend(loss, torch.optim.Adam(weights, RATE), steps, what, is_done)
    return len(history), best


def _error(mixer: Mixer, weights: Sequence[Tensor], pairs: Sequence[Pairs]) -> float:
    """The sum of squared errors on the tokens that are held back."""
    return sum(float((got - o).double().square().sum()) for got, o in _held(mixer, weights, pairs))


def _explained(mixer: Mixer, weights: Sequence[Tensor], pairs: Sequence[Pairs]) -> tuple[float, int]:
    """R^2 over all channels together, and the number of tokens that are held back."""
    tokens, left = 0, 0.0
    total = square = torch.zeros((), dtype=torch.float64)
    for got, o in _held(mixer, weights, pairs):
        tokens, left = tokens + len(o), left + float((got.double() - o.double()).square().sum())
        total, square = total + o.double().sum(0), square + o.double().square().sum(0)
    if not tokens:
        raise CalibrationError(
            "no calibration token is held back to judge a mixer", hint="pass more or longer sequences"
        )
    variance = float((square - total.square() / tokens).sum())
    return (1 - left / variance if variance > 0 else float(left == 0)), tokens


def _held(mixer: Mixer, weights: Sequence[Tensor], pairs: Sequence[Pairs]) -> Iterator[tuple[Tensor, Tensor]]:
    """Of the tokens that are held back, what the mixer gives and what it is to give, [N, H, Dv]."""
    for one in pairs:
        with torch.no_grad():
            got = mixer.mix(one.tokens, weights)
        check_output(mixer, "mixer", got, tuple(one.o.shape), one.o.dtype)
        yield got.transpose(1, 2)[one.held], one.o.transpose(1, 2)[one.held]


def reads_later(fitted: FittedMixer, site: Site) -> bool:
    """Whether other numbers from some token on change what earlier ones get."""
    first, second = (_random(fitted, site, site.q_len, seed) for seed in (0, 1))
    with torch.no_grad():
        before = fitted.mixer.mix(first, fitted.weights)
        for at in range(1, site.q_len, max(1, site.q_len // MOST_PLACES)):
            pairs = zip((first.q, first.k, first.v), (second.q, second.k, second.v), strict=True)
            later = Tokens(*(torch.cat([a[:, :, :at], b[:, :, at:]], 2) for a, b in pairs))
            after = fitted.mixer.mix(later, fitted.weights)
            if not torch.allclose(before[:, :, :at], after[:, :, :at], rtol=1e-5, atol=1e-6):
                return True
    return False


def fails_at(fitted: FittedMixer, site: Site, length: int) -> str:
    """What goes wrong with ``length`` tokens; "" if nothing does."""
    x = _random(fitted, site, length)
    try:
        with torch.no_grad():
            got = fitted.mixer.mix(x, fitted.weights)
    except Exception as e:  # whatever a module of the user raises
        return f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return "" if got.shape == x.v.shape else f"outputs of {list(got.shape)}"


def _random(fitted: FittedMixer, site: Site, length: int, seed: int = 0) -> Tokens:
    device = next((w.device for w in fitted.weights), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    sizes = (site.head_dim, site.head_dim, site.value_dim)
    return Tokens(*(torch.randn(2, site.num_heads, length, d, generator=generator).to(device) for d in sizes))
