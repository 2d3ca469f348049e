"""Small decoders and encoders in which every feature of an attention depends on the position of its tokens in the sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, DIM = 31, 32, 8


@dataclass(frozen=True)
class Style:
    heads: int = 4
    kv_heads: int = 4
    causal: bool = True
    rope: bool = False
    alibi: bool = False
    relative: bool = False  # a learned bias of distances
    softcap: float | None = None
    sinks: bool = False
    padding: bool = False
    pooled: bool = False
    mixes: bool = False  # a running mean over tokens between two attentions
    layers: int = 2


class Attention(nn.Module):
    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.q = nn.Linear(WIDTH, style.heads * DIM)
        self.kv = nn.Linear(WIDTH, 2 * style.kv_heads * DIM)
        self.out = nn.Linear(style.heads * DIM, WIDTH)
        if style.relative:
            self.table = nn.Parameter(torch.randn(style.heads, 17))
        if style.sinks:
            self.sink = nn.Parameter(torch.randn(style.heads))

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        s, (B, T, _) = self.style, x.shape
        q = self.q(x).view(B, T, s.heads, DIM).transpose(1, 2)
        k, v = self.kv(x).view(B, T, 2, s.kv_heads, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        if s.rope:
            q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(s.heads // s.kv_heads, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * DIM**-0.5
        if s.softcap is not None:
            scores = s.softcap * torch.tanh(scores / s.softcap)
        place = torch.arange(T)
        apart = place[None, :] - place[:, None]
        if s.alibi:
            slopes = 2.0 ** -torch.arange(1, s.heads + 1)
            scores = scores - slopes[:, None, None].to(scores.dtype) * apart.abs()
        if s.relative:
            scores = scores + self.table[:, apart.clamp(-8, 8) + 8]
        if s.causal:
            scores = scores.masked_fill(apart > 0, float("-inf"))
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None, None, :], float("-inf"))
        if s.sinks:
            sink = self.sink[None, :, None, None].expand(B, -1, T, 1)
            p = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            p = scores.softmax(-1)
        return self.out((p @ v).transpose(1, 2).reshape(B, T, s.heads * DIM))


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turns = torch.arange(x.shape[2]).to(x.dtype)[:, None] * 10.0 ** -torch.arange(half).to(x.dtype)
    cos, sin = torch.cat([turns, turns], -1).cos(), torch.cat([turns, turns], -1).sin()
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))


class Model(nn.Module):
    def __init__(self, style: Style) -> None:
        super().__init__()
        self.style = style
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(256, WIDTH)
        self.attentions = nn.ModuleList(Attention(style) for _ in range(style.layers))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(style.layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH)) for _ in range(style.layers)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for attention, norm, mlp in zip(self.attentions, self.norms, self.mlps, strict=True):
            x = x + attention(norm(x), seen)
            x = x + mlp(x)
            if self.style.mixes:
                x = x + x.cumsum(1) / 64
        return self.head(x.mean(1) if self.style.pooled else x)


class Across(nn.Module):
    """An attention to other tokens, which padding may hide."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, others: Tensor, seen: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (4, DIM)).transpose(1, 2)
        k, v = self.kv(others).unflatten(-1, (2, 4, DIM)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) * DIM**-0.5
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None, None, :], float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Translator(nn.Module):
    """A decoder that reads an encoder in every layer; the encoder reads ids of another length, or is an input itself."""

    def __init__(self, encodes: bool) -> None:
        super().__init__()
        self.encodes = encodes
        self.tokens, self.others = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.ModuleList(Attention(Style(causal=False)) for _ in range(1))
        self.decoder = nn.ModuleList(Attention(Style(rope=True)) for _ in range(2))
        self.across = nn.ModuleList(Across() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, others: Tensor, seen: Tensor | None = None) -> Tensor:
        memory = self.others(others) if self.encodes else others
        for layer in self.encoder if self.encodes else ():
            memory = memory + layer(memory, None)
        x = self.tokens(ids)
        for layer, across in zip(self.decoder, self.across, strict=True):
            x = x + layer(x, None)
            x = x + across(x, memory, seen)
        return self.head(x)


def translator(encodes: bool, dtype: torch.dtype = torch.float64) -> Translator:
    torch.manual_seed(0)
    return Translator(encodes).to(dtype).eval()


def translated(encodes: bool, length: int, others: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCABULARY, (2, length), generator=random)
    if encodes:
        return ids, torch.randint(VOCABULARY, (2, others), generator=random)
    seen = torch.arange(others).expand(2, others) < torch.tensor([[others], [others - 2]])
    return ids, torch.randn(2, others, WIDTH, generator=random, dtype=dtype), seen


def model(style: Style, seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(seed)
    return Model(style).to(dtype).eval()


def inputs(style: Style, length: int, seed: int = 1) -> tuple[Tensor, ...]:
    """Ids, and where there is padding, which tokens are real: of the second sequence, all but its last third."""
    ids = torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))
    if not style.padding:
        return (ids,)
    seen = torch.arange(length).expand(2, length) < torch.tensor([[length], [length - length // 3]])
    return ids, seen
