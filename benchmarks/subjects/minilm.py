"""MiniLM, a sentence encoder: calibrated on sentences of news, tested on film reviews, which are another domain.

Its figures are the agreement with its own dense outputs, and tasks that people judged.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import package

from attnopt.cli import demo_data as similarity
from subjects import Rewrite, grouped, pruned_in_every_way

TOKENS = 10_000
NOUNS = 500  # whose glosses are to be found by the nouns
WORDNET = Path("/usr/share/wordnet/data.noun")

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Vectors = np.ndarray[Any, Any]


class MiniLM:
    name = "minilm"
    title = "Fewer heads without training: MiniLM against its own dense outputs, and on tasks"
    drawn = "cosine"

    def __init__(self) -> None:
        self._model, self.tokenizer = similarity.load_encoder()
        self.data = similarity.load_data()

    def model(self) -> torch.nn.Module:
        return self._model

    def dynamic_shapes(self) -> Any:
        axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        return {"input_ids": dict(axes), "attention_mask": dict(axes)}

    def calibration(self, seed: int) -> Batches:
        """Sentences in random order until there are enough tokens."""
        chosen, count = [], 0
        news = _sentences(self.data.background)
        for text in random.Random(seed).sample(news, len(news)):
            chosen.append(text)
            count += len(self.tokenizer(text)["input_ids"])
            if count >= TOKENS:
                break
        return self.batched(chosen)

    def rewrites(self) -> Iterator[Rewrite]:
        yield from pruned_in_every_way("6 of 12 heads", 0.5, 12)
        yield from pruned_in_every_way("3 of 12 heads", 0.75, 12)
        yield from grouped("12 -> 6 KV heads", 6)
        yield from grouped("12 -> 3 KV heads", 3)

    def figures(self, model: torch.nn.Module) -> Mapping[str, float]:
        cosine, rho = agreement(embedded(model, self._reviews), self._dense)
        judged = similarity.quality(lambda ids, mask: self._encode(model, ids, mask), self.tokenizer, self.data)
        return {
            "cosine": cosine,
            "spearman": rho,
            **{name.partition(",")[0]: value for name, value in judged.items()},
            "WordNet MRR": self._retrieval(model),
        }

    def reviews(self) -> list[str]:
        file = package("gensim") / "test" / "test_data" / "pang_lee_polarity.cor"
        lines = file.read_text("latin-1").splitlines()
        return [line.split(" ", 1)[1] for line in lines if " " in line]

    @cached_property
    def _reviews(self) -> Batches:
        return self.batched(self.reviews(), 32)

    @cached_property
    def _dense(self) -> Vectors:
        return embedded(self._model, self._reviews)

    def batched(self, texts: Sequence[str], size: int = 16) -> Batches:
        ordered = sorted(texts, key=len)
        return [similarity.tokens(self.tokenizer, ordered[i : i + size]) for i in range(0, len(ordered), size)]

    def _encode(self, model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Vectors:
        with torch.no_grad():
            return model(ids, mask).numpy()  # type: ignore[no-any-return]

    def _retrieval(self, model: torch.nn.Module) -> float:
        """Mean reciprocal rank of a noun's own gloss among those of all nouns."""
        if not WORDNET.is_file():
            return float("nan")
        lines = [line for line in WORDNET.read_text().splitlines() if line[:1].isdigit()]
        chosen = random.Random(0).sample(lines, NOUNS)
        nouns = [line.split()[4].replace("_", " ") for line in chosen]
        glosses = [line.partition("| ")[2].partition(";")[0].strip() for line in chosen]

        def encode(ids: torch.Tensor, mask: torch.Tensor) -> Vectors:
            return self._encode(model, ids, mask)

        near = similarity.embed(encode, self.tokenizer, nouns) @ similarity.embed(encode, self.tokenizer, glosses).T
        rank = (near > near.diagonal()[:, None]).sum(1) + 1
        return float((1 / rank).mean())


def agreement(got: Vectors, want: Vectors) -> tuple[float, float]:
    """Mean cosine to the dense outputs, and Spearman's rho of all pairwise similarities."""
    from scipy.stats import spearmanr

    above = np.triu_indices(len(want), 1)
    rho = spearmanr((got @ got.T)[above], (want @ want.T)[above]).statistic
    return float((got * want).sum(1).mean()), float(rho)


def embedded(model: torch.nn.Module, data: Batches) -> Vectors:
    with torch.no_grad():
        return torch.cat([model(*batch) for batch in data]).numpy()  # type: ignore[no-any-return]


def _sentences(texts: Sequence[str]) -> list[str]:
    return [s.strip() + "." for text in texts for s in text.split(". ") if len(s) > 30]
