"""What is told of the heads of trained models, against what it costs to do without them.

Retrieval heads of SmolLM2 and copying; the locality of heads of a ViT and the loss of a local window; unique codes and
leave-one-out ablation; direct shares of paths of a ViT.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import one_thread, picture, publish
from smollm2 import CITIES, Logits, news, tokenizer, trained
from torch import Tensor

import attnopt
from attnopt.passes import PruneHeads, Sparse
from attnopt.patterns import Neighborhood, PerHead, Prefix
from attnopt.statistics import Ships, UniqueCodes, needle_task

ANSWER = 4  # words of an answer
REMOVED = 0.05  # of all heads
SEEDS = 3
GRID, KERNEL = (7, 7), (3, 3)  # of the ViT's patches, and of a local window
Heads = dict[str, list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, default=192, help="of a text with a needle")
    parser.add_argument("--tasks", type=int, default=24, help="texts, half to score heads and half to test")
    parser.add_argument("--examples", type=int, default=8, help="of the task for unique codes, as many without it")
    parser.add_argument("--images", type=int, default=2000)
    arguments = parser.parse_args()
    one_thread()
    for name in arguments.only:
        CASES[name](arguments)


# ---------------------------------------------------------------- SmolLM2
@dataclass(frozen=True)
class Task:
    """News with a sentence in it, whose beginning the end repeats.  ``needle``: the span of the words to be copied."""

    prompt: list[int]
    needle: tuple[int, int]
    answer: list[int]
    without: list[int]  # the prompt with more news in the place of the sentence


@cache
def smollm2() -> Any:
    return trained()


def tasks(count: int, tokens: int) -> list[Task]:
    """Every answer is a row of words from the news, which nobody could guess; its depth in the text varies."""
    chosen, ids = random.Random(0), news().tolist()
    words = sorted(
        {i for i in ids if (text := tokenizer().decode([i])).startswith(" ") and text[1:].isalpha() and len(text) > 4}
    )
    made: list[Task] = []
    for n in range(count):
        question = tokenizer()(f" The secret phrase of {CITIES[n % len(CITIES)]} is").input_ids
        answer = chosen.sample(words, ANSWER)
        sentence = [*question, *answer, *tokenizer()(".").input_ids]
        filler = tokens - len(sentence) - len(question) - ANSWER
        start = chosen.randrange(len(ids) // 2)  # the other half tests the model on news
        depth = int((0.05 + 0.9 * (n % 10) / 9) * filler)
        text = ids[start : start + filler]
        more = ids[start + filler : start + filler + len(sentence)]
        first = depth + len(question)
        made.append(
            Task(
                [*text[:depth], *sentence, *text[depth:], *question],
                (first, first + ANSWER),
                answer,
                [*text[:depth], *more, *text[depth:], *question],
            )
        )
    return made


def copied(model: Callable[[Tensor], Tensor], given: Sequence[Task]) -> list[tuple[bool, float]]:
    """Of each task whether greedy decoding gives the answer, and the mean log-probability of its tokens."""
    found: list[tuple[bool, float]] = []
    for task in given:
        ids = torch.tensor([[*task.prompt, *task.answer]])
        with torch.no_grad():
            logits = model(ids)[0, len(task.prompt) - 1 : -1].double()
        answer = torch.tensor(task.answer)
        likely = logits.log_softmax(-1).gather(1, answer[:, None])
        found.append((bool((logits.argmax(-1) == answer).all()), float(likely.mean())))
    return found


def read_news(model: Callable[[Tensor], Tensor], tokens: int, texts: int = 6) -> float:
    """The mean log-probability of the words of news."""
    ids = news()[-texts * tokens :].reshape(texts, 1, tokens)
    with torch.no_grad():
        logits = [model(x)[0, :-1].double().log_softmax(-1) for x in ids]
    each = [p.gather(1, x[0, 1:, None]).mean() for p, x in zip(logits, ids, strict=True)]
    return float(torch.stack(each).mean())


def retrieval(arguments: argparse.Namespace) -> None:
    model = Logits(smollm2()).eval()
    every = tasks(arguments.tasks, arguments.tokens)
    solved = [task for task, (is_right, _) in zip(every, copied(model, every), strict=True) if is_right]
    known, tested = solved[::2], solved[1::2]
    task = needle_task([t.prompt for t in known], [t.needle for t in known], [t.answer for t in known])
    scores = attnopt.head_importance(model, *task)
    ranked = sorted(((s, h) for s, own in scores.items() for h in range(len(own))), key=lambda x: -scores[x[0]][x[1]])
    count = round(REMOVED * len(ranked))
    top = ranked[:count]
    rows = []
    for name, heads in _removed(ranked, count):
        fast = model if not heads else _without(model, heads, arguments.tokens)
        answers = copied(fast, tested)
        rows.append(
            {
                "heads removed": name,
                "count": len(heads),
                "retrieval score": sum(scores[s][h] for s, h in heads) / max(1, len(heads)),
                "copied": sum(is_right for is_right, _ in answers) / len(answers),
                "log p of the answer": sum(p for _, p in answers) / len(answers),
                "log p of news": read_news(fast, arguments.tokens),
            }
        )
        print(rows[-1], flush=True)
    title = (
        f"Heads removed from SmolLM2-135M: copying a needle in {arguments.tokens} tokens of news. The dense model copies "
        f"{len(solved)} of {len(every)}; heads are scored on {len(known)} of these and tested on {len(tested)}"
    )
    publish("heads_retrieval", rows, title, 3)
    print("the highest scores:", [(s, h, round(scores[s][h], 2)) for s, h in top])
    numbers = sorted((x for own in scores.values() for x in own), reverse=True)
    picture("heads_retrieval", partial(_draw_retrieval, numbers=numbers, rows=rows), 2)


def _removed(ranked: Sequence[tuple[str, int]], count: int) -> Iterator[tuple[str, Sequence[tuple[str, int]]]]:
    yield "none", []
    yield f"top {REMOVED:.0%} by retrieval", ranked[:count]
    for seed in range(SEEDS):
        yield f"random others, seed {seed}", random.Random(seed).sample(ranked[count:], count)
    yield "lowest by retrieval", random.Random(SEEDS).sample(ranked[len(ranked) // 2 :], count)  # there are many of 0


def _without(model: torch.nn.Module, heads: Sequence[tuple[str, int]], tokens: int) -> Any:
    by_site: Heads = {}
    for site, h in heads:
        by_site.setdefault(site, []).append(h)
    policy = {site: PruneHeads(heads=own, whole_layers=True) for site, own in by_site.items()}
    return attnopt.optimize(model, policy, (torch.zeros(1, tokens, dtype=torch.long),))


def _draw_retrieval(_: Any, axes: Any, numbers: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> None:
    axes[0].plot(range(1, len(numbers) + 1), numbers, drawstyle="steps-mid")
    axes[0].set(xlabel="head, by rank", ylabel="retrieval score", xscale="log")
    names = [row["heads removed"] for row in rows]
    axes[1].barh(names[::-1], [row["copied"] for row in rows][::-1])
    axes[1].set(xlabel="share of needles copied", xlim=(0, 1))


# ---------------------------------------------------------------- the ViT
def locality(arguments: argparse.Namespace) -> None:
    from scipy.stats import spearmanr
    from subjects.vit import ViT

    subject = ViT()
    model, batches = subject.model(), [x for (x,) in subject.calibration(0)]
    images, labels = subject.test_images[: arguments.images], subject.test_labels[: arguments.images]
    reach = attnopt.head_importance(model, batches, f"distance(grid={GRID}, prefix=1)")
    example = (images[:100],)
    dense = _answers(model, images)
    rows = []
    for site, own in reach.items():
        for h, distance in enumerate(own):
            window = Prefix(1, Neighborhood(GRID, KERNEL))
            fast = attnopt.optimize(model, {site: Sparse(PerHead({h: window}))}, example)
            found = _answers(fast, images)
            rows.append(
                {
                    "site": site,
                    "head": h,
                    "distance": distance,
                    "loss": _loss(found, labels) - _loss(dense, labels),
                    "divergence": float((dense.exp() * (dense - found)).sum(-1).mean()),
                    "accuracy": float((found.argmax(-1) == labels).double().mean()),
                }
            )
    # Of the last layer the class token alone is read, which sees everything: a window there changes nothing.
    moved = [row for row in rows if row["divergence"] > 1e-12]
    rho = {
        name: spearmanr([row["distance"] for row in moved], [row[name] for row in moved])
        for name in ("loss", "divergence")
    }
    told = "; ".join(f"{name}: {x.statistic:+.2f} (p = {x.pvalue:.2g})" for name, x in rho.items())
    accuracy = float((dense.argmax(-1) == labels).double().mean())
    publish(
        "heads_locality",
        rows,
        f"One head of a Fashion-MNIST ViT with a {KERNEL[0]} x {KERNEL[1]} window, on {len(images)} images (accuracy of the "
        f"model {accuracy:.3f}). Spearman's rank correlation with the mean distance, of the {len(moved)} heads whose window "
        f"changes anything: {told}",
        5,
    )
    picture("heads_locality", lambda _, axes: _draw_locality(axes, moved))


def _answers(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Log-probabilities, [N, classes]."""
    with torch.no_grad():
        return torch.cat([model(x).double().log_softmax(-1) for x in images.split(100)])


