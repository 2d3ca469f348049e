"""Attentions replaced by mixers in a trained ViT, in the order of its layers, beside windows in the same layers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from common import one_thread, publish
from subjects.vit import HEADS, ViT
from torch import Tensor, nn

import attnopt
from attnopt.passes import Replace, Sparse
from attnopt.patterns import Neighborhood, Prefix

GRID = (7, 7)  # of the patches, behind a class token
MIXERS = (
    "conv(kernel=3, grid=(7, 7), prefix=1)",
    "conv(kernel=5, grid=(7, 7), prefix=1)",
    "pool(size=3, grid=(7, 7), prefix=1)",
    "fft(grid=(7, 7), prefix=1)",
    "linear-attention(features=8)",
)
WINDOWS = (3, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="of the test set")
    parser.add_argument("--calibration", type=int, default=1000, help="images that training has not seen")
    parser.add_argument(
        "--steps", type=int, default=200, help="of distillation, of the whole model with all layers replaced"
    )
    arguments = parser.parse_args()
    one_thread()
    subject = ViT()
    model, kept = subject.model(), subject.images[-10_000:][: arguments.calibration]
    data, test = list(kept.split(100)), subject.test_images[: arguments.images]
    labels = subject.test_labels[: arguments.images]
    sites = [site.name for site in attnopt.inspect(model, (data[0],)).sites]
    dense = _answers(model, test)
    rows: list[dict[str, Any]] = [{"in the place": "-", "layers": 0, "R^2": "-", **_figures(dense, dense, labels)}]
    for name, policy in _policies():
        for count in range(1, len(sites) + 1):
            chosen = dict.fromkeys(sites[:count], policy)
            fast = attnopt.optimize(
                model, chosen, (data[0],), calibration=data, dynamic_shapes={"images": {0: torch.export.Dim.DYNAMIC}}
            )
            told = [_r2(site.notes) for site in fast.report.sites[:count]]
            rows.append(
                {
                    "in the place": name,
                    "layers": count,
                    "R^2": " ".join(told),
                    **_figures(_answers(fast, test), dense, labels),
                }
            )
            print(rows[-1], flush=True)
        if isinstance(policy, Replace) and arguments.steps:
            attnopt.distill(fast, model, data, arguments.steps)
            rows.append(
                {
                    "in the place": f"{name}, distilled",
                    "layers": count,
                    "R^2": "",
                    **_figures(_answers(fast, test), dense, labels),
                }
            )
            print(rows[-1], flush=True)
    publish(
        "mixers",
        rows,
        f"Attentions of a Fashion-MNIST ViT ({len(sites)} layers of {HEADS} heads, the first layers first) replaced by mixers or "
        f"restricted to windows of the 7 x 7 patches, without training: fitted to {len(kept)} images, judged on {len(test)} "
        "others. R^2 of each layer, on images that are held back from the fit. Distilled: the new weights alone, trained on the "
        f"outputs of the model for {arguments.steps} steps of 100 images",
        3,
    )


def _policies() -> Iterator[tuple[str, Any]]:
    for mixer in MIXERS:
        yield mixer, Replace(mixer)
    for kernel in WINDOWS:
        yield f"window {kernel} x {kernel}", Sparse(Prefix(1, Neighborhood(GRID, kernel)))


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    """Log-probabilities, [N, classes]."""
    with torch.no_grad():
        return torch.cat([model(x).double().log_softmax(-1) for x in images.split(500)])


def _figures(found: Tensor, dense: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "accuracy": float((found.argmax(-1) == labels).double().mean()),
        "same answer": float((found.argmax(-1) == dense.argmax(-1)).double().mean()),
        "divergence": float((dense.exp() * (dense - found)).sum(-1).mean()),
    }


def _r2(notes: tuple[str, ...]) -> str:
    found = [note.partition("(R^2 ")[2][:6] for note in notes if "(R^2 " in note]
    return f"{float(found[0]):.2f}" if found else "-"


if __name__ == "__main__":
    main()
