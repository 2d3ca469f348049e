"""A model of two attentions that continues repeated text, its circuit set by hand; and runs of any model with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import tiny_models
import torch
from torch import Tensor, nn

WORDS, PLACES, SIZE, HEADS = 8, 6, 10, 3  # tokens, positions, features of a head, heads of a layer
SURE = 8.0  # how sharply the planted heads attend
PREVIOUS, INDUCTION = ("layers.0", 1), ("layers.1", 2)  # the circuit
CLEAN = torch.tensor([[0, 3, 5, 1, 2, 3], [4, 6, 7, 2, 1, 6]])  # "3 5 ... 3": 5 follows
CORRUPTED = torch.tensor([[0, 7, 5, 1, 2, 3], [4, 0, 7, 2, 1, 6]])  # 3 was never seen before
ANSWERS = torch.tensor([5, 7])


class Induction(nn.Module):
    """Residual features: the token, its position, the token before it, and what to say next."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        width = HEADS * SIZE
        token, place = slice(0, WORDS), slice(WORDS, WORDS + PLACES)
        before, said = slice(14, 14 + WORDS), slice(22, 22 + WORDS)
        self.embed = nn.Embedding(WORDS, width)
        self.embed.weight.data.zero_()
        self.embed.weight.data[:, token] = torch.eye(WORDS)
        self.places = nn.Parameter(torch.zeros(PLACES, width))
        self.places.data[:, place] = torch.eye(PLACES)
        self.layers = nn.ModuleList(tiny_models.Attention(width, HEADS) for _ in range(2))
        for layer in self.layers:
            for p in layer.parameters():
                p.data = 1e-3 * torch.randn(p.shape, generator=generator)
        shifted = torch.eye(PLACES).roll(1, 0) * (torch.arange(PLACES) > 0)[:, None]
        _plant(self.layers[0], PREVIOUS[1], (place, shifted.T), (place, torch.eye(PLACES)), token, before)
        _plant(self.layers[1], INDUCTION[1], (token, torch.eye(WORDS)), (before, torch.eye(WORDS)), token, said)
        self.unembed = nn.Linear(width, WORDS, bias=False)
        self.unembed.weight.data.zero_()
        self.unembed.weight.data[:, said] = torch.eye(WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places[: ids.shape[1]]
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = self.unembed(x)
        return logits


def _plant(
    layer: Any, head: int, q: tuple[slice, Tensor], k: tuple[slice, Tensor], reads: slice, writes: slice
) -> None:
    rows = slice(head * SIZE, (head + 1) * SIZE)
    for part, (where, how) in ((layer.q, q), (layer.k, k), (layer.v, (reads, torch.eye(WORDS)))):
        part.weight.data[rows] = 0.0
        part.bias.data[rows] = 0.0
        scale = 1.0 if part is layer.v else SURE
        part.weight.data[head * SIZE : head * SIZE + len(how), where] = scale * how
    layer.o.weight.data[:, rows] = 0.0
    layer.o.weight.data[writes, head * SIZE : head * SIZE + WORDS] = torch.eye(WORDS)


def said_right(logits: Tensor) -> Tensor:
    """The mean logit of the right answer over that of the other sequence's."""
    last = logits[:, -1]
    right, wrong = last.gather(1, ANSWERS[:, None]), last.gather(1, ANSWERS.flip(0)[:, None])
    return (right - wrong).mean()


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
