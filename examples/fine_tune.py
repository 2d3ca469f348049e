"""A sentence encoder with a quarter of its heads, distilled from the full one in a few hundred steps, without labels.

An optimized model trains like any ``nn.Module``.  ``python examples/fine_tune.py`` prunes MiniLM to three of
twelve heads per layer, distils it on news sentences, and compares both with the original on unseen film reviews.
It needs the packages of the demo (``make demo``), and writes ``build/fine_tune.png``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor, nn

import attnopt
from attnopt.cli import demo_data as similarity
from attnopt.passes import PruneHeads

Batch = tuple[Tensor, ...]
Loss = Callable[[Tensor, Tensor], Tensor]
STEPS, RATE = 150, 1e-4
REVIEWS = 48


def distil(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Batch], steps: int, rate: float, loss: Loss
) -> Iterator[float]:
    """One AdamW step per yielded number, the distance of ``student`` from ``teacher`` on the next batch.  Shared weights
    would change in both, so copy them in one of the two."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for batch in islice(cycle(batches), steps):
        with torch.no_grad():
            want = teacher(*batch)
        found = loss(student(*batch), want)
        optimizer.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        yield float(found.detach())


def one_minus_cosine(got: Tensor, want: Tensor) -> Tensor:
    return 1 - nn.functional.cosine_similarity(got, want, dim=-1).mean()


def main() -> None:
    torch.manual_seed(0)
    teacher, tokenizer = similarity.load_encoder()
    data = similarity.load_data()
    sentences = [s.strip() + "." for text in data.background for s in text.split(". ") if len(s) > 30]
    random.Random(0).shuffle(sentences)
    batches = [similarity.tokens(tokenizer, sentences[i : i + 16]) for i in range(0, len(sentences), 16)]
    reviews = [similarity.tokens(tokenizer, texts) for texts in _in_turn(_reviews(), 8)]
    with torch.no_grad():
        dense = [teacher(*batch) for batch in reviews]

    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = {"input_ids": axes, "attention_mask": dict(axes)}
    original, _ = similarity.load_encoder()  # the student shares unchanged weights, and will be trained
    calibration = batches[:16]
    student = attnopt.optimize(
        original, PruneHeads(fraction=0.75), calibration[0], dynamic_shapes=shapes, calibration=calibration
    )
    print(f"{sum(site.num_heads for site in student.sites)} of {6 * 12} heads remain")

    def agreement() -> float:
        with torch.no_grad():
            away = [one_minus_cosine(student(*batch), want) for batch, want in zip(reviews, dense, strict=True)]
        return 1 - float(torch.stack(away).mean())

    print(f"cosine to the original on film reviews before: {agreement():.4f}", flush=True)
    losses = []
    for step, loss in enumerate(distil(student, teacher, batches, STEPS, RATE, one_minus_cosine), 1):
        losses.append(loss)
        if step % 25 == 0:
            print(f"step {step}: loss {sum(losses[-25:]) / 25:.4f}", flush=True)
    print(f"cosine to the original on film reviews after: {agreement():.4f}")
    _draw(losses, Path("build") / "fine_tune.png")


def _in_turn(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Batches of texts with similar length."""
    ordered = sorted(texts, key=len)
    return (ordered[i : i + size] for i in range(0, len(ordered), size))


def _reviews() -> list[str]:
    file = similarity._folder("gensim") / "test" / "test_data" / "pang_lee_polarity.cor"
    lines = [line for line in file.read_text("latin-1").splitlines() if " " in line]
    return [line.split(" ", 1)[1] for line in lines[:: len(lines) // REVIEWS]]


def _draw(losses: Sequence[float], path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, color="0.8", label="each step")
    means = [sum(losses[max(0, i - 19) : i + 1]) / (i + 1 - max(0, i - 19)) for i in range(len(losses))]
    axes.plot(range(1, len(losses) + 1), means, color="#1f6feb", label="mean of 20 steps")
    axes.set(xlabel="step", ylabel="1 - cosine to the whole model", title="MiniLM with 3 of 12 heads", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
