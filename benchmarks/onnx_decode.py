"""One more token of a language model over a cache that is filled already: CPU time against torch's `generate()` step.

The others take past keys and values as inputs and return longer ones, as torch's exporter and Optimum write them, with
the cache's length fixed; attnopt's file takes any length and writes into the one buffer that it reads.

A second table compares attnopt's files with each other: layers with a window whose buffers hold that alone, and int8.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interleaved, let_transformers_import, one_thread, picture, publish
from onnx_caches import LENGTHS as LONG
from onnx_caches import measured_caches
from onnx_models import smollm2
from onnx_peers import against_the_best, draw, peers, ratios
from onnx_sessions import session
from torch import Tensor, nn

import attnopt

LENGTHS, PAST = (128, 512, 2048), "past_key_values.{}.{}"
CLOSE = 1e-3  # relative: contenders that disagree are no contenders


class Whole(nn.Module):
    """Tokens to logits, with the inputs that a decoder takes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        return self.model(input_ids, **given, use_cache=False).logits  # type: ignore[no-any-return]


class Step(nn.Module):
    """One token [1, 1] after keys and values [1, G, S, D] of each layer: logits, and keys and values one longer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        cache = _filled(past)
        logits = self.model(input_ids, past_key_values=cache, use_cache=True).logits
        return logits, *(t for layer in cache.layers for t in (layer.keys, layer.values))


def _filled(past: list[Tensor]) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(keys, values, layer)
    return cache


def ours(fast: attnopt.OptimizedModel, ids: Tensor, past: list[Tensor], folder: Path) -> Callable[[], Any]:
    """Past and present are one buffer, as onnxruntime-genai runs the folder."""
    import onnxruntime

    length = past[0].shape[2]
    fast.export_decoder(folder, context_length=8192, eos_token_id=0)
    loaded = session(folder / "model.onnx")
    ort, binding = onnxruntime.OrtValue.ortvalue_from_numpy, loaded.io_binding()
    feed = {
        "input_ids": ids,
        "attention_mask": torch.ones(1, length + 1).long(),
        "position_ids": torch.tensor([[length]]),
    }
    for name, x in feed.items():
        binding.bind_ortvalue_input(name, ort(x.numpy()))
    for i, x in enumerate(past):
        buffer = np.zeros((*x.shape[:2], length + 1, x.shape[3]), np.float32)
        buffer[:, :, :length] = x.numpy()
        name, value = PAST.format(i // 2, ("key", "value")[i % 2]), ort(buffer)
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
    (logits,) = (o.name for o in loaded.get_outputs() if not o.name.startswith("present"))
    binding.bind_output(logits)

    def call() -> Any:
        loaded.run_with_iobinding(binding)
        return [binding.get_outputs()[-1].numpy()]

    return call


def measured(length: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    whole, _ = smollm2(length)
    model = whole.eval().model
    config = model.config
    size = (1, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    past, ids = [torch.randn(size) for _ in range(2 * config.num_hidden_layers)], torch.tensor([[7]])
    tokens = torch.randint(0, config.vocab_size, (2, 16))
    example = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(16).expand(2, -1),
    }
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder, step = Path(name), Step(model).eval()
        fast = attnopt.optimize(Whole(model), "fuse", (), example, dynamic_shapes="auto", backend="sdpa")
        calls = {"torch": _in_torch(model, ids, past), "attnopt": ours(fast, ids, past, folder / "ours")}
        calls |= dict(peers(step, (ids, past), {}, "gpt2", folder))
        _check(calls)
        times = interleaved(calls, rounds)
    about = {"model": "SmolLM2, a token", "length": length, "torch, ms": 1000 * times.median("torch")}
    return {**about, **ratios(times), **against_the_best(times)}


def _in_torch(model: Any, ids: Tensor, past: list[Tensor]) -> Callable[[], Any]:
    """With the cache that `generate()` takes by itself, set back after each step."""
    cache = _filled(past)

    def call() -> Any:
        made = model(ids, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return [made.numpy()]

    return call


def _check(calls: dict[str, Callable[[], Any]]) -> None:
    want = calls["torch"]()[0]
    for name, call in calls.items():
        error = float(np.abs(np.asarray(call()[0]) - want).max() / np.abs(want).max())
        if not error <= CLOSE:
            raise SystemExit(f"{name} gives other logits: {error:.2g} relative")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("peers", "caches"), help="one of the two tables")
    parser.add_argument("--lengths", type=int, nargs="+", default=LONG, help="of the filled caches in the second table")
    arguments = parser.parse_args()
    one_thread()
    let_transformers_import()
    if arguments.only != "peers":
        rows = measured_caches(arguments.lengths, arguments.rounds, Whole)
        publish("onnx_caches", rows, "A token of SmolLM2 over its own cache: CPU time relative to all keys in float32")
    if arguments.only == "caches":
        return
    rows = [measured(length, arguments.rounds) for length in LENGTHS]
    publish("onnx_decode", rows, "A token of SmolLM2 over a filled cache, in ONNX Runtime: CPU time relative to torch")
    picture("onnx_decode", lambda figure, axes: draw(figure, axes, rows))


if __name__ == "__main__":
    main()
