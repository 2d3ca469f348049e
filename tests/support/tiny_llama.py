"""A decoder of one layer or more, small enough to convert in a test."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def tiny_llama(kv_heads: int, layers: int = 1) -> Any:
    """Four heads of 8 features, 50 tokens; its weights are far from their small initial values."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 50,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=kv_heads)).eval()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model
