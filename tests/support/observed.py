"""Small real models, and what their heads do: read by hooks that know each model's modules, and computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

H, D, WIDTH = 4, 8, 32


@dataclass(frozen=True)
class Attention:
    """Where one attention is: modules of its projections, and the mask of its scores, True where visible, from the batch."""

    name: str
    q: str
    k: str
    v: str
    out: str
    kv_heads: int = H
    part: int = 0  # of a packed projection: q is its first third
    packed: bool = False
    rotary: bool = False
    visible: Callable[[Mapping[str, Any], int, int], Tensor] | None = None


@dataclass(frozen=True)
class Example:
    model: nn.Module
    batch: dict[str, Any]
    attentions: tuple[Attention, ...]


def hooked(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Inputs and outputs of every module by name, and the model's output."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if given:
                inputs[name] = given[0].detach().clone()
            first = out[0] if isinstance(out, tuple) else out
            if isinstance(first, Tensor):
                outputs[name] = first.detach().clone()

        return hook

    handles = [m.register_forward_hook(keep(n), with_kwargs=True) for n, m in model.named_modules()]
    with torch.no_grad():
        out = model(**batch)
    for handle in handles:
        handle.remove()
    return inputs, outputs, out


def by_hand(example: Example, a: Attention) -> dict[str, Tensor]:
    """Everything that a tap can read of one attention."""
    inputs, outputs, _ = hooked(example.model, example.batch)

    def heads(x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, D)).transpose(1, 2)

    if a.packed:
        q, k, v = (heads(x, H) for x in outputs[a.q].chunk(3, -1))
    else:
        q, k, v = heads(outputs[a.q], H), heads(outputs[a.k], a.kv_heads), heads(outputs[a.v], a.kv_heads)
    if a.rotary:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        positions = torch.arange(q.shape[2])[None]
        cos, sin = example.model.get_submodule("rotary_emb")(q, positions)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    wide = [x.repeat_interleave(H // a.kv_heads, 1) for x in (k, v)]
    scores = q @ wide[0].mT / D**0.5
    if a.visible is not None:
        scores = scores.masked_fill(~a.visible(example.batch, q.shape[2], k.shape[2]), -torch.inf)
    weights = scores.softmax(-1)
    out = weights @ wide[1]
    projection = example.model.get_submodule(a.out)
    weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
    assert isinstance(weight, Tensor)
    return {
        "q": q,
        "k": k,
        "v": v,
        "scores": scores,
        "weights": weights,
        "lse": scores.logsumexp(-1),
        "outputs": heads(inputs[a.out], H),
        "contribution": torch.einsum("bhld,hdc->bhlc", out, weight.detach().unflatten(0, (H, D))),
        "input": inputs[a.q],
    }


def padded(batch: Mapping[str, Any], _: int, __: int) -> Tensor:
    return batch["attention_mask"].bool()[:, None, None, :]


def causal(_: Mapping[str, Any], queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def causal_padded(batch: Mapping[str, Any], queries: int, keys: int) -> Tensor:
    return causal(batch, queries, keys) & padded(batch, queries, keys)


def mask(*lengths: int, longest: int = 9, left: bool = False) -> Tensor:
    places = torch.arange(longest)
    rows = [places >= longest - n if left else places < n for n in lengths]
    return torch.stack(rows).long()


def bert(attention: str = "sdpa") -> Example:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=50, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=H, intermediate_size=48,
        max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    names = [f"encoder.layer.{i}.attention" for i in range(2)]
    attentions = tuple(
        Attention(
            f"{n}.self", f"{n}.self.query", f"{n}.self.key", f"{n}.self.value", f"{n}.output.dense", visible=padded
        )
        for n in names
    )
    batch = {"input_ids": torch.randint(0, 50, (2, 9)), "attention_mask": mask(9, 6)}
    return Example(far(t.BertModel(config, add_pooling_layer=False)), batch, attentions)


def gpt2(attention: str = "sdpa") -> Example:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=H, attn_implementation=attention, use_cache=False,
        pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    attentions = tuple(
        Attention(f"h.{i}.attn", *[f"h.{i}.attn.c_attn"] * 3, f"h.{i}.attn.c_proj", packed=True, visible=causal_padded)
        for i in range(2)
    )
    batch = {"input_ids": torch.randint(0, 50, (2, 9)), "attention_mask": mask(9, 6)}
    return Example(far(t.GPT2Model(config)), batch, attentions)


def llama(attention: str = "sdpa", kv_heads: int = 2) -> Example:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=H,
        num_key_value_heads=kv_heads, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    names = [f"layers.{i}.self_attn" for i in range(2)]
    attentions = tuple(
        Attention(n, *(f"{n}.{p}_proj" for p in "qkvo"), kv_heads=kv_heads, rotary=True, visible=causal) for n in names
    )
    return Example(far(t.LlamaModel(config)), {"input_ids": torch.randint(0, 50, (2, 9))}, attentions)


def vit(attention: str = "sdpa") -> Example:
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = t.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=H, intermediate_size=48, image_size=16, patch_size=4,
        attn_implementation=attention,
    )  # fmt: skip
    model = far(t.ViTModel(config, add_pooling_layer=False))
    found = [n.rpartition(".")[0] for n, m in model.named_modules() if n.endswith(("attention.query", ".q_proj"))]
    attentions = []
    for n in found:
        parts = (
            ("query", "key", "value")
            if not hasattr(model.get_submodule(n), "q_proj")
            else ("q_proj", "k_proj", "v_proj")
        )
        out = f"{n}.o_proj" if hasattr(model.get_submodule(n), "o_proj") else f"{n.rpartition('.')[0]}.output.dense"
        attentions.append(Attention(n, *(f"{n}.{p}" for p in parts), out))
    return Example(model, {"pixel_values": torch.randn(2, 3, 16, 16)}, tuple(attentions))


class Cross(nn.Module):
    """As diffusers write it: queries from the image, keys and values from the text, which may be padded."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(w, WIDTH, bias=False) for w in (WIDTH, 12, 12))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (H, D)).transpose(1, 2)

        q, k, v = heads(self.to_q(self.norm(hidden))), heads(self.to_k(text)), heads(self.to_v(text))
        seen = attention_mask.bool()[:, None, None, :]
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        for layer in self.to_out:
            x = layer(x)
        return hidden + x


def cross() -> Example:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn2 = Cross()

        def forward(self, hidden: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
            return self.attn2(hidden, text, attention_mask)

    batch = {"hidden": torch.randn(2, 7, WIDTH), "text": torch.randn(2, 9, 12), "attention_mask": mask(9, 5)}
    where = Attention("attn2", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", visible=padded)
    return Example(far(Block()), batch, (where,))


def far(model: nn.Module) -> nn.Module:
    """Weights far from their small initial values, so that heads differ."""
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model.eval()


def assert_near(got: Tensor, want: Tensor) -> None:
    """Equal but for rounding; what is hidden may also be a model's least number."""
    hidden = want == -torch.inf
    assert bool((got[hidden] < -1e30).all())
    torch.testing.assert_close(got.masked_fill(hidden, -torch.inf), want, rtol=1e-5, atol=2e-6)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "BERT": bert,
    "BERT, eager": lambda: bert("eager"),
    "GPT-2": gpt2,
    "Llama": llama,
    "Llama, eager": lambda: llama("eager"),
    "ViT": vit,
    "cross": cross,
}
