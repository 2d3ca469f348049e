"""A decoder with rotary positions in few lines, and a runtime for its files: buffers for keys and values, and a loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, END = 50, 49


class Layer(nn.Module):
    """Rotary attention with fewer K/V heads, as decoders have it; ``mixes``: a convolution over tokens beside it."""

    def __init__(self, mixes: bool, dim: int = 8) -> None:
        super().__init__()
        width, self.dim = 4 * dim, dim
        self.q, self.kv, self.o = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 2) if mixes else None

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        h = self.norm(x)
        q = self.q(h).unflatten(-1, (4, self.dim)).transpose(1, 2)
        k, v = self.kv(h).unflatten(-1, (2, 2, self.dim)).permute(2, 0, 3, 1, 4)
        q, k = (_rotated(y, rotation) for y in (q, k))
        k, v = (y.repeat_interleave(2, 1) for y in self.stored(k, v))
        o = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(o.transpose(1, 2).flatten(2))
        if self.conv is not None:
            x = x + self.conv(functional.pad(x.mT, (1, 0))).mT
        return x

    def stored(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, 2, L, D] as they come out of a cache."""
        return k, v


class Decoder(nn.Module):
    """``pattern``: what its mask keeps beside padding.  ``dim``: features of a head."""

    def __init__(self, pattern: Any = "causal", mixes: bool = False, absolute: bool = False, dim: int = 8) -> None:
        super().__init__()
        self.pattern, self.absolute, self.dim = pattern, absolute, dim
        self.embed, self.head = nn.Embedding(VOCABULARY, 4 * dim), nn.Linear(4 * dim, VOCABULARY)
        self.layers = nn.ModuleList(Layer(mixes, dim) for _ in "ab")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        if self.absolute:
            position_ids = torch.arange(input_ids.shape[1])[None]
        half = self.dim // 2
        angle = position_ids[:, None, :, None] / 100.0 ** (torch.arange(half) / half)
        rotation = (torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin())
        length = input_ids.shape[1]
        mask = attention_mask.bool()[:, None, None, :]
        if self.pattern == "causal":
            mask = mask & torch.ones(length, length, dtype=torch.bool).tril()
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, rotation, mask)
        logits: Tensor = self.head(x)
        return logits


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    half = x.shape[-1] // 2
    return x * rotation[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * rotation[1]


def decoder(**options: Any) -> Decoder:
    """The same one each time, whose attention tells keys apart and whose texts do not end."""
    torch.manual_seed(0)
    model = Decoder(**options).eval()
    for parameter in model.parameters():
        parameter.data *= 2
    model.head.bias.data[END] = -100.0
    return model


def inputs(ids: Tensor) -> dict[str, Tensor]:
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


class Runtime:
    """A decoder's file in ONNX Runtime.  ``room``: tokens of a buffer that does not roll; ``spare``: those of one that does,
    beside its window.  ``shares``: past and present are one buffer."""

    def __init__(self, file: Path, batch: int, room: int, spare: int = 0, shares: bool = True) -> None:
        import onnxruntime

        self.session, self.shares = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]), shares
        self.cache: dict[str, Any] = {}
        for i in self.session.get_inputs():
            if len(i.shape) == 4:
                length = room
                if isinstance(i.shape[2], int):  # sinks
                    length = i.shape[2]
                elif i.shape[2].startswith("window_"):
                    length = int(i.shape[2].removeprefix("window_")) + spare
                element = np.int8 if i.type == "tensor(int8)" else np.float32
                self.cache[i.name] = _ort(np.zeros((batch, i.shape[1], length, i.shape[3]), element))
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def __call__(self, ids: Tensor, new: Tensor | None = None) -> Tensor:
        """The logits of the next tokens [B, L], of which each sequence has ``new``; the others are padding."""
        positions = self.lengths[:, None] + torch.arange(ids.shape[1])
        self.lengths = self.lengths + (ids.shape[1] if new is None else new)
        seen = (torch.arange(int(self.lengths.max())) < self.lengths[:, None]).long()
        given = {"input_ids": ids, "attention_mask": seen, "position_ids": positions}
        feed = {name: _ort(x.numpy()) for name, x in given.items()} | self.cache
        if not self.shares:
            made = self.session.run_with_ort_values(None, feed)
            for o, x in zip(self.session.get_outputs()[1:], made[1:], strict=True):
                self.cache[o.name.replace("present", "past_key_values")] = x
            return torch.from_numpy(made[0].numpy())
        binding = self.session.io_binding()
        for name, x in feed.items():
            binding.bind_ortvalue_input(name, x)
        for name, x in self.cache.items():
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), x)
        binding.bind_output(self.session.get_outputs()[0].name)
        self.session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[-1].numpy())

    def put(self, row: int, other: Runtime) -> None:
        """The only sequence of ``other`` in the place of one of these."""
        for name, x in self.cache.items():
            both = x.numpy().copy()
            both[row] = other.cache[name].numpy()[0]
            self.cache[name] = _ort(both)
        self.lengths[row] = other.lengths[0]

    def in_parts(self, ids: Tensor, parts: Sequence[int]) -> Tensor:
        """[B, L, vocabulary]: those of all tokens, given so many at a time."""
        return torch.cat([self(piece) for piece in ids.split(list(parts), 1)], 1)


def _ort(array: np.ndarray[Any, Any]) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
