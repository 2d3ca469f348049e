"""Attention recall: how much of the attention probability a block selection keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from attnopt.backends.reference import Reference
from attnopt.graph.interpreter import Forward, Schedule
from attnopt.graph.nodes import inputs_of
from attnopt.ir.operands import operands_of
from attnopt.ir.semantics import selected
from attnopt.ir.spec import AttentionSpec


def kept_mass(
    q_BHLD: Tensor,
    k_BGSD: Tensor,
    spec: AttentionSpec,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention recall of ``spec.selection`` for each sequence and head: the probability on its kept blocks, [B,
    H].

    Operands as in ``Attend``.  Without a selection it is 1.
    """
    kept, whole = kept_of_rows(q_BHLD, k_BGSD, spec, bias=bias, mask=mask, sinks=sinks)
    return kept.sum(2) / whole.sum(2).clamp(min=torch.finfo(torch.float32).tiny)


def kept_of_rows(
    q_BHLD: Tensor,
    k_BGSD: Tensor,
    spec: AttentionSpec,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For each query the probability on its kept blocks, and on all keys, [B, H, L] each."""
    q_len, kv_len = q_BHLD.shape[2], k_BGSD.shape[2]
    if spec.selection is None:
        everything = torch.ones(q_BHLD.shape[:3], device=q_BHLD.device)
        return everything, everything
    block = spec.selection.block
    kept = selected(spec, q_BHLD, k_BGSD).index_select(2, torch.arange(q_len, device=q_BHLD.device) // block)
    of_block = torch.arange(kv_len, device=k_BGSD.device).unsqueeze(1) // block
    values = (of_block == torch.arange(kept.shape[3], device=k_BGSD.device)).to(torch.float32)
    whole = replace(spec.bare, selection=None, value_dim=kept.shape[3])
    v_BGSM = values.expand(*k_BGSD.shape[:2], -1, -1)
    mass_BHLM = Reference().lower(whole)(q_BHLD, k_BGSD, v_BGSM, bias=bias, mask=mask, sinks=sinks)
    return (mass_BHLM * kept).sum(3), mass_BHLM.sum(3)


def told(mass_H: Tensor, heads: Sequence[int], data: str) -> str:
    """ "91.2% attention recall on the example inputs, lowest in head 3: 80.0%" """
    least = int(mass_H.argmin())
    return f"{mass_H.mean():.1%} attention recall on {data}, lowest in head {heads[least]}: {mass_H[least]:.1%}"


def measured(
    gm: fx.GraphModule, specs: Mapping[fx.Node, AttentionSpec], batches: Sequence[Sequence[object]]
) -> dict[fx.Node, Tensor]:
    """For each canonical attention in ``gm``, the attention recall of every head [H], averaged over the sequences of
    the batches, which hold a value for each placeholder.
    """
    found: dict[fx.Node, list[Tensor]] = {node: [] for node in specs}
    placeholders = inputs_of(gm.graph)
    schedule = Schedule(gm.graph, {node: node.all_input_nodes for node in specs})
    for batch in batches:
        run = Forward(gm, dict(zip(placeholders, batch, strict=True)), schedule)
        for node in schedule.stops:
            run.up_to(node)
            t = operands_of(node).map(lambda _, operand: run(operand))  # noqa: B023
            with torch.no_grad():
                found[node].append(kept_mass(t.q, t.k, specs[node], bias=t.bias, mask=t.mask, sinks=t.sinks))
    return {node: torch.cat(masses).mean(0) for node, masses in found.items()}
