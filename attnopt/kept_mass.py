"""How much of the attention a selection of blocks keeps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnopt.backends.lowering import selected
from attnopt.backends.reference import Reference
from attnopt.spec import AttentionSpec


def kept_mass(
    q_BHLD: Tensor,
    k_BGSD: Tensor,
    spec: AttentionSpec,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """For each sequence and head the share of attention probability on the blocks that ``spec.selection`` keeps: [B, H].

    Operands as of ``Attend``.  Without a selection it is 1.
    """
    q_len, kv_len = q_BHLD.shape[2], k_BGSD.shape[2]
    if spec.selection is None:
        return torch.ones(q_BHLD.shape[:2], device=q_BHLD.device)
    block = spec.selection.block
    kept = selected(spec, q_BHLD, k_BGSD).index_select(2, torch.arange(q_len, device=q_BHLD.device) // block)
    of_block = torch.arange(kv_len, device=k_BGSD.device).unsqueeze(1) // block
    values = (of_block == torch.arange(kept.shape[3], device=k_BGSD.device)).to(torch.float32)
    whole = replace(spec, selection=None, gains=None, value_dim=kept.shape[3])
    v_BGSM = values.expand(*k_BGSD.shape[:2], -1, -1)
    mass_BHLM = Reference().lower(whole)(q_BHLD, k_BGSD, v_BGSM, bias=bias, mask=mask, sinks=sinks)
    return (mass_BHLM * kept).sum((2, 3)) / mass_BHLM.sum((2, 3)).clamp(min=torch.finfo(torch.float32).tiny)