def _loss(answers: Tensor, labels: Tensor) -> float:
    return float(torch.nn.functional.nll_loss(answers, labels))


def _draw_locality(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for site in dict.fromkeys(row["site"] for row in rows):
        own = [row for row in rows if row["site"] == site]
        axes.scatter([row["distance"] for row in own], [row["divergence"] for row in own], label=site)
    axes.set(xlabel="mean distance, patches", ylabel="divergence with a window", yscale="log")
    axes.legend(frameon=False, fontsize=7)


def paths(arguments: argparse.Namespace) -> None:
    """Direct shares in the readout: each cut alone, then the weakest ones together, with and without a fit of the others."""
    from subjects.vit import ViT

    subject = ViT()
    model, images, labels = (
        subject.model(),
        subject.test_images[: arguments.images],
        subject.test_labels[: arguments.images],
    )
    seen = subject.images[-10_000:][: arguments.images]  # which training has not seen
    known = subject.labels[-10_000:][: arguments.images]
    batches = list(seen.split(100))
    wanted = list(torch.nn.functional.one_hot(known, 10).double().split(100))
    likely = partial(torch.softmax, dim=-1)

    def told(gains: Mapping[str, Any]) -> dict[str, float]:
        answers = _answers(attnopt.path_gain(model, gains, (images[:100],)), images)
        return {"loss": _loss(answers, labels), "accuracy": float((answers.argmax(-1) == labels).double().mean())}

    fitted = attnopt.fit_path_gains(model, batches, wanted, read=likely)
    rows: list[dict[str, Any]] = [
        {"paths": "all", "gains": "1", **told({})},
        {"paths": "all", "gains": "fitted", **told(fitted)},
    ]
    alone = {path: told({path: 0}) for path in fitted}
    rows += [
        {"paths": f"without {path}", "gains": f"1 (fitted alone: {fitted[path]:.2f})", **x} for path, x in alone.items()
    ]
    weakest = sorted(alone, key=lambda path: alone[path]["loss"])
    for count in range(2, len(weakest)):
        cut: dict[str, float] = dict.fromkeys(weakest[:count], 0.0)
        rows.append({"paths": f"without {count} of {len(weakest)}", "gains": "1", **told(cut)})
        again = attnopt.fit_path_gains(model, batches, wanted, read=likely, fixed=cut)
        rows.append({"paths": f"without {count} of {len(weakest)}", "gains": "fitted", **told(again)})
    publish(
        "heads_paths",
        rows,
        f"Direct shares of paths of a Fashion-MNIST ViT cut from its readout, on {len(images)} images; gains by least squares "
        f"of probabilities on {len(seen)} others",
        4,
    )
    picture("heads_paths", lambda _, axes: _draw_paths(axes, rows, len(weakest)))


def _draw_paths(axes: Any, rows: Sequence[Mapping[str, Any]], count: int) -> None:
    for gains in ("1", "fitted"):
        own = [row for row in rows if row["gains"] == gains]
        cut = [0 if row["paths"] == "all" else int(row["paths"].split()[1]) for row in own]
        axes.plot(cut, [row["accuracy"] for row in own], marker="o", label=f"gains of the others: {gains}")
    axes.set(xlabel=f"paths of {count} without a direct share", ylabel="accuracy", ylim=(0, 1))
    axes.legend(frameon=False)


# ---------------------------------------------------------------- unique codes
def codes(arguments: argparse.Namespace) -> None:
    """Against what the last token's answer loses when the head is ablated."""
    rows = [_of_planted(), _of_smollm2(arguments)]
    publish("heads_codes", rows, "Unique codes against leave-one-out ablation: which heads a task needs", 2)


def _of_planted() -> dict[str, Any]:
    """The circuit that the tests plant: one head copies what followed the same token before."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
    from attention_only import INDUCTION_HEAD, PREVIOUS_HEAD, induction_circuit

    generator = torch.Generator().manual_seed(0)
    half = torch.stack([torch.randperm(10, generator=generator)[:6] for _ in range(8)])
    task = torch.cat([half, half[:, :1]], 1)  # the first token again: the second one follows
    other = torch.stack([torch.randperm(10, generator=generator)[:7] for _ in range(8)])  # no token twice
    found = _compared(induction_circuit(), [task], [other], 2)
    planted = {("layers.0", PREVIOUS_HEAD[1]), ("layers.1", INDUCTION_HEAD[1])}
    return {"model": "planted induction circuit", **found, "planted": ", ".join(f"{s} {h}" for s, h in sorted(planted))}


def _of_smollm2(arguments: argparse.Namespace) -> dict[str, Any]:
    model = Logits(smollm2()).eval()
    every = tasks(arguments.tasks, arguments.tokens)
    solved = [task for task, (is_right, _) in zip(every, copied(model, every), strict=True) if is_right]
    chosen = solved[: arguments.examples]
    task, other = (
        [torch.tensor([ids]) for ids in of] for of in ([t.prompt for t in chosen], [t.without for t in chosen])
    )
    heads = sum(len(own) for own in attnopt.head_importance(model, task[:1], "weights").values())
    return {"model": "SmolLM2-135M, needles", **_compared(model, task, other, round(REMOVED * heads)), "planted": "-"}


def _compared(model: torch.nn.Module, task: list[Tensor], other: list[Tensor], k: int) -> dict[str, Any]:
    from scipy.stats import spearmanr

    unique = attnopt.head_importance(model, task, UniqueCodes(other))
    needed = attnopt.head_importance(model, task, Ships("zero"))
    each = [(s, h) for s, own in unique.items() for h in range(len(own))]
    a, b = ([scores[s][h] for s, h in each] for scores in (unique, needed))
    top = {each[i] for i in sorted(range(len(each)), key=lambda i: -b[i])[:k]}
    found = {each[i] for i in sorted(range(len(each)), key=lambda i: -a[i])[:k]}
    rho = spearmanr(a, b)
    return {
        "examples": sum(len(x) for x in task),
        "heads": len(each),
        "rank correlation": float(rho.statistic),
        "p": float(rho.pvalue),
        "k": k,
        "precision at k": len(top & found) / k,
        "by chance": k / len(each),
        "needed most": ", ".join(f"{s} {h}" for s, h in sorted(top)[:3]),
    }


CASES: dict[str, Callable[[argparse.Namespace], None]] = {
    "retrieval": retrieval,
    "locality": locality,
    "paths": paths,
    "codes": codes,
}

if __name__ == "__main__":
    main()
