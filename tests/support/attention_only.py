"""Attention-only models whose circuits are known, because their weights are written by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

V, P, D, H = 10, 24, 24, 4  # tokens, positions, head size, heads
TOKEN, PLACE, PREVIOUS, COPY = slice(0, V), slice(V, V + P), slice(V + P, 2 * V + P), slice(2 * V + P, 3 * V + P)
E = 3 * V + P
SHARP = 60.0  # of the scores that choose one key
PREVIOUS_HEAD, INDUCTION_HEAD = (0, 2), (1, 1)  # layer and head

Replaced = Callable[[int, Tensor, Tensor], Tensor]  # layer, weights [B, H, L, S], outputs [B, H, L, D] -> other outputs


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, H * D, bias=False) for _ in range(3))
        self.o = nn.Linear(H * D, E, bias=False)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if seen is not None:
            visible = visible & seen[:, None, None]
        scores = (q @ k.mT).masked_fill(~visible, torch.finfo(q.dtype).min)
        out: Tensor = self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + out

    def set(self, head: int, role: str, block: Tensor, features: slice) -> None:
        """Head ``head`` reads, or writes for "o", ``features`` of the residual by ``block``."""
        rows = slice(head * D, head * D + (block.shape[1] if role == "o" else block.shape[0]))
        weight = getattr(self, role).weight.data
        if role == "o":
            weight[features, rows] = block
        else:
            weight[rows, features] = block


class Circuit(nn.Module):
    """Tokens and positions as one-hot features; logits are what was copied."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, E), nn.Embedding(P, E)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(E, V, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.zero_()
            self.tokens.weight[:, TOKEN] = torch.eye(V)
            self.places.weight[:, PLACE] = torch.eye(P)
            self.head.weight[:, COPY] = 8.0 * torch.eye(V)
        self.requires_grad_(False)

    def forward(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x, seen)
        found: Tensor = self.head(x)
        return found


def induction_circuit() -> Circuit:
    """A previous-token head in layer 0 writes what came before each token; an induction head in layer 1 looks for the own
    token there, and copies.  All other heads attend to all keys alike, and write nothing, except for heads 0 that write a
    little of the own token."""
    model = Circuit()
    layer, head = PREVIOUS_HEAD
    back = torch.zeros(P, P)
    back[torch.arange(P - 1), torch.arange(1, P)] = SHARP  # the query of place i is that of place i - 1
    model.layers[layer].set(head, "q", back, PLACE)
    model.layers[layer].set(head, "k", torch.eye(P), PLACE)
    model.layers[layer].set(head, "v", torch.eye(V), TOKEN)
    model.layers[layer].set(head, "o", torch.eye(V), PREVIOUS)
    layer, head = INDUCTION_HEAD
    model.layers[layer].set(head, "q", SHARP * torch.eye(V), TOKEN)
    model.layers[layer].set(head, "k", torch.eye(V), PREVIOUS)
    model.layers[layer].set(head, "v", torch.eye(V), TOKEN)
    model.layers[layer].set(head, "o", torch.eye(V), COPY)
    for other in model.layers:
        other.set(0, "v", torch.eye(V), TOKEN)
        other.set(0, "o", 1e-3 * torch.eye(V), COPY)
    return model.eval()


def random_circuit(layers: int = 2, seed: int = 0) -> Circuit:
    """Random weights: nothing is known but what plain operations give."""
    model, g = Circuit(layers), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * 0.35)
    return model.eval()


def eager(
    model: Circuit, ids: Tensor, seen: Tensor | None = None, replaced: Replaced | None = None
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Logits, weights [B, H, L, S] and head outputs [B, H, L, D] of each layer, and the last hidden state, in float64."""
    L = ids.shape[1]
    weights, outputs = [], []
    x = (model.tokens.weight[ids] + model.places.weight[:L]).double()
    visible = torch.ones(L, L, dtype=torch.bool).tril().expand(len(ids), 1, L, L)
    if seen is not None:
        visible = visible & seen[:, None, None]
    for n, layer in enumerate(model.layers):
        q, k, v = (
            (x @ f.weight.double().T).reshape(*ids.shape, H, D).permute(0, 2, 1, 3) for f in (layer.q, layer.k, layer.v)
        )
        s = torch.einsum("bhid,bhjd->bhij", q, k)
        p = torch.where(visible, s, -1e30).softmax(-1) * visible
        z = torch.einsum("bhij,bhjd->bhid", p, v)
        if replaced is not None:
            z = replaced(n, p, z)
        weights.append(p)
        outputs.append(z)
        x = x + torch.einsum("bhid,ehd->bie", z, layer.o.weight.double().reshape(E, H, D))
    return x @ model.head.weight.double().T, weights, outputs, x
