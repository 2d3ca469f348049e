"""Attentions whose batch and heads are one axis when queries meet keys, each spelled in its own way, with what they mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, D, V = 3, 4, 5  # heads, features of queries and keys, and of values
WIDTH = 13
WINDOW = 4  # tokens of a window, where a model cuts its sequence into windows


class Merged(nn.Module):
    """[B, N, WIDTH] -> [B, N, WIDTH].  Subclasses override ``forward``, or ``mixed`` alone."""

    scale = D**-0.5
    windowed = False  # tokens see those of their own window
    apart = False  # which are every so many
    biased = False
    heads_first = False  # in the axis that they share with the batch
    gains: Tensor | None = None  # of the heads of the queries: an edit of ``attend``
    visible: Tensor | None = None  # bool [N, N]: likewise

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, H * D), nn.Linear(WIDTH, H * D)
        self.v, self.out = nn.Linear(WIDTH, H * V), nn.Linear(H * V, WIDTH)
        if self.biased:
            self.slopes = nn.Parameter(torch.randn(H))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, N, D], [B, H, N, D], [B, H, N, V]"""
        q, k, v = (f(x).unflatten(-1, (H, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.mixed(*self.heads(x)).transpose(1, 2).flatten(2))
        return made

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Of [B * H, N, ...], with a bias [B * H, N, N]."""
        scores = torch.bmm(q, k.mT) * self.scale
        scores = scores if bias is None else scores + bias
        scores = scores if self.visible is None else scores.masked_fill(~self.visible, -torch.inf)
        o = torch.bmm(scores.softmax(-1), v)
        if self.gains is None:
            return o
        times = len(o) // H
        by_place = self.gains.repeat_interleave(times) if self.heads_first else self.gains.repeat(times)
        return o * by_place[:, None, None]

    def bias(self, length: int) -> Tensor:
        """[H, N, N]"""
        places = torch.arange(length)
        return self.slopes[:, None, None] * (places - places[:, None]).clamp(-9, 9)


def meant(model: Merged, x: Tensor, gains: Sequence[float] = (1.0,) * H, visible: Tensor | None = None) -> Tensor:
    """The definition, head by head of each sequence; ``visible``: bool [N, N], for what a pattern leaves."""
    q, k, v = model.heads(x)
    length = x.shape[1]
    scores = model.scale * torch.einsum("bhld,bhsd->bhls", q, k)
    if model.biased:
        scores = scores + model.bias(length)
    if model.windowed:
        places = torch.arange(length)
        window = places % (length // WINDOW) if model.apart else places // WINDOW
        scores = scores.masked_fill(window[:, None] != window, -torch.inf)
    if visible is not None:
        rank = torch.arange(length) // (length // WINDOW if model.apart else 1)  # in its window
        scores = scores.masked_fill(~visible[rank][:, rank], -torch.inf)
    o = scores.softmax(-1) @ v * torch.tensor(gains, dtype=v.dtype)[:, None, None]
    made: Tensor = model.out(o.transpose(1, 2).flatten(2))
    return made


class Flattened(Merged):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = self.attend(*(x.flatten(0, 1) for x in (q, k, v)))
        return o.unflatten(0, (len(q), H))


class HeadsFirst(Merged):
    """``b h n d -> (h b) n d``."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = self.attend(*(x.transpose(0, 1).flatten(0, 1) for x in (q, k, v)))
        return o.unflatten(0, (H, len(q))).transpose(0, 1)


class Pieces(Merged):
    """Heads first, as pieces of the features one after the other, and as pieces of the batch behind each other again."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.cat(torch.chunk(f(x), H, dim=2), dim=0) for f in (self.q, self.k, self.v))
        made: Tensor = self.out(torch.cat(torch.chunk(self.attend(q, k, v), H, dim=0), dim=2))
        return made


class Sliced(Merged):
    """The same by slices, the last head first: one head of so many more sequences."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x) for f in (self.q, self.k, self.v))
        q, k, v = (torch.cat([t[..., i * w : (i + 1) * w] for i in (2, 1, 0)]) for t, w in ((q, D), (k, D), (v, V)))
        o = self.attend(q, k, v).unflatten(0, (H, len(x)))
        made: Tensor = self.out(torch.cat([o[2], o[1], o[0]], -1))
        return made


class Behind(Merged):
    """An operator through which no axis is followed lies behind the merge."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1).roll(1, 2) for x in (q, k, v))
        return self.attend(q, k, v).roll(-1, 2).unflatten(0, (-1, H))


class HeadsFirstBehind(Merged):
    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = self.attend(*(x.transpose(0, 1).flatten(0, 1).roll(1, 2) for x in (q, k, v)))
        return o.roll(-1, 2).unflatten(0, (H, len(q))).transpose(0, 1)


class TokensFirst(Merged):
    """[N, B, ...], as in fairseq."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        n, B, _ = x.shape
        q, k, v = self.q(x) * self.scale, self.k(x), self.v(x)
        q, k = (t.contiguous().view(n, B * H, D).transpose(0, 1) for t in (q, k))
        v = v.contiguous().view(n, B * H, V).transpose(0, 1)
        weights = F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1)
        o = torch.bmm(weights, v).transpose(0, 1).contiguous().view(n, B, H * V)
        made: Tensor = self.out(o).transpose(0, 1)
        return made


class Into(Merged):
    """The product is added to a tensor without values, as in diffusers."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, n, _ = q.shape
        q, k, v = (x.reshape(B * H, n, -1) for x in (q, k, v))
        nothing = torch.empty(B * H, n, n, dtype=q.dtype)
        scores = torch.baddbmm(nothing, q, k.transpose(-1, -2), beta=0, alpha=self.scale)
        return torch.bmm(scores.softmax(-1), v).view(B, H, n, V)


class OntoZeros(Merged):
    """Added to zeros, as in GPT-NeoX, with heads first."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, n, _ = q.shape
        q, k, v = (x.transpose(0, 1).reshape(B * H, n, -1) for x in (q, k, v))
        scores = torch.baddbmm(torch.zeros(B * H, n, n), q, k.transpose(1, 2), beta=1.0, alpha=self.scale)
        return torch.bmm(scores.softmax(-1), v).view(H, B, n, V).transpose(0, 1)


class Windows(Merged):
    """Batch, windows and heads are one axis."""

    windowed = True

    def forward(self, x: Tensor) -> Tensor:
        B, n, _ = x.shape
        count = n // WINDOW
        q, k, v = (f(x).view(B, count, WINDOW, H, -1).transpose(2, 3) for f in (self.q, self.k, self.v))
        o = self.attend(*(t.reshape(B * count * H, WINDOW, -1) for t in (q, k, v)))
        made: Tensor = self.out(o.view(B, count, H, WINDOW, V).transpose(2, 3).reshape(B, n, H * V))
        return made


class HeadsOfWindows(Merged):
    """Heads outermost, then windows, then the batch."""

    windowed = True

    def forward(self, x: Tensor) -> Tensor:
        B, n, _ = x.shape
        count = n // WINDOW
        q, k, v = (f(x).view(B, count, WINDOW, H, -1).permute(3, 1, 0, 2, 4) for f in (self.q, self.k, self.v))
        o = self.attend(*(t.reshape(H * count * B, WINDOW, -1) for t in (q, k, v)))
        made: Tensor = self.out(o.view(H, count, B, WINDOW, V).permute(2, 1, 3, 0, 4).reshape(B, n, H * V))
        return made


class WindowsInside(Merged):
    """Heads between the batch and the windows, as divided attention in space and time has them; an operator lies behind."""

    windowed = True

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count = q.shape[2] // WINDOW
        q, k, v = (self.cut(x.flatten(0, 1)).flatten(0, 1).roll(1, 2) for x in (q, k, v))
        o = self.attend(q, k, v).roll(-1, 2).unflatten(0, (-1, count))
        return self.joined(o).unflatten(0, (-1, H))

    def cut(self, x: Tensor) -> Tensor:
        """[B * H, N, ...] -> [B * H, N / WINDOW, WINDOW, ...]"""
        return x.unflatten(1, (-1, WINDOW))

    def joined(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)


class WindowsAcross(WindowsInside):
    """The tokens of a window lie apart."""

    apart = True

    def cut(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (WINDOW, -1)).transpose(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(1, 2)


class WindowsOutside(Merged):
    """Heads between the windows and the batch."""

    windowed = True

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count = q.shape[2] // WINDOW
        q, k, v = (x.unflatten(2, (-1, WINDOW)).permute(2, 1, 0, 3, 4).flatten(0, 2).roll(1, 2) for x in (q, k, v))
        o = self.attend(q, k, v).roll(-1, 2).unflatten(0, (count, H, -1))
        return o.permute(2, 1, 0, 3, 4).flatten(2, 3)


class Bias(Merged):
    """A bias by head, repeated for each sequence."""

    biased = True

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, n, _ = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(self.bias(n).repeat(B, 1, 1), q, k.mT, alpha=self.scale)
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (B, H))


class BiasHeadsFirst(Merged):
    biased = True

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, n, _ = q.shape
        q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
        scores = torch.bmm(q, k.mT) * self.scale + self.bias(n).repeat_interleave(B, 0)
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (H, B)).transpose(0, 1)


