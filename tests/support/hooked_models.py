"""Small language models of transformers, and runs of any model with hooks that read or change what its heads give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

IDS = tuple(torch.randint(0, 50, (2, 2, 9), generator=torch.Generator().manual_seed(3)))
D = 8  # features of a head of these models


def margin(output: Any) -> Tensor:
    return output.logits[:, -1, 7].sum() - output.logits[:, -2, 11].sum()


def outputs_of(model: Any) -> list[nn.Module]:
    """Each output projection of the heads."""
    if hasattr(model, "transformer"):
        return [block.attn.c_proj for block in model.transformer.h]
    return [layer.self_attn.o_proj for layer in model.model.layers]


@cache
def gpt2(layers: int = 3) -> Any:
    """Four heads of 8 features, with weights far from their small initial values."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=layers, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    return _shaken(transformers.GPT2LMHeadModel(config))


@cache
def llama(layers: int = 3) -> Any:
    """Four heads of 8 features that share two key/value heads."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return _shaken(transformers.LlamaForCausalLM(config))


def _shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval().requires_grad_(False)


@contextmanager
def hooked(
    inputs: dict[nn.Module, Callable[[Tensor], Tensor]], outputs: dict[nn.Module, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Modules whose first input or whose output is changed."""
    handles = [m.register_forward_pre_hook(lambda _, a, f=f: (f(a[0]), *a[1:])) for m, f in inputs.items()]
    handles += [m.register_forward_hook(lambda _, a, out, f=f: f(out)) for m, f in outputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recorded(model: Any, modules: list[nn.Module], ids: Tensor, output: bool = False) -> list[Tensor]:
    """The first input of each module, or its output."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(m: nn.Module) -> Callable[[Tensor], Tensor]:
        def see(x: Tensor) -> Tensor:
            seen[m] = x.clone()
            return x

        return see

    watching = {m: keep(m) for m in modules}
    with hooked({} if output else watching, watching if output else {}):
        model(ids)
    return [seen[m] for m in modules]


def with_slice(x: Tensor, other: Tensor, start: int, size: int) -> Tensor:
    """``x`` [..., features] with some features of ``other``."""
    made = x.clone()
    made[..., start : start + size] = other[..., start : start + size]
    return made
