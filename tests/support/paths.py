"""Residual streams, what their paths add by hooks, and readouts by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hooked_models
import observed
import torch
from observed import WIDTH, D, H
from torch import Tensor, nn


def with_readout(model: Any, norm: nn.Module, x: Tensor, batch: Mapping[str, Any]) -> Any:
    """The model's output with ``x`` in the place of what its final norm reads."""
    with torch.no_grad(), hooked_models.hooked({norm: lambda _: x}, {}):
        return model(**batch)


def shares_of(model: Any, batch: Mapping[str, Any], parts: Mapping[str, str], start: str) -> dict[str, Tensor]:
    """By path what it adds: the output of a module, and what the module ``start`` reads."""
    inputs, outputs, _ = observed.hooked(model, batch)
    return {"embedding": inputs[start], **{path: outputs[module] for path, module in parts.items()}}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out: Tensor = self.o(((q @ k.mT / D**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """``parallel``: attention and MLP read the same, and are added together."""

    def __init__(self, parallel: bool = False) -> None:
        super().__init__()
        self.parallel, self.attn, self.norm = parallel, Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.parallel:
            return x + (self.attn(h) + self.mlp(h))
        x = x + self.attn(h)
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """No final norm: what is read is linear in the gains."""

    def __init__(self, parallel: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5, bias=False)
        self.layers = nn.ModuleList(Layer(parallel) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def shares_of_stack(model: Stack, x: Tensor) -> dict[str, Tensor]:
    _, outputs, _ = observed.hooked(model, {"x": x})
    paths = [f"layers.{i}.{part}" for i in range(len(model.layers)) for part in ("attn", "mlp")]
    return {"embedding": outputs["first"], **{path: outputs[path] for path in paths}}


class Plain(nn.Module):
    """One attention without a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)
