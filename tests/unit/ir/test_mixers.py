"""Mixers against loops over tokens, and what is fitted against weights that were planted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sites import a_site
from torch import Tensor

from attnopt.base.registry import OURS
from attnopt.errors import CalibrationError, PolicyError
from attnopt.ir.fourier_mixer import FourierFilter
from attnopt.ir.linear_attention import LinearAttention
from attnopt.ir.linear_mixer import LinearMixer
from attnopt.ir.local_mixers import DepthwiseConv, TokenPool
from attnopt.ir.mixer import Mixer, Pairs, Tokens
from attnopt.ir.mixer_registry import MIXERS, mixer
from attnopt.patterns import Causal

B, H, D = 10, 2, 3
LINEAR: list[tuple[LinearMixer, int, int]] = [  # a mixer, the tokens, and its terms
    (DepthwiseConv(3), 7, 3),
    (DepthwiseConv(5, prefix=2), 9, 5),
    (DepthwiseConv(4, causal=True), 9, 4),
    (DepthwiseConv(3, grid=(2, 5), prefix=1), 11, 9),
    (DepthwiseConv(9), 4, 9),  # longer than the sequence
    (TokenPool(3), 7, 2),
    (TokenPool(5, grid=(3, 4), prefix=1), 13, 2),
    (FourierFilter(), 7, 8),
    (FourierFilter(), 8, 10),
    (FourierFilter(prefix=1), 8, 8),
    (FourierFilter(grid=(3, 4)), 12, 18),
    (FourierFilter(grid=(4, 3), prefix=2), 14, 16),
]
IDS = [f"{m}, {length}" for m, length, _ in LINEAR]


def tokens(length: int, hidden: int = 0) -> Tokens:
    q, k, v = torch.randn(3, B, H, length, D)
    seen = torch.ones(B, length, dtype=torch.bool)
    if hidden:
        seen[1::2, -hidden:] = False
        v = v * seen[:, None, :, None]
    return Tokens(q, k, v, seen if hidden else None)


def weights_of(m: LinearMixer, terms: int) -> tuple[Tensor, Tensor]:
    return torch.randn(H, terms, D), torch.randn(H, 1 + m.prefix, 1 + m.prefix + (m.prefix > 0), D)


def by_token(m: LinearMixer, x: Tokens, local: Tensor, shared: Tensor) -> Tensor:
    """One token after the other."""
    p, v = m.prefix, x.v
    rest = v[:, :, p:]
    R, out = rest.shape[2], torch.zeros_like(v)
    seen = torch.ones(B, R) if x.seen is None else x.seen[:, p:].float()
    mean = rest.sum(2) / seen.sum(1)[:, None, None]
    read = [*v[:, :, :p].unbind(2), *([mean] if p else []), torch.ones_like(mean)]
    for i in range(p + R):
        row = min(i, p)
        out[:, :, i] = sum(r * shared[:, row, j] for j, r in enumerate(read))
    place = {t: (t,) if m.grid is None else divmod(t, m.grid[1]) for t in range(R)}
    for i in range(R):
        for j in range(R):
            step = tuple(b - a for a, b in zip(place[i], place[j], strict=True))
            if isinstance(m, DepthwiseConv):
                back = m.kernel - 1 if m.causal else m.kernel // 2
                index = [s + back for s in step]
                if all(0 <= n < m.kernel for n in index):
                    w = local[:, index[0] if m.grid is None else index[0] * m.kernel + index[1]]
                    out[:, :, p + i] += w * rest[:, :, j]
            if isinstance(m, TokenPool):
                near = [
                    t
                    for t in range(R)
                    if all(abs(a - b) <= m.size // 2 for a, b in zip(place[i], place[t], strict=True))
                ]
                count = seen[:, near].sum(1).clamp(min=1)[:, None, None]
                out[:, :, p + i] += (local[:, 0] * rest[:, :, j]) * (i == j) + local[:, 1] * rest[:, :, j] * (
                    j in near
                ) / count
    return out


@pytest.mark.parametrize(("m", "length", "terms"), [x for x in LINEAR if not isinstance(x[0], FourierFilter)], ids=str)
def test_linear_mixers_token_by_token(m: LinearMixer, length: int, terms: int) -> None:
    assert m.count == terms
    for hidden in (0, 2):
        x, weights = tokens(length, hidden), weights_of(m, terms)
        got = m.mix(x, weights)
        torch.testing.assert_close(got, by_token(m, x, *weights), rtol=1e-4, atol=1e-5)
        seen = None if x.seen is None else x.seen[:, m.prefix :]
        rest = x.v[:, :, m.prefix :]
        torch.testing.assert_close(
            m.local(rest, seen, weights[0]), LinearMixer.local(m, rest, seen, weights[0]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("length", [7, 8])
def test_a_fourier_filter_is_a_circular_convolution(length: int) -> None:
    kernel, x = torch.randn(H, length, D), tokens(length)
    spectrum = torch.fft.rfft(kernel, dim=1)
    weights = torch.cat([spectrum.real, spectrum.imag], 1), torch.zeros(H, 1, 1, D)
    turned = torch.stack([x.v.roll(n, 2) for n in range(length)])
    want = torch.einsum("nbhld,hnd->bhld", turned, kernel)
    torch.testing.assert_close(FourierFilter().mix(x, weights), want, rtol=1e-4, atol=1e-4)


def test_a_fourier_filter_of_a_grid_is_one_along_both_axes() -> None:
    h, w = 3, 4
    kernel, x = torch.randn(H, h, w, D), tokens(h * w)
    spectrum = torch.fft.fft(torch.fft.rfft(kernel, dim=2), dim=1).flatten(1, 2)
    weights = torch.cat([spectrum.real, spectrum.imag], 1), torch.zeros(H, 1, 1, D)
    image = x.v.unflatten(2, (h, w))
    want = sum(image.roll((a, b), (2, 3)) * kernel[:, a, b, None, None] for a in range(h) for b in range(w))
    got = FourierFilter(grid=(h, w)).mix(x, weights)
    torch.testing.assert_close(got, want.flatten(2, 3), rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]


def test_linear_attention_is_a_weighted_mean() -> None:
    x = tokens(9, hidden=3)
    weights = torch.randn(2, H, D, 4)
    f = [torch.cat([t @ w, -(t @ w)], -1).softmax(-1) for t, w in zip((x.q, x.k), weights, strict=True)]
    assert x.seen is not None
    scores = (f[0] @ f[1].mT) * x.seen[:, None, None]
    want = (scores / scores.sum(-1, keepdim=True)) @ x.v
    torch.testing.assert_close(LinearAttention(4).mix(x, list(weights)), want, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the fit
def pairs(m: Mixer, x: Tokens, weights: Any, count: int = 2) -> list[Pairs]:
    found = []
    for i in range(count):
        one = replace(x, v=x.v + i * torch.randn_like(x.v) * (1 if x.seen is None else x.seen[:, None, :, None]))
        real = torch.ones(B, x.v.shape[2], dtype=torch.bool) if x.seen is None else x.seen
        held = real & (torch.arange(B) % 5 == 4)[:, None]
        found.append(Pairs(one, m.mix(one, weights), real & ~held, held))
    return found


@pytest.mark.parametrize(("m", "length", "terms"), LINEAR, ids=IDS)
def test_planted_weights_are_found(m: LinearMixer, length: int, terms: int) -> None:
    weights = weights_of(m, terms)
    data = pairs(m, tokens(length), weights, count=6)
    found = m.fit(data)
    assert [w.shape for w in found] == [w.shape for w in weights]
    other = tokens(length)
    got, want = m.mix(other, [w.float() for w in found]), m.mix(other, weights)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    if m not in (
        DepthwiseConv(9),
        *(x for x, _, _ in LINEAR if isinstance(x, FourierFilter)),
    ):  # where several give the same
        for a, b in zip(found, weights, strict=True):
            torch.testing.assert_close(a.float(), b, rtol=1e-2, atol=1e-2)


def test_batches_of_few_sequences() -> None:
    """Most of them have none that is held back."""
    m, weights = FourierFilter(), weights_of(FourierFilter(), 8)
    one = pairs(m, tokens(7), weights, count=3)
    cut = [
        Pairs(
            Tokens(*(t[i : i + 2] for t in (p.tokens.q, p.tokens.k, p.tokens.v))),
            *(t[i : i + 2] for t in (p.o, p.on, p.held)),
        )
        for p in one
        for i in range(0, B, 2)
    ]
    for whole, apart in zip(m.fit(one), m.fit(cut), strict=True):
        torch.testing.assert_close(whole, apart)


def test_padding_is_not_fitted() -> None:
    m, weights = DepthwiseConv(3), (torch.randn(H, 3, D), torch.randn(H, 1, 1, D))
    data = pairs(m, tokens(9, hidden=4), weights, count=4)
    for one in data:
        assert one.tokens.seen is not None
        one.o[~one.tokens.seen[:, None].expand(-1, H, -1)] = 1e3
    torch.testing.assert_close(m.fit(data)[0].float(), weights[0], rtol=1e-2, atol=1e-2)


def test_noise_shrinks_weights() -> None:
    """Few tokens and many terms: a solution without shrinkage would be worse on the tokens that are held back."""
    m = DepthwiseConv(9)
    x = tokens(12)
    noise = Pairs(x, torch.randn_like(x.v), *(torch.arange(B)[:, None].expand(-1, 12) % 5 != 4 for _ in range(2)))
    noise = replace(noise, held=~noise.on)
    weights = [w.float() for w in m.fit([noise])]
    error = ((m.mix(x, weights) - noise.o).square() * noise.held[:, None, :, None]).sum()
    exact = [w.float() for w in m.fit([replace(noise, held=noise.on)])]
    assert error < ((m.mix(x, exact) - noise.o).square() * noise.held[:, None, :, None]).sum()


def test_a_filter_needs_whole_sequences() -> None:
    x = tokens(8, hidden=1)
    assert x.seen is not None
    one = Pairs(x, x.v, x.seen, torch.zeros_like(x.seen))
    with pytest.raises(CalibrationError, match="5 whole sequences, and fft is fitted to at least 8"):
        FourierFilter().fit([one])
    with pytest.raises(CalibrationError, match="no calibration token is left"):
        DepthwiseConv().fit([replace(one, on=torch.zeros_like(x.seen))])


# ---------------------------------------------------------------- values
@pytest.mark.parametrize(
    "m",
    [DepthwiseConv(), DepthwiseConv(5, (3, 4), 1), DepthwiseConv(2, causal=True), TokenPool(7), FourierFilter(prefix=1),
     LinearAttention(), LinearAttention(16)],
    ids=str,
)  # fmt: skip
def test_texts_read_back(m: Mixer) -> None:
    assert mixer("test", m.to_json()) == m
    assert mixer("test", m) is m
    assert hash(mixer("test", str(m))) == hash(m)


def test_names() -> None:
    ours = {name for name, plugin in MIXERS.listed().items() if plugin.distribution == OURS}
    assert ours == {"fft", "conv", "pool", "linear-attention", "module"}
    assert mixer("test", "linear-attention(features=8)") == LinearAttention(8)
    assert DepthwiseConv(5, grid=[3, 4]).grid == (3, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: mixer("replace", "convolution"),
            "replace: invalid value mixer='convolution': expected one of 'fft', 'conv'",
        ),
        (lambda: mixer("replace", 3), "replace: invalid value mixer=3"),
        (lambda: mixer("replace", "conv(size=3)"), "replace: mixer='conv(size=3)': conv: "),
        (lambda: DepthwiseConv(4), "conv: invalid value kernel=4: expected an odd number, or causal=True"),
        (lambda: DepthwiseConv(0), "conv: invalid value kernel=0"),
        (lambda: DepthwiseConv(3, grid=(4,)), "conv: invalid value grid=(4,)"),
        (lambda: DepthwiseConv(3, prefix=1, causal=True), "a causal convolution has neither a grid nor a prefix"),
        (lambda: DepthwiseConv(3, causal=1), "conv: invalid value causal=1"),  # type: ignore[arg-type]
        (lambda: TokenPool(2), "pool: invalid value size=2: expected an odd number"),
        (lambda: FourierFilter(prefix=-1), "fft: invalid value prefix=-1"),
        (lambda: LinearAttention(0), "linear-attention: invalid value features=0"),
    ],
)
def test_wrong_options(make: Any, told: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make()
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("m", "changes", "told"),
    [
        (
            FourierFilter(),
            {"is_dynamic": True},
            "[wrong-length] expected 12 tokens in every call, for which fft",
        ),
        (
            FourierFilter(),
            {"pattern": Causal()},
            "[looks-ahead] expected queries that may see later keys, found Causal()",
        ),
        (TokenPool(), {"pattern": Causal()}, "found Causal(), and pool reads all tokens"),
        (DepthwiseConv(prefix=1), {"pattern": Causal()}, "found Causal(), and class tokens and grids see all tokens"),
        (LinearAttention(), {"pattern": Causal()}, "one sum over all keys serves every query"),
        (DepthwiseConv(grid=(3, 3)), {}, "[wrong-length] expected 3 x 3 tokens, 9 in all, found 12 tokens"),
        (DepthwiseConv(grid=(3, 4), prefix=1), {}, "expected 1 and 3 x 4 tokens, 13 in all"),
        (DepthwiseConv(grid=(3, 4)), {"is_dynamic": True}, "found a dynamic length"),
        (TokenPool(prefix=12), {}, "expected 12 and further tokens"),
    ],
    ids=str,
)
def test_refusals(m: Mixer, changes: dict[str, Any], told: str) -> None:
    refused = m.check(a_site(**changes))
    assert refused is not None
    assert told in str(refused)
    assert refused.hint


def test_causal_where_the_attention_is() -> None:
    assert DepthwiseConv().at(a_site(pattern=Causal())).causal is True
    assert DepthwiseConv().at(a_site()).causal is False
    assert DepthwiseConv(2, causal=True).at(a_site()).causal is True
    for changes in ({"pattern": Causal()}, {"is_dynamic": True}):
        assert DepthwiseConv().check(a_site(**changes)) is None
    assert TokenPool().check(a_site(is_dynamic=True)) is None
