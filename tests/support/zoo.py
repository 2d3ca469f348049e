"""Tiny models of transformers and timm, from configurations alone, with weights loud enough to tell right from wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """``sites``: attentions that run; ``heads`` of the first one; ``windows``: self-attention, so that windows apply;
    ``groups``: K/V heads of the first one, where they are fewer."""

    name: str
    build: Callable[[], Built]
    sites: int
    heads: int
    kv_heads: int | None = None
    cross: int = 0  # how many of the sites are cross-attention
    dynamic: bool = False


def loud(model: nn.Module, seed: int = 0) -> nn.Module:
    """Larger weights, noise on constant parameters, evaluation mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=random)
            if p.dim() >= 2 and float(p.std()) > 0:
                p.copy_(noise * (1.5 * p[0].numel() ** -0.5) if p.dim() == 2 else p * 2 + noise * 0.05)
            else:
                p.add_(noise * 0.2)
    return model.eval()


def ids(vocab: int = 50, batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def pixels(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2))


def padded(batch: int = 2, length: int = 9) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return mask


def hf(model: str, config: str, impl: str = "eager", **options: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**options)
    made._attn_implementation = impl
    torch.manual_seed(0)
    return loud(getattr(transformers, model)(made))


SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40,
}  # fmt: skip
DECODER: dict[str, Any] = {**SMALL, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def roberta() -> Built:
    model = hf("RobertaModel", "RobertaConfig", **SMALL, pad_token_id=0, add_pooling_layer=False)
    return model, (ids(),), {"attention_mask": padded()}


def electra() -> Built:
    model = hf("ElectraModel", "ElectraConfig", impl="sdpa", **SMALL, embedding_size=16)
    return model, (), {"input_ids": ids(), "attention_mask": padded()}


def deit() -> Built:
    model = hf("DeiTModel", "DeiTConfig", hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
               image_size=32, patch_size=8)  # fmt: skip
    return model, (pixels(),), {}


def falcon() -> Built:
    model = hf("FalconModel", "FalconConfig", vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
               num_kv_heads=2, new_decoder_architecture=True, use_cache=False, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return model, (ids(),), {}


def bloom() -> Built:
    model = hf("BloomModel", "BloomConfig", vocab_size=50, hidden_size=24, n_layer=2, n_head=4, use_cache=False)
    return model, (ids(),), {}


def gptj() -> Built:
    model = hf("GPTJModel", "GPTJConfig", vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=40, rotary_dim=4,
               use_cache=False, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return model, (ids(),), {}


def codegen() -> Built:
    model = hf("CodeGenModel", "CodeGenConfig", vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=40, rotary_dim=4,
               use_cache=False, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return model, (ids(),), {}


def starcoder2() -> Built:
    model = hf("Starcoder2Model", "Starcoder2Config", impl="sdpa", **DECODER, num_key_value_heads=2)
    return model, (ids(),), {}


def qwen3() -> Built:
    model = hf("Qwen3Model", "Qwen3Config", **DECODER, num_key_value_heads=2, head_dim=8)
    return model, (ids(),), {}


def gemma3() -> Built:
    model = hf("Gemma3TextModel", "Gemma3TextConfig", **DECODER, num_key_value_heads=2, head_dim=8, sliding_window=4,
               query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    return model, (ids(),), {}


def gpt_oss() -> Built:
    model = hf("GptOssModel", "GptOssConfig", **DECODER, num_key_value_heads=2, head_dim=8, num_local_experts=2,
               num_experts_per_tok=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    return model, (ids(),), {}


def mt5() -> Built:
    model = hf("MT5Model", "MT5Config", vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_layers=1, num_decoder_layers=1,
               num_heads=4, use_cache=False, decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    return model, (), {"input_ids": ids(), "decoder_input_ids": ids(length=7, seed=3)}


def mbart() -> Built:
    model = hf("MBartModel", "MBartConfig", impl="sdpa", vocab_size=50, d_model=24, encoder_layers=1, decoder_layers=1,
               encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
               max_position_embeddings=40, use_cache=False)  # fmt: skip
    return model, (), {"input_ids": ids(), "decoder_input_ids": ids(length=7, seed=3)}


def siglip() -> Built:
    model = hf("SiglipVisionModel", "SiglipVisionConfig", hidden_size=24, intermediate_size=32, num_hidden_layers=2,
               num_attention_heads=4, image_size=32, patch_size=8, vision_use_head=False)  # fmt: skip
    return model, (pixels(),), {}


def dinov2() -> Built:
    model = hf("Dinov2Model", "Dinov2Config", impl="sdpa", hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
               image_size=32, patch_size=8)  # fmt: skip
    return model, (pixels(),), {}


def hubert() -> Built:
    model = hf("HubertModel", "HubertConfig", hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
               conv_dim=(8, 8), conv_kernel=(10, 4), conv_stride=(5, 4), num_feat_extract_layers=2,
               num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)  # fmt: skip
    return model, (torch.randn(2, 240, generator=torch.Generator().manual_seed(4)),), {}


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return loud(timm.create_model(name, pretrained=False, num_classes=5, **options))


def deit3() -> Built:
    model = timm_model("deit3_small_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4)
    return model, (pixels(),), {}


def eva02() -> Built:
    """Its class token is not rotated: the heads of the queries hide behind the joining of it and the rest."""
    model = timm_model("eva02_tiny_patch14_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4)
    return model, (pixels(),), {}


def twins() -> Built:
    model = timm_model(
        "twins_svt_small", img_size=64, embed_dims=(8, 16, 16, 16), num_heads=(2, 4, 4, 4), depths=(2, 1, 1, 1)
    )
    return model, (pixels(64),), {}


def cait() -> Built:
    model = timm_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=4)
    return model, (pixels(),), {}


ENTRIES = [
    Entry("roberta", roberta, 2, 4, dynamic=True),
    Entry("electra", electra, 2, 4),
    Entry("deit", deit, 2, 4),
    Entry("falcon", falcon, 2, 4, 2),
    Entry("bloom", bloom, 2, 4, dynamic=True),
    Entry("gptj", gptj, 2, 4),
    Entry("codegen", codegen, 1, 4),
    Entry("starcoder2", starcoder2, 2, 4, 2),
    Entry("qwen3", qwen3, 2, 4, 2, dynamic=True),
    Entry("gemma3", gemma3, 2, 4, 2),
    Entry("gpt_oss", gpt_oss, 2, 4, 2),
    Entry("mt5", mt5, 3, 4, cross=1),
    Entry("mbart", mbart, 3, 4, cross=1),
    Entry("siglip", siglip, 2, 4),
    Entry("dinov2", dinov2, 2, 4),
    Entry("hubert", hubert, 2, 4),
    Entry("deit3", deit3, 2, 4),
    Entry("eva02", eva02, 1, 4),
]
BY_NAME = {e.name: e for e in ENTRIES}
