"""timm's models whose attention is not the plain kind: maps across heads, of channels, mixed with positions, of no keys."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from oracle import assert_same, run

import attnopt

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@dataclass(frozen=True)
class Variant:
    """A small one.  ``kinds``: how many attentions of each kind are read; ``missed``: softmaxes that have no keys."""

    name: str
    options: dict[str, Any]
    size: int
    kinds: dict[str, int]
    missed: int = 0


VARIANTS = (
    Variant(
        "cait_xxs24_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}, 32,
        {"talking heads": 2, "": 2},
    ),
    Variant(
        "xcit_nano_12_p16_224", {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}, 32,
        {"between channels": 2, "": 2},
    ),
    Variant("edgenext_xx_small", {}, 64, {"between channels": 3}),
    Variant(
        "davit_tiny", {"embed_dims": (24, 48), "depths": (1, 1), "num_heads": (3, 6)}, 32, {"": 2, "between channels": 2},
    ),
    Variant(
        "convit_tiny",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "local_up_to_layer": 2}, 32,
        {"map": 2, "": 1},
    ),
    Variant("efficientformerv2_s0", {"img_size": 64}, 64, {"talking heads, bias": 4, "bias": 1}),
    Variant(
        "volo_d1_224",
        {"img_size": 64, "layers": (1, 1, 2, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4)}, 64,
        {"": 6}, missed=1,
    ),
)  # fmt: skip


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_read_and_fused_exactly(variant: Variant, fused: bool) -> None:
    from timm.layers import set_fused_attn

    set_fused_attn(fused)
    try:
        model = zoo.timm_model(variant.name, **variant.options)
    finally:
        set_fused_attn(True)
    x = torch.randn(2, 3, variant.size, variant.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes={"x": {0: torch.export.Dim("b")}})
    kinds = Counter(", ".join(f for f in site.spec.features if f in _NAMED) for site in fast.sites)
    assert kinds == variant.kinds
    assert len(fast.report.near_misses) == variant.missed
    assert all(site.status == "rewritten" for site in fast.report.sites)
    for batch in (2, 1, 3):
        other = torch.randn(batch, *x.shape[1:])
        assert_same(run(fast, (other,)), run(model, (other,)))


_NAMED = ("between channels", "talking heads", "map", "bias")


def test_outlook_attention_has_no_keys() -> None:
    """Its weights are a projection of the query's own features: a convolution whose kernels tokens predict."""
    variant = VARIANTS[-1]
    model = zoo.timm_model(variant.name, **variant.options)
    (miss,) = attnopt.inspect(model, (torch.randn(2, 3, variant.size, variant.size),)).near_misses
    assert miss.refusal.code == "no-query-key-product"
    assert "a projection of one sequence" in str(miss.refusal)
    assert "outlook attention" in str(miss.refusal)