# ---------------------------------------------------------------- from one projection
class Packed(Merged):
    """One projection of [role, head, feature], whose batch is merged before it is cut (SAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * H * D), nn.Linear(H * D, WIDTH)
        del self.q, self.k, self.v

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        B, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, n, 3, H, -1).permute(2, 0, 3, 1, 4).reshape(3, B * H, n, -1).unbind(0)
        o = self.attend(q, k, v).view(B, H, n, -1).permute(0, 2, 1, 3).reshape(B, n, -1)
        made: Tensor = self.out(o)
        return made


class PackedHeadsFirst(Packed):
    def forward(self, x: Tensor) -> Tensor:
        B, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, n, 3, H, -1).permute(2, 3, 0, 1, 4).reshape(3, H * B, n, -1).unbind(0)
        made: Tensor = self.out(self.attend(q, k, v).view(H, B, n, -1).permute(1, 2, 0, 3).reshape(B, n, -1))
        return made


class RolesInside(Packed):
    """Queries, keys and values of a head side by side."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (H, 3, D)).permute(3, 0, 2, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        B, n, _ = x.shape
        q, k, v = self.qkv(x).view(B, n, H, 3 * D).transpose(1, 2).reshape(B * H, n, 3 * D).chunk(3, -1)
        made: Tensor = self.out(self.attend(q, k, v).view(B, H, n, D).transpose(1, 2).reshape(B, n, H * D))
        return made


