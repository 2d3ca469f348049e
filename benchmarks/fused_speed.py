"""The fused graph against the user's model: CPU time of one call, the two taking turns.  Wanted: never above 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import interleaved, let_transformers_import, one_thread, options, picture, publish

Built = tuple[torch.nn.Module, dict[str, Any]]


def bert(length: int, implementation: str) -> Built:
    from transformers import BertConfig, BertModel

    config = BertConfig(attn_implementation=implementation)
    return BertModel(config, add_pooling_layer=False), {"input_ids": _ids(length)}


def bert_with_mask(length: int, implementation: str) -> Built:
    model, kwargs = bert(length, implementation)
    return model, {**kwargs, "attention_mask": torch.ones(1, length, dtype=torch.long)}


def vit(length: int, implementation: str) -> Built:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(attn_implementation=implementation), add_pooling_layer=False), {"pixel_values": _image()}


def llama(length: int, implementation: str) -> Built:
    """The shape of SmolLM2-135M."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaModel(config), {"input_ids": _ids(length), "use_cache": False}


def t5(length: int, implementation: str) -> Built:
    from transformers import T5Config, T5Model

    config = T5Config(attn_implementation=implementation)  # its defaults are T5-small
    return T5Model(config), {"input_ids": _ids(length), "decoder_input_ids": _ids(length // 4), "use_cache": False}


def swin(length: int, implementation: str) -> Built:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(depths=[2, 2, 6, 2], attn_implementation=implementation)
    return SwinModel(config, add_pooling_layer=False), {"pixel_values": _image()}


MODELS: dict[str, tuple[Callable[[int, str], Built], tuple[int, ...]]] = {
    "BERT-base": (bert, (128, 512)),
    "BERT-base, mask of ones": (bert_with_mask, (128, 512)),
    "ViT-B/16": (vit, (197,)),
    "Llama, 135M": (llama, (128, 512)),
    "T5-small": (t5, (128, 512)),
    "Swin-tiny": (swin, (3136,)),
}


def _ids(length: int) -> torch.Tensor:
    return torch.randint(0, 30000, (1, length))


def _image() -> torch.Tensor:
    return torch.randn(1, 3, 224, 224)


def main() -> None:
    arguments = options(__doc__, 15)
    one_thread()
    let_transformers_import()
    rows = list(_rows(arguments.rounds, arguments.only))
    if arguments.only:
        print(*rows, sep="\n")
        return
    publish("fused_speed", rows, "The fused graph against the user's model, one call, batch 1")
    picture("fused_speed", lambda figure, axes: _draw(axes, rows))


def _rows(rounds: int, only: str) -> Iterator[dict[str, Any]]:
    for name, (build, lengths) in MODELS.items():
        for length in lengths:
            for implementation in ("eager", "sdpa"):
                if only in name:
                    yield _measured(name, build, length, implementation, rounds)


def _measured(
    name: str, build: Callable[[int, str], Built], length: int, implementation: str, rounds: int
) -> dict[str, Any]:
    import attnopt

    torch.manual_seed(0)
    model, kwargs = build(length, implementation)
    model.eval()
    fast = attnopt.optimize(model, "fuse", (), kwargs)
    with torch.inference_mode():
        times = interleaved({"model": lambda: model(**kwargs), "fused": lambda: fast(**kwargs)}, rounds, warm_up=3)
    low, high = times.spread("fused", "model")
    print(f"{name} {length} {implementation}: {times.ratio('fused', 'model'):.2f}", flush=True)
    return {
        "model": name,
        "tokens": length,
        "written as": implementation,
        "fused": f"{fast.report.count('rewritten')} of {len(fast.report.sites)}",
        "model, ms": 1e3 * times.median("model"),
        "fused, ms": 1e3 * times.median("fused"),
        "ratio": times.ratio("fused", "model"),
        "quartiles": f"{low:.2f}-{high:.2f}",
    }


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    labels = [f"{row['model']}, {row['tokens']}, {row['written as']}" for row in rows]
    axes.barh(
        labels,
        [row["ratio"] for row in rows],
        color=["#4878a8" if row["written as"] == "eager" else "#9bb8d3" for row in rows],
    )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="CPU time of the fused graph / of the model", xlim=0)


if __name__ == "__main__":
    main()
