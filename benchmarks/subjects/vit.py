"""A small vision transformer, trained here on Fashion-MNIST; its accuracy on the test images over the heads kept."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from subjects import Rewrite, pruned

FOLDER = Path("/usr/share/datasets/fashion-mnist")
TRAINED = Path("build") / "vit.safetensors"
WIDTH, HEADS, LAYERS, PATCH = 64, 4, 4, 4
STEPS, BATCH = 2200, 128
CALIBRATED = 200  # images, which training has not seen


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * (WIDTH // HEADS) ** -0.5).softmax(-1)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        changed: Tensor = x + self.mlp(self.norm2(x))
        return changed


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tokens = (28 // PATCH) ** 2 + 1
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.first = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Parameter(torch.randn(1, tokens, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


class ViT:
    name = "vit"
    title = "A vision transformer on Fashion-MNIST with fewer heads, without training"
    drawn = "accuracy"

    def __init__(self) -> None:
        self.images, self.labels = _read("train")
        self.test_images, self.test_labels = _read("t10k")
        self._model = Classifier()
        if TRAINED.is_file():
            self._model.load_state_dict(load_file(TRAINED))
        else:
            _train(self._model, self.images[:-10_000], self.labels[:-10_000])
            TRAINED.parent.mkdir(exist_ok=True)
            save_file(self._model.state_dict(), TRAINED)
        self._model.eval()

    def model(self) -> nn.Module:
        return self._model

    def dynamic_shapes(self) -> Any:
        return {"images": {0: torch.export.Dim.DYNAMIC}}

    def calibration(self, seed: int, count: int = CALIBRATED) -> Sequence[tuple[Tensor, ...]]:
        kept = self.images[-10_000:]
        chosen = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:count]
        return [(part,) for part in kept[chosen].split(50)]

    def rewrites(self) -> Iterator[Rewrite]:
        for kept in (3, 2, 1):
            yield from pruned(f"{kept} of 4 heads", 1 - kept / HEADS, HEADS)

    def figures(self, model: nn.Module) -> Mapping[str, float]:
        with torch.no_grad():
            found = torch.cat([model(part).argmax(-1) for part in self.test_images.split(1000)])
        return {"accuracy": float((found == self.test_labels).double().mean())}


def _read(part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] of mean 0 and variance 1, and labels [N]."""
    pixels = gzip.decompress((FOLDER / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FOLDER / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    images = torch.from_numpy(np.frombuffer(pixels, np.uint8, offset=16).copy()).reshape(-1, 1, 28, 28) / 255
    return (images - 0.286) / 0.353, torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).copy()).long()


def _train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    model.train()
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,))
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