class ChannelsFirst(Packed):
    """[B, channels, N], as in guided diffusion: roles of a head side by side, features before tokens."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (H, 3, D)).permute(3, 0, 2, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        B, n, _ = x.shape
        qkv = F.conv1d(x.transpose(1, 2), self.qkv.weight.unsqueeze(-1), self.qkv.bias)
        q, k, v = qkv.reshape(B * H, 3 * D, n).split(D, dim=1)
        half = self.scale**0.5
        weights = torch.einsum("bct,bcs->bts", q * half, k * half).softmax(-1)
        o = torch.einsum("bts,bcs->bct", weights, v).reshape(B, H * D, n)
        made: Tensor = F.conv1d(o, self.out.weight.unsqueeze(-1), self.out.bias).transpose(1, 2)
        return made


class RolesApart(Packed):
    """The same with the three roles one after the other, cut before heads are merged."""

    def forward(self, x: Tensor) -> Tensor:
        B, n, _ = x.shape
        qkv = F.conv1d(x.transpose(1, 2), self.qkv.weight.unsqueeze(-1), self.qkv.bias)
        q, k, v = (t.reshape(B * H, D, n) for t in qkv.chunk(3, dim=1))
        weights = torch.einsum("bct,bcs->bts", q * self.scale, k).softmax(-1)
        o = torch.einsum("bts,bcs->bct", weights, v).reshape(B, H * D, n)
        made: Tensor = F.conv1d(o, self.out.weight.unsqueeze(-1), self.out.bias).transpose(1, 2)
        return made


class InProjection(Packed):
    """As in torch's multi_head_attention_forward, that returns weights."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        n, B, _ = x.shape
        proj = F.linear(x, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, H * D)).unsqueeze(0)
        q, k, v = proj.transpose(0, -2).squeeze(-2).contiguous()
        q, k, v = (t.view(n, B * H, D).transpose(0, 1) for t in (q, k, v))
        weights = F.softmax(torch.bmm(q * self.scale, k.transpose(-2, -1)), dim=-1)
        o = torch.bmm(weights, v).transpose(0, 1).contiguous().view(n * B, H * D)
        made: Tensor = self.out(o).view(n, B, WIDTH).transpose(0, 1)
        return made


SPELLINGS = (
    Flattened,
    HeadsFirst,
    Pieces,
    Behind,
    HeadsFirstBehind,
    TokensFirst,
    Into,
    OntoZeros,
    Windows,
    HeadsOfWindows,
    WindowsInside,
    WindowsAcross,
    WindowsOutside,
    Bias,
    BiasHeadsFirst,
    Packed,
    PackedHeadsFirst,
    RolesInside,
    ChannelsFirst,
    RolesApart,
    InProjection,
)


# ---------------------------------------------------------------- what looks alike
class OtherOrder(Merged):
    """Keys and values have their heads first, queries their batch: sequences read each other."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.transpose(0, 1).flatten(0, 1) for x in (k, v))
        return self.attend(q.flatten(0, 1), k, v).unflatten(0, (len(q), H))


class OtherOrderBehind(Merged):
    """The same, behind an operator through which no axis is followed."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.transpose(0, 1).flatten(0, 1) for x in (k, v))
        return self.attend(*(x.roll(1, 2) for x in (q.flatten(0, 1), k, v))).unflatten(0, (len(q), H))


class OtherValues(Merged):
    """Values alone have their heads first."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v.transpose(0, 1).flatten(0, 1)
        return self.attend(q.flatten(0, 1), k.flatten(0, 1), v).unflatten(0, (len(q), H))


class OtherOutput(Merged):
    """What comes out is taken apart in the other order."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = self.attend(*(x.flatten(0, 1) for x in (q, k, v)))
        return o.unflatten(0, (H, len(q))).transpose(0, 1)


class OtherCut(Packed):
    """Heads first when merged, batch first when taken apart."""

    heads_first = True

    def forward(self, x: Tensor) -> Tensor:
        B, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, n, 3, H, -1).permute(2, 3, 0, 1, 4).reshape(3, H * B, n, -1).unbind(0)
        made: Tensor = self.out(self.attend(q, k, v).view(B, H, n, -1).permute(0, 2, 1, 3).reshape(B, n, -1))
        return made


class OtherBias(Merged):
    """A bias by head that is repeated in the order of the batch: which head it meets depends on the sequence."""

    biased = True

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, n, _ = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return self.attend(q, k, v, self.bias(n).repeat_interleave(B, 0)).unflatten(0, (B, H))


DECOYS = (Sliced, OtherOrder, OtherOrderBehind, OtherValues, OtherOutput, OtherCut, OtherBias)
