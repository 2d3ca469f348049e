"""A grammar of attentions: one meaning, spelled in every way that people spell it.

``Spelling`` says how; ``Attention`` is the module.  Its weights are made per head first and then stored as the spelling
wants, so that where each head's rows lie is known from the construction, and so is what removing a head means.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

FAR = 15  # a window of the model's own that is longer than most examples
MAX = 32  # longest sequence of stored masks and tables
LENGTH, OTHER = 7, 5  # of the sequence, and of another one that cross-attention reads


@dataclass(frozen=True)
class Spelling:
    """How one attention is written.  ``repaired`` replaces what cannot stand together."""

    heads: int = 4
    kv_heads: int = 4
    width: int = 12
    head_dim: int = 4
    value_dim: int = 4
    bias: bool = True
    op: str = "linear"  # linear, parameter, addmm, conv1d, conv2d, einsum
    packing: str = "separate"  # separate, fused, kv, per-head, per-group
    order: str = "qkv"
    unpack: str = "split"  # chunk, split, slice, unbind, select, index (with a list)
    # matmul, bmm, baddbmm, einsum, heads-last, channels, transposed, mulsum, sdpa, flex, grouped, grouped-einsum
    core: str = "matmul"
    share: str = "expand"  # repeat_interleave, expand, tiled, index, enable_gqa, broadcast (one K/V head)
    rope: str = ""  # half, chunks, interleaved, in-place, complex
    norm: str = ""  # layer, rms, l2, across
    scale: str = "mul"  # q, k, both, mul, div, alpha, none, buffer, temperature, over (one), root
    mask: tuple[str, ...] = ()  # causal, window, left, far, chunk (longer than examples), padding, float-padding, given
    made: str = "tril"  # tril, triu, arange, like (the scores)
    apply: str = "where"  # add-inf, add-min, lerp, where, masked_fill, moderate, assigned, old-gpt
    after: str = ""  # what is done to the weights too: again, flags, rows (masks once more), clean (of NaN)
    commuted: bool = False
    bias_kind: str = ""  # alibi, table, addend, rows (of a table, which meet the queries)
    softcap: float | None = None  # 1 is spelled as a bare tanh
    sinks: bool = False
    sink: str = "learned"  # learned, padded (a column of zeros), one (added to the sum of exponentials)
    # F, torch, method, positive, float32, upcast, shifted, exp, stable-exp, inverse, exp2, eps, log, lse, lse-rows, again,
    # late, later (behind the layout)
    softmax: str = "F"
    cross: bool = False
    returns: str = "output"  # output, weights, heads (each head's output), stats (of the weights)
    out: bool = True
    pre_norm: bool = False
    residual: bool = False
    dropout: bool = False
    windows: bool = False  # the core has [B, H, 2 windows, L, D], from a batch of windows

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def kv_of_head(self) -> tuple[int, ...]:
        tiled = self.share == "tiled" and self.core not in ("grouped", "grouped-einsum")
        return tuple(h % self.kv_heads if tiled else h // self.group for h in range(self.heads))

    @property
    def exponentials(self) -> bool:
        """The softmax is written with ``exp``."""
        return self.softmax in ("exp", "stable-exp", "inverse", "exp2", "eps", "late", "later", "lse", "lse-rows")

    def repaired(self) -> Spelling:
        """The nearest spelling whose parts can stand together."""
        s = self._with_windows() if self.windows else self
        if s.heads % s.kv_heads:
            s = replace(s, kv_heads=s.heads)
        if s.op in ("einsum", "conv1d", "conv2d") and s.packing in ("per-group", "per-head"):
            s = replace(s, packing="fused" if s.op != "einsum" else "separate")
        if s.op == "einsum":
            s = replace(s, packing="separate")
        if s.cross and s.packing in ("fused", "per-head", "per-group"):
            s = replace(s, packing="kv" if s.op != "einsum" else "separate")
        if s.packing == "per-head" and s.heads != s.kv_heads:
            s = replace(s, packing="per-group")
        if s.packing == "per-group" or s.unpack in ("unbind", "select", "index"):
            s = replace(s, value_dim=s.head_dim)
        if s.packing == "fused" and s.unpack in ("chunk", "unbind", "select", "index"):
            s = replace(s, kv_heads=s.heads, value_dim=s.head_dim)
        if s.packing == "kv" and s.unpack == "chunk":
            s = replace(s, value_dim=s.head_dim)
        if s.rope and s.head_dim % 2:
            s = replace(s, rope="")
        if s.kv_heads == s.heads:
            s = replace(s, share="expand", core={"grouped": "matmul", "grouped-einsum": "einsum"}.get(s.core, s.core))
        if s.share == "enable_gqa" and s.core not in ("sdpa", "flex"):
            s = replace(s, share="expand")
        if s.share == "broadcast" and (s.kv_heads != 1 or s.core not in ("matmul", "einsum", "mulsum")):
            s = replace(s, share="expand")
        if s.scale == "alpha" and s.core != "baddbmm":
            s = replace(s, scale="mul")
        if s.core == "baddbmm":  # these would change the addend too
            s = replace(s, scale="mul" if s.scale in ("temperature", "over") else s.scale)
            s = replace(s, softcap=None) if s.bias_kind == "addend" else s
        if s.bias_kind == "addend" and s.core != "baddbmm":
            s = replace(s, bias_kind="alibi")
        if s.apply == "old-gpt" and (
            len({"causal", "left", "far", "chunk"} & set(s.mask)) != 1
            or set(s.mask) - {"causal", "left", "far", "chunk", "padding"}
            or s.bias_kind
            or s.cross
        ):
            s = replace(s, apply="where")
        if s.apply == "moderate" and "given" in s.mask:  # which may hide too
            s = replace(s, apply="where")
        written = s.mask and "given" not in s.mask and s.apply in ("where", "masked_fill", "moderate", "assigned")
        if (s.after == "clean" and s.softmax in ("exp", "late", "later")) or (
            s.after not in ("", "clean") and not written
        ):
            s = replace(s, after="")
        if s.after == "rows" and len(s.mask) > 1:
            s = replace(s, after="again")
        if s.core == "flex":
            s = replace(s, apply="where")
        if s.bias_kind == "rows" and s.core in ("sdpa", "flex"):
            s = replace(s, core="matmul")
        if s.core in ("sdpa", "flex"):
            s = replace(
                s,
                after="",
                softcap=None if s.core == "sdpa" else s.softcap,
                sinks=False,
                softmax="F",
                returns="heads" if s.returns == "heads" else "output",
                scale="none" if s.scale == "none" else "mul",
            )
        if s.softmax in ("late", "later") and (s.sinks or s.returns in ("weights", "stats")):
            s = replace(s, softmax="F")
        if s.core == "transposed" and (s.sinks or s.softmax not in ("F", "torch", "method", "positive")):
            s = replace(s, softmax="F", sinks=False)
        if not s.sinks:
            s = replace(s, sink="learned")
        if s.sink == "one" and s.softmax not in ("exp", "stable-exp"):
            s = replace(s, sink="padded")
        if s.cross:
            s = replace(s, mask=tuple(m for m in s.mask if m in ("padding", "float-padding")), rope="", bias_kind="")
        if not s.out:
            s = replace(s, residual=False)
        return s

    def _with_windows(self) -> Spelling:
        s = self
        if s.heads == 2:  # as many heads as windows: the oracle could not tell them apart
            s = replace(s, heads=3, kv_heads=1)
        if s.share in ("enable_gqa", "broadcast"):
            s = replace(s, share="expand")
        return replace(
            s,
            core="sdpa" if s.core == "sdpa" else "matmul",
            scale="mul" if s.scale in ("temperature", "over") else s.scale,
            mask=tuple(m for m in s.mask if m not in ("padding", "float-padding", "given")),
            after="",
            bias_kind="",
            sinks=False,
            softmax="F" if s.softmax in ("late", "later") else s.softmax,
            cross=False,
            returns="output",
        )


def role_sizes(s: Spelling) -> dict[str, tuple[int, int]]:
    return {"q": (s.heads, s.head_dim), "k": (s.kv_heads, s.head_dim), "v": (s.kv_heads, s.value_dim)}


def packed_names(s: Spelling) -> dict[str, str]:
    """Which stored matrix holds each role."""
    if s.packing == "separate":
        return {"q": "q", "k": "k", "v": "v"}
    if s.packing == "kv":
        return {"q": "q", "k": "kv", "v": "kv"}
    return {"q": "qkv", "k": "qkv", "v": "qkv"}


def places(s: Spelling) -> dict[str, Tensor]:
    """For each role the row of its stored matrix that makes (head, feature): [n, d]."""
    sizes = role_sizes(s)
    if s.packing == "per-group":
        block = (s.group + 2) * s.head_dim
        d, g = torch.arange(s.head_dim), torch.arange(s.kv_heads)[:, None] * block
        h = torch.arange(s.heads)[:, None]
        q = h // s.group * block + h % s.group * s.head_dim + d
        return {"q": q, "k": g + s.group * s.head_dim + d, "v": g + (s.group + 1) * s.head_dim + d}
    if s.packing == "per-head":
        block, offset, found = sum(d for _, d in sizes.values()), 0, dict[str, Tensor]()
        for role in s.order:
            found[role] = torch.arange(s.heads)[:, None] * block + offset + torch.arange(sizes[role][1])
            offset += sizes[role][1]
        return found
    found, offsets = {}, dict.fromkeys(packed_names(s).values(), 0)
    for role in s.order:
        n, d = sizes[role]
        store = packed_names(s)[role]
        found[role] = offsets[store] + torch.arange(n * d).view(n, d)
        offsets[store] += n * d
    return found


class Attention(nn.Module):
    """``forward(x, memory, padding, given)``: [B, L, E] -> [B, L, E] (or (that, weights)).

    ``padding``: [B, S], true or one where a key may be seen; ``given``: a float mask [B, 1, L, S].
    """

    def __init__(self, spelling: Spelling, seed: int = 0, equal: Mapping[int, int] | None = None) -> None:
        """``equal``: K/V head -> the K/V head whose weights it gets too."""
        super().__init__()
        self.s = s = spelling.repaired()
        random = torch.Generator().manual_seed(seed)

        def noise(*sizes: int, by: float = 1.0) -> Tensor:
            return torch.randn(sizes, generator=random) * by

        self._store_projections(noise, equal or {})
        n = s.heads * s.value_dim
        if s.out:
            weight, bias = noise(s.width, n, by=n**-0.5), noise(s.width, by=0.3)
            shapes = {"addmm": weight.mT.contiguous(), "conv1d": weight[..., None], "conv2d": weight[..., None, None]}
            stored = (
                weight.view(s.width, s.heads, s.value_dim).permute(1, 2, 0).contiguous() if s.op == "einsum" else weight
            )
            self.w_out = nn.Parameter(shapes.get(s.op, stored))
            self.b_out = nn.Parameter(bias) if s.bias else None
        if s.norm in ("layer", "rms", "across"):
            sizes = (
                {"q": s.heads * s.head_dim, "k": s.kv_heads * s.head_dim}
                if s.norm == "across"
                else dict.fromkeys("qk", s.head_dim)
            )
            kind = nn.RMSNorm if s.norm == "rms" else nn.LayerNorm
            self.norms = nn.ModuleDict({role: kind(size) for role, size in sizes.items()})
            for p in self.norms.parameters():
                p.data += noise(*p.shape, by=0.2)
        if s.scale in ("temperature", "over"):
            self.temperature = nn.Parameter(1 + noise(s.heads, 1, 1, by=0.3).abs())
        if s.scale == "buffer":
            self.register_buffer("factor", torch.tensor(s.head_dim**-0.5))
        if s.bias_kind == "table":
            self.table = nn.Parameter(noise(s.heads, 2 * MAX - 1))
        if s.bias_kind == "rows":
            self.rows = nn.Parameter(noise(2 * MAX - 1, s.head_dim))
        if s.bias_kind in ("alibi", "addend"):
            self.register_buffer("slopes", 0.5 ** torch.arange(1, s.heads + 1, dtype=torch.float32))
        if s.sinks and s.sink == "learned":
            self.sink = nn.Parameter(noise(s.heads))
        self.register_buffer("tril", torch.ones(MAX, MAX, dtype=torch.bool).tril(), persistent=False)
        self.pre = nn.LayerNorm(s.width) if s.pre_norm else nn.Identity()
        self.drop = nn.Dropout(0.1) if s.dropout else nn.Identity()
        self.eval()

    def _store_projections(self, noise: Any, equal: Mapping[int, int]) -> None:
        s, where = self.s, places(self.s)
        made: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        for role, (n, d) in role_sizes(s).items():
            weight, bias = noise(n, d, s.width, by=1.4 * s.width**-0.5), noise(n, d, by=0.5)
            if role != "q":
                for head, source in equal.items():
                    weight[head], bias[head] = weight[source], bias[source]
            store = packed_names(s)[role]
            rows = sum(role_sizes(s)[r][0] * role_sizes(s)[r][1] for r in "qkv" if packed_names(s)[r] == store)
            made.setdefault(store, torch.zeros(rows, s.width))[where[role]] = weight
            biases.setdefault(store, torch.zeros(rows))[where[role]] = bias
        for store, weight in made.items():
            if s.op == "linear":
                linear = nn.Linear(s.width, len(weight), bias=s.bias)
                linear.weight.data = weight
                if s.bias:
                    linear.bias.data = biases[store]
                self.add_module(f"{store}_proj", linear)
                continue
            shapes = {"addmm": weight.mT.contiguous(), "conv1d": weight[..., None], "conv2d": weight[..., None, None]}
            if s.op == "einsum":
                n, d = role_sizes(s)[store]
                weight = weight.view(n, d, s.width)
                biases[store] = biases[store].view(n, d)
            self.register_parameter(f"w_{store}", nn.Parameter(shapes.get(s.op, weight)))
            self.register_parameter(f"b_{store}", nn.Parameter(biases[store]) if s.bias else None)

    # ------------------------------------------------------------ what the construction knows
    def expected_projections(self) -> dict[str, dict[str, Any]]:
        """Names and rows of the projections, as a site should give them."""
        s, found = self.s, dict[str, dict[str, Any]]()
        for role, rows in places(s).items():
            store = packed_names(s)[role]
            names = (f"{store}_proj.weight", f"{store}_proj.bias") if s.op == "linear" else (f"w_{store}", f"b_{store}")
            found[role] = {
                "weight": names[0], "bias": names[1] if s.bias else None, "transposed": s.op == "addmm",
                "rows": tuple(map(tuple, rows.tolist())),
            }  # fmt: skip
        columns = torch.arange(s.heads * s.value_dim).view(s.heads, s.value_dim)
        rows = tuple(map(tuple, columns.tolist()))
        found["out"] = {
            "weight": "w_out",
            "bias": "b_out" if s.bias else None,
            "transposed": s.op == "addmm",
            "rows": rows,
        }
        return found

    def stored(self, role: str) -> list[Tensor]:
        """The weight, and the bias if there is one, that make q, k or v."""
        store = packed_names(self.s)[role]
        if self.s.op == "linear":
            return list(self.get_submodule(f"{store}_proj").parameters())
        found = (getattr(self, f"w_{store}"), getattr(self, f"b_{store}"))
        return [p for p in found if p is not None]

    def with_gains(self, gains: Mapping[int, float]) -> Attention:
        """A copy whose heads' outputs are multiplied, by way of the output projection."""
        assert self.s.out
        made = copy.deepcopy(self)
        w, d = made.w_out.data, self.s.value_dim
        for head, gain in gains.items():
            if self.s.op == "einsum":
                w[head] *= gain
            elif self.s.op == "addmm":
                w[head * d : (head + 1) * d] *= gain
            else:
                w[:, head * d : (head + 1) * d] *= gain
        return made

    # ------------------------------------------------------------ projections
    def _project(self, store: str, x: Tensor) -> Tensor:
        """[B, L, F], or [B, F, L] for a convolution, or [B, L, n, d] for einsum."""
        s = self.s
        if s.op == "linear":
            return self.get_submodule(f"{store}_proj")(x)
        w, b = getattr(self, f"w_{store}"), getattr(self, f"b_{store}")
        if s.op == "parameter":
            y = x @ w.T
            return y if b is None else y + b
        if s.op == "addmm":
            flat = x.reshape(-1, x.shape[-1])
            y = flat @ w if b is None else torch.addmm(b, flat, w)
            return y.view(*x.shape[:-1], -1)
        if s.op == "conv1d":
            return F.conv1d(x.transpose(1, 2), w, b)
        if s.op == "conv2d":
            return F.conv2d(x.transpose(1, 2).unsqueeze(2), w, b).flatten(2)
        y = torch.einsum("ble,hde->blhd", x, w)
        return y if b is None else y + b

    def _heads(self, x: Tensor, memory: Tensor) -> dict[str, Tensor]:
        """[B, L, n, d] for each role."""
        s, sizes = self.s, role_sizes(self.s)
        first = s.op in ("conv1d", "conv2d")
        found: dict[str, Tensor] = {}
        for store in dict.fromkeys(packed_names(s).values()):
            y = self._project(store, x if "q" in store else memory)
            roles = [r for r in s.order if packed_names(s)[r] == store]
            if s.packing == "per-group":
                y = y.view(*y.shape[:2], s.kv_heads, s.group + 2, s.head_dim)
                found["q"] = y[:, :, :, :-2].reshape(*y.shape[:2], s.heads, s.head_dim)
                if s.unpack == "index":
                    found["k"], found["v"] = (y[..., [i], :].squeeze(3) for i in (-2, -1))
                else:
                    found["k"], found["v"] = y[..., -2, :], y[..., -1, :]
            elif s.packing == "per-head":
                found.update(zip(roles, self._unpack_heads(y, roles), strict=True))
            elif len(roles) == 1:
                n, d = sizes[roles[0]]
                found[roles[0]] = self._split_heads(y, n, d, first)
            else:
                found.update(zip(roles, self._unpack(y, roles, first), strict=True))
        return found

    def _split_heads(self, y: Tensor, n: int, d: int, first: bool) -> Tensor:
        if y.dim() == 4:
            return y
        return y.reshape(y.shape[0], n, d, y.shape[2]).permute(0, 3, 1, 2) if first else y.reshape(*y.shape[:2], n, d)

    def _unpack_heads(self, y: Tensor, roles: list[str]) -> list[Tensor]:
        dims = [role_sizes(self.s)[r][1] for r in roles]
        y = y.view(*y.shape[:2], self.s.heads, sum(dims))
        if self.s.unpack == "unbind":
            return list(y.unflatten(-1, (3, dims[0])).unbind(-2))
        if self.s.unpack == "chunk" and len(set(dims)) == 1:
            return list(y.chunk(3, dim=-1))
        return list(y.split(dims, dim=-1))

    def _unpack(self, y: Tensor, roles: list[str], first: bool) -> list[Tensor]:
        s, sizes = self.s, [role_sizes(self.s)[r] for r in roles]
        axis = 1 if first else 2
        if s.unpack in ("unbind", "select", "index") and len(set(sizes)) == 1:
            n, d = sizes[0]
            if first:
                y = y.view(y.shape[0], len(roles), n, d, y.shape[2])
                parts = y.unbind(1) if s.unpack == "unbind" else [y[:, i] for i in range(len(roles))]
                return [p.permute(0, 3, 1, 2) for p in parts]
            y = y.view(*y.shape[:2], len(roles), n, d)
            if s.unpack == "unbind":
                return list(y.unbind(2))
            if s.unpack == "index":
                return [y[:, :, [i]].squeeze(2) for i in range(len(roles))]
            y = y.permute(2, 0, 3, 1, 4)
            return [y[i].transpose(1, 2) for i in range(len(roles))]
        widths = [n * d for n, d in sizes]
        if s.unpack == "chunk" and len(set(widths)) == 1:
            parts = list(y.chunk(len(roles), dim=axis))
        elif s.unpack == "slice":
            ends = [sum(widths[: i + 1]) for i in range(len(widths))]
            parts = [y[:, e - w : e] if first else y[..., e - w : e] for e, w in zip(ends, widths, strict=True)]
        else:
            parts = list(y.split(widths, dim=axis))
        return [self._split_heads(p, n, d, first) for p, (n, d) in zip(parts, sizes, strict=True)]

    # ------------------------------------------------------------ before the product
    def _normed(self, t: Tensor, role: str) -> Tensor:
        s = self.s
        if s.norm == "l2":
            return F.normalize(t, dim=-1) * 2
        if s.norm == "across":
            return self.norms[role](t.flatten(-2)).view(t.shape)
        return self.norms[role](t) if s.norm else t

    def _rotated(self, t: Tensor, past: int) -> Tensor:
        """[B, L, n, d] with the rotary positions of the tokens after ``past`` others."""
        s = self.s
        if not s.rope:
            return t
        half = s.head_dim // 2
        speeds = 10.0 ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = ((torch.arange(t.shape[1], dtype=torch.float32) + past)[:, None] * speeds)[None, :, None]
        if s.rope == "complex":
            turned = torch.view_as_complex(
                t.float().clone(memory_format=torch.contiguous_format).view(*t.shape[:-1], half, 2)
            ) * torch.polar(torch.ones_like(angles), angles)
            return torch.view_as_real(turned).flatten(-2).type_as(t)
        if s.rope == "half":
            both = torch.cat([angles, angles], -1)
            a, b = t[..., :half], t[..., half:]
            return t * both.cos().to(t.dtype) + torch.cat([-b, a], -1) * both.sin().to(t.dtype)
        cos, sin = angles.cos().to(t.dtype), angles.sin().to(t.dtype)
        if s.rope == "chunks":
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        a, b = t[..., 0::2], t[..., 1::2]
        if s.rope == "in-place":
            made = torch.empty_like(t)
            made[..., 0::2], made[..., 1::2] = a * cos - b * sin, a * sin + b * cos
            return made
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def _shared(self, t: Tensor, at: int) -> Tensor:
        """K/V heads at axis ``at`` repeated for the query heads that read them."""
        s = self.s
        if s.kv_heads == s.heads or s.share in ("enable_gqa", "broadcast") or s.core.startswith("grouped"):
            return t
        if s.share == "repeat_interleave":
            return t.repeat_interleave(s.group, dim=at)
        if s.share == "index":
            return t.index_select(at, torch.arange(s.heads) // s.group)
        sizes = list(t.shape)
        if s.share == "tiled":
            return t.repeat(*(s.group if i == at else 1 for i in range(t.dim())))
        t = t.unsqueeze(at + 1).expand(*sizes[: at + 1], s.group, *sizes[at + 1 :])
        return t.reshape(*sizes[:at], s.heads, *sizes[at + 1 :])

    # ------------------------------------------------------------ scores
    def _capped(self, scores: Tensor) -> Tensor:
        cap = self.s.softcap
        if cap is None or cap == 1:
            return scores if cap is None else scores.tanh()
        return torch.tanh(scores / cap) * cap

    def _visible(self, kind: str, q_len: int, kv_len: int, padding: Tensor | None) -> Tensor:
        """Bool [L, S] or [B, 1, 1, S]."""
        past = 0 if self.s.cross else kv_len - q_len
        i, j = torch.arange(q_len)[:, None] + past, torch.arange(kv_len)[None, :]
        if kind == "padding":
            assert padding is not None
            return padding[:, None, None, :].bool()
        if kind == "float-padding":
            assert padding is not None
            return padding[:, None, None, :] > 0.5
        if kind == "window":
            return (i - j).abs() <= 2
        if kind == "left":
            return (j <= i) & (j > i - 3)
        if kind == "far":
            return (j <= i) & (i - j < FAR)
        if kind == "chunk":
            return (j <= i) & (i // FAR == j // FAR)
        if self.s.made == "tril":
            return self.tril[past : past + q_len, :kv_len]
        return ~torch.ones(q_len, kv_len, dtype=torch.bool).triu(1 + past) if self.s.made == "triu" else j <= i

    def _mask(self, kind: str, scores: Tensor, padding: Tensor | None) -> Tensor:
        """As ``_visible``, or in the form of the scores."""
        if kind == "causal" and self.s.made == "like":
            return torch.ones_like(scores, dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
        return self._visible(kind, scores.shape[-2], scores.shape[-1], padding)

    def _biased(self, scores: Tensor, looked: Tensor | None = None) -> Tensor:
        """[B, H, L, S] with the position bias; ``looked``: what rows of the table give queries."""
        s = self.s
        if s.bias_kind not in ("alibi", "table", "rows"):
            return scores
        bias = self._bias(scores.shape[-2], scores.shape[-1]) if looked is None else looked
        return bias + scores if s.commuted else scores + bias

    def _looked(self, q: Tensor, kv_len: int) -> Tensor | None:
        """[B, H, L, S], of queries [B, L, H, D] and the row for each distance."""
        if self.s.bias_kind != "rows":
            return None
        step = torch.arange(kv_len)[None, :] - (torch.arange(q.shape[1]) + (kv_len - q.shape[1]))[:, None]
        rows = self.rows[step + MAX - 1]
        if self.s.commuted:
            return (q.unsqueeze(3) * rows[None, :, None]).sum(-1).transpose(1, 2)
        return torch.einsum("blhd,lsd->bhls", q, rows)

    def _bias(self, q_len: int, kv_len: int) -> Tensor:
        step = torch.arange(kv_len)[None, :] - (torch.arange(q_len) + (kv_len - q_len))[:, None]
        if self.s.bias_kind == "table":
            return self.table[:, step + MAX - 1]
        return self.slopes[:, None, None] * -step.abs()

    def _masked(self, scores: Tensor, padding: Tensor | None, given: Tensor | None) -> Tensor:
        """[B, H, L, S] with every mask."""
        s, low = self.s, torch.finfo(scores.dtype).min
        for kind in s.mask:
            if kind == "given":
                assert given is not None
                scores = given + scores if s.commuted else scores + given
                continue
            m = self._mask(kind, scores, padding)
            if s.apply == "old-gpt" and kind == "padding":
                scores = scores + (1 - m.to(scores.dtype)) * low
            elif s.apply == "old-gpt":
                f = m.to(scores.dtype)
                scores = scores * f - 1e4 * (1 - f)
            elif s.apply == "where":
                scores = torch.where(~m, -torch.inf, scores) if s.commuted else torch.where(m, scores, low)
            elif s.apply == "masked_fill":
                scores = scores.masked_fill(m.logical_not(), low if s.commuted else -torch.inf)
            elif s.apply == "moderate":
                scores = scores.masked_fill(m == 0, -1e4)
            elif s.apply == "assigned":
                scores = scores.expand(torch.broadcast_shapes(scores.shape, m.shape)).clone()
                scores[(~m).expand_as(scores)] = -torch.inf
            else:
                if s.apply == "add-inf":
                    extra = torch.zeros(m.shape, dtype=scores.dtype).masked_fill(~m, -torch.inf)
                elif s.apply == "add-min":
                    extra = torch.where(m, 0.0, low).to(scores.dtype)
                else:
                    extra = (1.0 - m.to(scores.dtype)) * -1e9
                scores = extra + scores if s.commuted else scores + extra
        return scores

    def _conditioned(
        self, scores: Tensor, padding: Tensor | None, given: Tensor | None, looked: Tensor | None = None
    ) -> Tensor:
        """From the product [B, H, L, S] to the softmax's input."""
        s = self.s
        factor = s.head_dim**-0.5
        if s.scale == "mul":
            scores = factor * scores if s.commuted else scores * factor
        elif s.scale == "div":
            scores = scores / math.sqrt(s.head_dim)
        elif s.scale == "buffer":
            scores = scores * self.factor
        elif s.scale == "temperature":
            scores = scores * self.temperature
        elif s.scale == "over":
            scores = torch.divide(scores, self.temperature)
        elif s.scale == "root":
            scores = scores / torch.sqrt(torch.tensor(float(s.head_dim))).to(scores.dtype)
        scores = self._capped(scores)
        return self._masked(self._biased(scores, looked), padding, given)

    def _normalised(self, scores: Tensor, dim: int = -1) -> tuple[Tensor, Tensor | None]:
        """(weights, None), or (exponentials, their sum) where the division comes late."""
        s = self.s
        form = s.softmax
        if form == "F":
            return F.softmax(scores, dim=dim), None
        if form == "torch":
            return torch.softmax(scores, dim), None
        if form == "positive":
            return torch.softmax(scores, scores.dim() + dim), None
        if form == "float32":
            return F.softmax(scores, dim=dim, dtype=torch.float32).to(scores.dtype), None
        if form == "upcast":
            return scores.float().softmax(dim).type_as(scores), None
        if form == "shifted":
            return F.softmax(scores - scores.amax(), dim=dim), None
        if form == "log":
            return F.log_softmax(scores, dim).exp(), None
        if form == "lse":
            return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)), None
        if form == "lse-rows":
            return torch.exp(scores - scores.logsumexp(-1).unsqueeze(-1)), None
        if form == "again":
            w = scores.softmax(dim)
            return w / w.sum(dim, keepdim=True), None
        if form == "exp2":
            e = torch.exp2((scores - scores.amax(-1, keepdim=True)) * math.log2(math.e))
            return e / e.sum(-1, keepdim=True), None
        if form == "inverse":
            e = torch.exp(scores - scores.amax(-1, keepdim=True))
            return e * e.sum(-1).reciprocal()[..., None], None
        if form in ("exp", "stable-exp", "eps", "late", "later"):
            e = torch.exp(scores if form in ("exp", "late") else scores - scores.amax(-1, keepdim=True))
            total = e.sum(-1, keepdim=True)
            if form == "eps":
                total = total + 1e-9
            return (e, total) if form in ("late", "later") else (e / total, None)
        return scores.softmax(dim), None

    # ------------------------------------------------------------ the whole
    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        padding: Tensor | None = None,
        given: Tensor | None = None,
        cache: Any = None,
        layer: int = 0,
        past: int = 0,
    ) -> Any:
        s, skip = self.s, x
        x = self.pre(x)
        heads = self._heads(x, x if memory is None else memory)
        q, k, v = heads["q"], heads["k"], heads["v"]
        q, k = self._rotated(self._normed(q, "q"), past), self._rotated(self._normed(k, "k"), past)
        if cache is not None:
            k, v = (t.transpose(1, 2) for t in cache.update(layer, k.transpose(1, 2), v.transpose(1, 2)))
        if s.scale in ("q", "both"):
            q = q * (s.head_dim**-0.5 if s.scale == "q" else s.head_dim**-0.25)
        if s.scale in ("k", "both"):
            k = k * (s.head_dim**-0.5 if s.scale == "k" else s.head_dim**-0.25)
        out, weights = self._attended(q, k, v, padding, given)
        y = out.flatten(2)
        if s.out:
            y = self._projected(out)
        y = self.drop(y)
        if s.residual:
            y = skip + y
        if s.returns == "heads":
            return y, out
        if weights is None or s.returns == "output":
            return y
        return y, weights if s.returns == "weights" else weights.amax(-1)

    def _projected(self, out: Tensor) -> Tensor:
        """[B, L, H, Dv] -> [B, L, E]."""
        s, b = self.s, self.b_out
        if s.op == "einsum":
            y = torch.einsum("blhd,hde->ble", out, self.w_out)
            return y if b is None else y + b
        flat = out.flatten(2)
        if s.op == "conv1d":
            return F.conv1d(flat.transpose(1, 2), self.w_out, b).transpose(1, 2)
        if s.op == "conv2d":
            return F.conv2d(flat.transpose(1, 2).unsqueeze(2), self.w_out, b).flatten(2).transpose(1, 2)
        if s.op == "addmm":
            rows = flat.reshape(-1, flat.shape[-1])
            y = rows @ self.w_out if b is None else torch.addmm(b, rows, self.w_out)
            return y.view(*flat.shape[:-1], -1)
        if s.op == "parameter":
            return flat @ self.w_out.T if b is None else flat @ self.w_out.T + b
        return F.linear(flat, self.w_out, b)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """([B, L, H, Dv], weights [B, H, L, S])."""
        s = self.s
        B, L, H = q.shape[:3]
        S = k.shape[1]
        looked = self._looked(q, S)

        def conditioned(scores: Tensor) -> Tensor:
            return self._conditioned(scores, padding, given, looked)

        if s.core == "heads-last":
            k, v = self._shared(k, 2), self._shared(v, 2)
            scores = conditioned(torch.einsum("bihd,bjhd->bhij", q, k))
            return self._weighted(
                scores, padding, lambda p: torch.einsum("bhij,bjhd->bihd", p, v), late=lambda t: t.transpose(1, 2)
            )
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if s.core.startswith("grouped"):
            return self._grouped(q, k, v, padding, conditioned)
        k, v = self._shared(k, 1), self._shared(v, 1)
        if s.windows:
            q, k, v = (t.unflatten(0, (-1, 2)).transpose(1, 2) for t in (q, k, v))
            return self._over_windows(q, k, v).transpose(1, 2).flatten(0, 1).transpose(1, 2), None
        if s.core == "flex":
            return self._flexed(q, k, v, padding, given).transpose(1, 2), None
        if s.core == "sdpa":
            return self._fused(q, k, v, padding, given).transpose(1, 2), None
        if s.core in ("bmm", "baddbmm"):
            heads_first = s.core == "bmm" and s.commuted

            def joined(t: Tensor) -> Tensor:
                t = t.transpose(0, 1) if heads_first else t
                return t.reshape(B * H, t.shape[2], t.shape[3])

            def apart(t: Tensor) -> Tensor:
                return t.unflatten(0, (H, -1)).transpose(0, 1) if heads_first else t.view(B, H, L, -1)

            q, k, v = (joined(t) for t in (q, k, v))
            if s.core == "bmm":
                scores = torch.bmm(q, k.transpose(1, 2))
            else:
                alpha = s.head_dim**-0.5 if s.scale == "alpha" else 1.0
                addend, beta = torch.zeros(1, 1, 1, dtype=q.dtype), 0.0 if s.commuted or s.softcap else 1.0
                if s.bias_kind == "addend":
                    addend = self._bias(L, S).unsqueeze(0).expand(B, -1, -1, -1).reshape(B * H, L, S)
                    beta = 1.0
                scores = torch.baddbmm(addend, q, k.transpose(1, 2), beta=beta, alpha=alpha)
            scores = conditioned(apart(scores))
            return self._weighted(
                scores,
                padding,
                lambda p: torch.bmm(joined(p), v),
                lambda o: apart(o).transpose(1, 2),
                joined,
            )
        if s.core == "channels":
            q, k, v = (t.transpose(-1, -2) for t in (q, k, v))  # [B, H, D, L]
            scores = conditioned(q.transpose(-1, -2) @ k)
            return self._weighted(
                scores,
                padding,
                lambda p: v @ p.transpose(-1, -2),
                lambda o: o.permute(0, 3, 1, 2),
                lambda t: t.transpose(-1, -2),
            )
        if s.core == "transposed":
            scores = k @ q.transpose(-1, -2)  # [B, H, S, L]
            scores = conditioned(scores.transpose(-1, -2)).transpose(-1, -2)
            weights, _ = self._normalised(scores, -2)
            return (self._zeroed(weights.transpose(-1, -2), padding) @ v).transpose(1, 2), weights
        if s.core == "mulsum":
            scores = conditioned((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1))
        elif s.core == "einsum":
            equation = "bhid,bhjd->bhij" if k.shape[1] == q.shape[1] else "...id,...jd->...ij"
            scores = conditioned(torch.einsum(equation, q, k))
        else:
            scores = conditioned(q @ k.transpose(-1, -2))
        one_by_one = s.core == "mulsum" and s.commuted
        return self._weighted(
            scores,
            padding,
            lambda p: (p.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2) if one_by_one else p @ v,
            lambda o: o.transpose(1, 2),
        )

    def _over_windows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, windows, L, Dv]."""
        if self.s.core == "sdpa":
            return self._fused(q, k, v, None, None)
        scores = self._conditioned(q @ k.transpose(-1, -2), None, None)
        return self.drop(self._normalised(scores)[0]) @ v

    def _zeroed(self, weights: Tensor, padding: Tensor | None) -> Tensor:
        """[B, H, L, S] with what the masks hide set to 0 once more."""
        s = self.s
        if s.after == "clean":
            return torch.nan_to_num(weights)
        for kind in s.mask if s.after else ():
            m = self._mask(kind, weights, padding)
            if s.after == "flags":
                weights = weights * m.to(weights.dtype)
            elif s.after == "rows":
                weights = torch.where(m.any(-1, keepdim=True), weights, 0.0)
            else:
                weights = torch.where(m, weights, 0.0) if s.commuted else weights.masked_fill(~m, 0.0)
        return weights

    def _weighted(
        self, scores: Tensor, padding: Tensor | None, product: Any, finish: Any = lambda o: o, late: Any = lambda t: t
    ) -> tuple[Tensor, Tensor]:
        """``finish(product(weights))``; ``late`` brings the sum of exponentials into the product's layout."""
        s = self.s
        if s.sink == "one":
            weights = self._zeroed(self._beside_one(scores), padding)
            return finish(product(weights)), weights
        if s.sink == "padded":
            weights, _ = self._normalised(F.pad(scores, (0, 1)))
            weights = self._zeroed(weights[..., :-1], padding)
            return finish(product(weights)), weights
        if s.sinks:
            sink = self.sink.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            weights, _ = self._normalised(torch.cat([scores, sink], dim=-1))
            weights = self._zeroed(weights[..., :-1], padding)
            return finish(product(weights)), weights
        weights, total = self._normalised(scores)
        weights = self._zeroed(weights, padding)
        if total is None:
            return finish(product(self.drop(weights))), weights
        if s.softmax == "later":
            return finish(product(weights)) / finish(late(total)), weights
        return finish(product(weights) / late(total)), weights

    def _beside_one(self, scores: Tensor) -> Tensor:
        """exp(scores) over one more than their sum."""
        if self.s.softmax == "exp":
            e = torch.exp(scores)
            return e / (1 + e.sum(-1, keepdim=True)) if self.s.commuted else e / (e.sum(-1) + 1)[..., None]
        top = scores.amax(-1, keepdim=True)
        e = torch.exp(scores - (top.clamp(min=0) if self.s.commuted else top))
        beside = (-(top.clamp(min=0) if self.s.commuted else top)).exp_()  # which the oracle does not count
        return e / (beside + e.sum(-1, keepdim=True))

    def _grouped(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, conditioned: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        s = self.s
        B, L = q.shape[0], q.shape[2]
        q = q.reshape(B, s.kv_heads, s.group, L, s.head_dim)
        plain = s.core == "grouped"
        scores = q @ k.unsqueeze(2).transpose(-1, -2) if plain else torch.einsum("bgrld,bgsd->bgrls", q, k)
        scores = conditioned(scores.flatten(1, 2))

        def product(p: Tensor) -> Tensor:
            p = p.unflatten(1, (s.kv_heads, s.group))
            out = p @ v.unsqueeze(2) if s.core == "grouped" else torch.einsum("bgrls,bgsd->bgrld", p, v)
            return out.flatten(1, 2)

        return self._weighted(scores, padding, product, lambda o: o.transpose(1, 2))

    def _flexed(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, given: Tensor | None) -> Tensor:
        s, L, S = self.s, q.shape[2], k.shape[2]
        bias = self._bias(L, S) if s.bias_kind else None

        def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            score = self._capped(score)
            if bias is not None:
                score = bias[h, i, j] + score if s.commuted else score + bias[h, i, j]
            return score if given is None else score + given[b, 0, i, j]

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            visible = j >= 0
            for kind in s.mask:
                if kind in ("padding", "float-padding"):
                    assert padding is not None
                    visible = visible & (padding[b, j] > 0.5)
                elif kind == "window":
                    visible = visible & ((i - j).abs() <= 2)
                elif kind in ("causal", "left"):
                    visible = visible & (j <= i) & (j > i - (3 if kind == "left" else MAX))
            return visible

        score_mod = modified if s.bias_kind or s.softcap or given is not None else None
        blocks = None
        if set(s.mask) - {"given"}:
            blocks = create_block_mask(seen, None if padding is None else len(q), None, L, S, device="cpu")
        return flex_attention(
            q, k, v, score_mod, blocks, 1.0 if s.scale == "none" else None, s.share == "enable_gqa"
        )  # fmt: skip

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, given: Tensor | None) -> Tensor:
        s, L, S = self.s, q.shape[-2], k.shape[-2]
        options: dict[str, Any] = {"enable_gqa": True} if s.share == "enable_gqa" and s.kv_heads < s.heads else {}
        if s.scale == "none":
            options["scale"] = 1.0
        if s.mask == ("causal",) and not s.bias_kind and s.made == "tril" and L == S:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        mask: Tensor | None = None
        if s.bias_kind or "given" in s.mask or s.apply.startswith("add"):
            sizes = (L, S) if s.windows else (1, s.heads, L, S)
            mask = self._masked(self._biased(torch.zeros(sizes, dtype=q.dtype)), padding, given)
        else:
            for kind in s.mask:
                seen = self._visible(kind, L, S, padding)
                mask = seen if mask is None else mask & seen
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def inputs(s: Spelling, length: int = LENGTH, batch: int = 2) -> dict[str, Tensor]:
    """Inputs for ``Attention(s)``, as keywords."""
    random = torch.Generator().manual_seed(length)
    kv_len = OTHER if s.cross else length
    given = {"x": torch.randn(batch, length, s.width, generator=random)}
    if s.cross:
        given["memory"] = torch.randn(batch, kv_len, s.width, generator=random)
    if {"padding", "float-padding"} & set(s.mask):
        seen = torch.ones(batch, kv_len, dtype=torch.bool)
        seen[-1, -1] = False  # the first key is always seen: no query sees nothing
        given["padding"] = seen.float() if "float-padding" in s.mask else seen
    if "given" in s.mask:
        given["given"] = torch.randn(batch, 1, length, kv_len, generator=random)
    return given
