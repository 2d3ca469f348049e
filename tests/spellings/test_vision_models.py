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
from torch import nn

import attnopt
from attnopt.passes import ScaleHeads

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
        {"talking heads, bias, map": 2, "": 2},
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
    Variant("efficientformerv2_s0", {"img_size": 64}, 64, {"talking heads, bias, map": 4, "bias": 1}),
    Variant(
        "volo",
        {"img_size": 64, "layers": (1, 1, 2, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4)}, 64,
        {"": 6}, missed=1,
    ),
)  # fmt: skip


def built(variant: Variant) -> nn.Module:
    if variant.name != "volo":
        return zoo.timm_model(variant.name, **variant.options)
    from timm.models.volo import VOLO  # timm's functions fix the number of layers

    torch.manual_seed(0)
    return zoo.loud(VOLO(**variant.options))


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_read_and_rewritten_exactly(variant: Variant, fused: bool) -> None:
    from timm.layers import set_fused_attn

    set_fused_attn(fused)
    try:
        model = built(variant)
    finally:
        set_fused_attn(True)
    x = torch.randn(2, 3, variant.size, variant.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", attnopt.AttnoptWarning)
        scaled = attnopt.optimize(model, ScaleHeads({0: 0.5}), (x,))
        fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes={"x": {0: torch.export.Dim("b")}})
    kinds = Counter(", ".join(f for f in site.spec.features if f in _NAMED) for site in fast.sites)
    assert kinds == variant.kinds
    assert len(fast.report.near_misses) == variant.missed
    for site, told in zip(
        fast.sites, fast.report.sites, strict=True
    ):  # of talking heads, no form is faster than the model's own
        assert told.status == ("refused" if site.spec.mixes_heads else "rewritten")
    assert all(site.status == "rewritten" for site in scaled.report.sites)
    for batch in (2, 1, 3):
        other = torch.randn(batch, *x.shape[1:])
        assert_same(run(fast, (other,)), run(model, (other,)))


_NAMED = ("between channels", "talking heads", "map", "bias")


def test_outlook_attention_has_no_keys() -> None:
    """Its weights are a projection of the query's own features: a convolution whose kernels tokens predict."""
    variant = VARIANTS[-1]
    model = built(variant)
    (miss,) = attnopt.inspect(model, (torch.randn(2, 3, variant.size, variant.size),)).near_misses
    assert miss.refusal.code == "no-query-key-product"
    assert "a projection of one sequence" in str(miss.refusal)
    assert "outlook attention" in str(miss.refusal)
