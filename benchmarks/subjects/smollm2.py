"""SmolLM2-135M, a language model: calibrated on one part of Lee's news, perplexity on another.

It has 9 query and 3 KV heads.  With the 3 repeated to 9 it computes the same, and grouping must find that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from smollm2 import Logits, news, trained

from attnopt.passes import GroupedQuery, PruneHeads
from subjects import Rewrite

LENGTH, CALIBRATED, TESTED = 512, 20, 6  # tokens of a batch, and how many batches


class SmolLM2:
    name = "smollm2"
    title = "SmolLM2-135M with fewer heads, without training: perplexity on news"
    drawn = "perplexity"

    def __init__(self) -> None:
        self._model = trained()
        self.pieces = news()[: len(news()) // LENGTH * LENGTH].reshape(-1, 1, LENGTH)

    def model(self) -> torch.nn.Module:
        return Logits(self._model).eval()

    def dynamic_shapes(self) -> Any:
        return None

    def calibration(self, seed: int) -> Sequence[tuple[torch.Tensor, ...]]:
        order = torch.randperm(len(self.pieces) - TESTED, generator=torch.Generator().manual_seed(seed))
        return [(self.pieces[TESTED + i],) for i in order[:CALIBRATED].tolist()]

    def rewrites(self) -> Iterator[Rewrite]:
        yield Rewrite("3 -> 1 KV heads", "mean", GroupedQuery(1, "mean", "adjacent", "none"), False)
        yield Rewrite("3 -> 1 KV heads", "mean, least-squares", GroupedQuery(1, "mean", "adjacent", "least-squares"))
        yield Rewrite("3 -> 1 KV heads", "score-optimal, none", GroupedQuery(1, "score-optimal", "optimal", "none"))
        yield Rewrite("3 -> 1 KV heads", "default", GroupedQuery(1))
        yield Rewrite("3 -> 2 KV heads", "default: one budget for all layers", GroupedQuery(2))
        yield Rewrite("7 of 9 heads", "weights, none", PruneHeads(0.25, importance="weights", compensate="none"), False)
        yield Rewrite("7 of 9 heads", "default: one budget for all layers", PruneHeads(0.25))

    def figures(self, model: torch.nn.Module) -> Mapping[str, float]:
        total = 0.0
        with torch.no_grad():
            for ids in self.pieces[:TESTED]:
                logits = model(ids)[0, :-1].double()
                total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
        return {"perplexity": math.exp(total / TESTED)}


class Repeated(SmolLM2):
    name = "smollm2-repeated"
    title = "SmolLM2-135M with its 3 KV heads repeated to 9, and back"

    @cached_property
    def _repeated(self) -> torch.nn.Module:
        from transformers import LlamaForCausalLM

        config = self._model.config.__class__(**{**self._model.config.to_dict(), "num_key_value_heads": 9})
        config.quantization_config = None
        state = dict(self._model.state_dict())
        for name, tensor in self._model.state_dict().items():
            if "k_proj" in name or "v_proj" in name:
                state[name] = tensor.unflatten(0, (3, 1, -1)).expand(-1, 3, -1, -1).flatten(0, 2)
        made = LlamaForCausalLM(config)
        made.load_state_dict(state)
        return Logits(made.eval()).eval()

    def model(self) -> torch.nn.Module:
        return self._repeated

    def rewrites(self) -> Iterator[Rewrite]:
        yield Rewrite("9 -> 3 KV heads", "mean", GroupedQuery(3, "mean", "adjacent", "none"), False)
        yield Rewrite("9 -> 3 KV heads", "default", GroupedQuery(3))

    def figures(self, model: torch.nn.Module) -> Mapping[str, float]:
        with torch.no_grad():
            want, got = (m(self.pieces[0]) for m in (self._repeated, model))
        return {**super().figures(model), "logits, largest difference": float((got - want).abs().max())}
