"""Whole models in ONNX Runtime: CPU time of attnopt's file against every other way to run the model on a CPU.

The others: torch itself, torch's own export at two opsets, that export after ONNX Runtime's optimizer and after
onnxscript's, and OpenVINO on it.  Rewrites in the first table are exact; the second has windows and fewer heads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import interleaved, let_transformers_import, one_thread, options, picture, publish
from onnx_peers import against_the_best, draw, peers, ratios
from onnx_sessions import runner

import attnopt
from attnopt.passes import LocalWindow, PruneHeads

Kwargs = dict[str, torch.Tensor]


class Logits(torch.nn.Module):
    """A decoder's prefill."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, use_cache=False).logits  # type: ignore[no-any-return]


def minilm(length: int) -> tuple[torch.nn.Module, Kwargs]:
    from transformers import BertConfig

    return _bert(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536), length
    )


def bert(length: int) -> tuple[torch.nn.Module, Kwargs]:
    from transformers import BertConfig

    return _bert(BertConfig(), length)


def _bert(config: Any, length: int) -> tuple[torch.nn.Module, Kwargs]:
    from transformers import BertModel

    config.max_position_embeddings = 2048
    return BertModel(config, add_pooling_layer=False), {"input_ids": torch.randint(0, 30000, (1, length))}


def vit(length: int) -> tuple[torch.nn.Module, Kwargs]:
    from transformers import ViTConfig, ViTModel

    side = {197: 224, 577: 384, 2026: 720}[length]
    pixels = torch.randn(1, 3, side, side)
    return ViTModel(ViTConfig(image_size=side), add_pooling_layer=False), {"pixel_values": pixels}


def smollm2(length: int) -> tuple[torch.nn.Module, Kwargs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    return Logits(LlamaForCausalLM(config)), {"input_ids": torch.randint(0, 49000, (1, length))}


@dataclass(frozen=True)
class Subject:
    """A model with random weights; ``kind``: what ONNX Runtime's optimizer calls it."""

    name: str
    build: Callable[[int], tuple[torch.nn.Module, Kwargs]]
    lengths: tuple[int, ...]
    kind: str
    window: LocalWindow


SUBJECTS = (
    Subject("MiniLM-L6", minilm, (128, 512, 2048), "bert", LocalWindow(64)),
    Subject("BERT-base", bert, (128, 512, 2048), "bert", LocalWindow(64)),
    Subject("ViT-B/16", vit, (197, 577, 2026), "vit", LocalWindow(64, sinks=1)),
    Subject("SmolLM2, prefill", smollm2, (128, 512, 2048), "gpt2", LocalWindow(255, sinks=4)),
)


def ours(model: torch.nn.Module, policy: Any, kwargs: Kwargs, file: Path) -> Callable[[], Any]:
    attnopt.optimize(model, policy, (), kwargs, backend="sdpa").export_onnx(file)
    return runner(file, list(kwargs.values()))


def measured(rounds: int, only: str, is_exact: bool) -> Iterator[dict[str, Any]]:
    for subject in SUBJECTS:
        for length in subject.lengths if only in subject.name else ():
            torch.manual_seed(0)
            model, kwargs = subject.build(length)
            model.eval()
            with tempfile.TemporaryDirectory() as name, torch.no_grad():
                folder = Path(name)
                calls: dict[str, Callable[[], Any]] = {"torch": lambda m=model, k=kwargs: m(**k)}
                for label, policy in (policies(subject) if not is_exact else {"attnopt": "fuse"}).items():
                    calls[label] = ours(model, policy, kwargs, folder / f"{len(calls)}.onnx")
                if is_exact:
                    calls |= dict(peers(model, (), kwargs, subject.kind, folder))
                times = interleaved(calls, max(5, rounds // (1 + length // 512)))
            last = against_the_best(times) if is_exact else {}
            yield {"model": subject.name, "length": length, **ratios(times), **last}


def policies(subject: Subject) -> Mapping[str, Any]:
    fewer = PruneHeads(fraction=0.25)
    return {"exact": "fuse", "25 % fewer heads": fewer, "window": subject.window, "both": [fewer, subject.window]}


def main() -> None:
    arguments = options(__doc__, 15)
    one_thread()
    let_transformers_import()
    for name, is_exact, what in (
        ("onnx_models", True, "Whole models in ONNX Runtime, exact"),
        ("onnx_rewritten", False, "Whole models in ONNX Runtime, rewritten"),
    ):
        if rows := list(measured(arguments.rounds, arguments.only, is_exact)):
            publish(name, rows, f"{what}: CPU time relative to torch")
            picture(name, lambda figure, axes, rows=rows: draw(figure, axes, rows))


if __name__ == "__main__":
    main()
