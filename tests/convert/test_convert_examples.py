"""The examples of `convert`, on a small model; by hand they run on SmolLM2."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from places import EXAMPLES

from attnopt.patterns import Causal, Sinks, Window
from attnopt.patterns.lookback import Past

transformers = pytest.importorskip("transformers")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)

    def loaded(name: str) -> ModuleType:
        for module in (name, "smollm2"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(name)

    return loaded


def small() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


class Words:
    """Each character is a token."""

    eos_token_id = 96

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages)

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([[ord(c) % 90 + 1 for c in text]]))

    def decode(self, ids: torch.Tensor, **options: Any) -> str:
        return "".join(chr(97 + int(i) % 26) for i in ids)


@pytest.mark.slow
def test_chat_with_window(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("chat_with_window")
    converted = module.windowed(small(), torch.arange(1, 13).view(1, 12), window=8, sinks=2)
    assert converted.model.layers[0].self_attn.attnopt_pattern == Causal() & (Window(7, 0) | Sinks(2))
    answers = module.chat(converted, Words(), ["where?", "when?"], length=10)
    assert [len(a) for a in answers] == [10, 10]
    later = "<|im_end|>\n<|im_start|>user\nwhen?<|im_end|>\n<|im_start|>assistant\n"
    assert f"({len('user: where?') + 1 + 10 + len(later) + 9} tokens," in capsys.readouterr().out
    cache = converted(torch.arange(1, 90).view(1, 89)).past_key_values
    assert cache.layers[0].past == Past(2, 7)


@pytest.mark.slow
def test_heads_to_groups(example: Any, tmp_path: Path) -> None:
    module, model, ids = example("heads_to_groups"), small(), torch.arange(1, 13).view(1, 12)
    repeated = module.with_repeated_heads(model)
    assert repeated.config.num_key_value_heads == 6
    loaded = module.regrouped(repeated, ids, 2, tmp_path)
    assert loaded.config.num_key_value_heads == 2
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-6, rtol=0)
