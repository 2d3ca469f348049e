"""A small stack of attentions with calibration data."""

from __future__ import annotations

import tiny_models
import torch
from torch import Tensor, nn


def stack(layers: int = 2, causal: bool = True, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_models.Stack(causal)
    model.layers = nn.ModuleList(tiny_models.Attention(width, 4, causal) for _ in range(layers))
    for p in model.parameters():
        p.data *= 2.0
    return model.eval()


def batches(count: int = 4, batch: int = 8, length: int = 12, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, 16, generator=generator) for _ in range(count)]


def head_inputs(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    """Inputs of every output projection, by hooks: [tokens, H * D]."""
    seen: dict[int, list[Tensor]] = {}
    handles = [
        layer.o.register_forward_pre_hook(lambda _, a, i=i: seen.setdefault(i, []).append(a[0].flatten(0, -2)))
        for i, layer in enumerate(model.layers)
    ]
    with torch.no_grad():
        for x in data:
            model(x)
    for handle in handles:
        handle.remove()
    return [torch.cat(seen[i]) for i in range(len(model.layers))]


class Twice(nn.Module):
    """One attention, called twice with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stack(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(self.inner(x))
        return out
