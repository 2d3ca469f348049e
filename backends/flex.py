"""``attnopt::attention`` by torch's FlexAttention (arXiv:2412.05496), for GPUs: compiled and differentiable."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from attnopt.ir.operands import OperandTensors, selected_pairs
from attnopt.ir.semantics import heads_of
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Pattern
from attnopt.patterns.block_layout import Layout

TILE = 128  # FlexAttention's own


def attend(spec: AttentionSpec, t: OperandTensors) -> Tensor:
    """``spec`` without its edits."""
    return attend_with_lse(spec, t)[0]


def attend_with_lse(spec: AttentionSpec, t: OperandTensors) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and the log-sum-exp of each row as in ``AttendWithLse``."""
    H, L, S = t.q.shape[1], t.q.shape[2], t.k.shape[2]
    blocks = _block_mask(spec.pattern, H, L, S, t.q.device)
    hidden = [_operand(x) for x in (t.mask,) if x is not None]
    if t.selected is not None:
        hidden.append(_operand(selected_pairs(t.selected, L, S)))
    if hidden:
        blocks = _narrowed(blocks, hidden)
    o, aux = _flex(t.q.device.type)(
        t.q,
        heads_of(spec, t.k),
        heads_of(spec, t.v),
        score_mod=_score_mod(spec.softcap, t.bias),
        block_mask=blocks,
        scale=spec.scale,
        return_aux=AuxRequest(lse=True),
    )
    out: Tensor = o
    lse: Tensor = aux.lse
    if t.sinks is not None:
        sinks = t.sinks.to(lse.dtype).squeeze(-1).expand_as(lse)
        out, lse = out * torch.sigmoid(lse - sinks).unsqueeze(-1).to(out.dtype), torch.logaddexp(lse, sinks)
    top = lse.detach()  # FlexAttention gives the sum alone
    return out, top, (lse - top).nan_to_num(0.0)


@lru_cache
def _flex(device_type: str) -> Callable[..., Any]:
    """Compiled on a GPU.  Elsewhere eager, which computes all pairs and is only useful for testing."""
    plain: Callable[..., Any] = flex_attention
    return torch.compile(plain, dynamic=False) if device_type == "cuda" else plain


def _score_mod(softcap: float | None, bias: Tensor | None) -> Callable[..., Tensor] | None:
    if softcap is None and bias is None:
        return None
    added = None if bias is None else _operand(bias)

    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if added is None else score + added(b, h, i, j)

    return modified


def _operand(t: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Reads [B|1, H|1, L|1, S|1] at an index of the full size."""
    wide = [size != 1 for size in t.shape]

    def read(*place: Tensor) -> Tensor:
        return t[tuple(p if is_wide else p * 0 for p, is_wide in zip(place, wide, strict=True))]

    return read


def _narrowed(blocks: BlockMask, seen: list[Callable[..., Tensor]]) -> BlockMask:
    """The same blocks under further conditions, none of them treated as fully visible."""
    before = blocks.mask_mod

    def narrower(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found: Tensor = before(b, h, i, j)
        for more in seen:
            found = found & more(b, h, i, j)
        return found

    counts, indices = blocks.kv_num_blocks, blocks.kv_indices
    full_counts, full_indices = blocks.full_kv_num_blocks, blocks.full_kv_indices
    assert full_counts is not None
    assert full_indices is not None
    width = indices.shape[-1]
    place = torch.arange(width, device=indices.device)
    both = torch.cat([indices, full_indices], -1)
    is_kept = torch.cat([place < counts.unsqueeze(-1), place < full_counts.unsqueeze(-1)], -1)
    order = torch.argsort((~is_kept).to(torch.int8), dim=-1, stable=True)[..., :width]
    return BlockMask.from_kv_blocks(
        counts + full_counts,
        both.gather(-1, order).contiguous(),
        BLOCK_SIZE=TILE,
        mask_mod=narrower,
        seq_lengths=blocks.seq_lengths,
    )


@lru_cache(maxsize=16)
def _block_mask(pattern: Pattern, heads: int, q_len: int, kv_len: int, device: torch.device) -> BlockMask:
    """From the layout; a partly visible block is looked up in a table of the distinct ones."""
    of_head = [pattern.for_head(h) for h in range(heads)] if pattern.is_per_head else [pattern]
    layouts = [p.layout(q_len, kv_len, TILE, TILE) for p in of_head]
    partial = [_columns(x, x.tile >= 0) for x in layouts]
    full = [_columns(x, x.tile < 0) for x in layouts]
    tiles, table = _tables(layouts)
    seen, tile_at = torch.from_numpy(tiles).to(device), torch.from_numpy(table).to(device)
    is_per_head = len(layouts) > 1

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen[tile_at[h if is_per_head else h * 0, i // TILE, j // TILE], i % TILE, j % TILE]

    def stacked(parts: list[NDArray[np.int32]]) -> Tensor:
        return torch.from_numpy(np.stack(parts)).unsqueeze(0).to(device)

    return BlockMask.from_kv_blocks(
        stacked([counts for counts, _ in partial]),
        stacked([columns for _, columns in partial]),
        stacked([counts for counts, _ in full]),
        stacked([columns for _, columns in full]),
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(q_len, kv_len),
    )


def _columns(layout: Layout, chosen: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How many of the chosen entries each block row has, and their columns [rows, cols], those first."""
    rows = layout.rows[chosen]
    counts = np.bincount(rows, minlength=layout.num_rows)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    columns = np.zeros((layout.num_rows, layout.num_cols), np.int32)
    columns[rows, places] = layout.cols[chosen]
    return counts.astype(np.int32), columns


def _tables(layouts: list[Layout]) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """Distinct tiles, the first with nothing and the second with everything visible, and the tile of each block."""
    tiles = [np.zeros((1, TILE, TILE), np.bool_), np.ones((1, TILE, TILE), np.bool_)]
    table = np.zeros((len(layouts), layouts[0].num_rows, layouts[0].num_cols), np.int32)
    first = 2
    for n, layout in enumerate(layouts):
        table[n, layout.rows, layout.cols] = np.where(layout.tile < 0, 1, layout.tile + first)
        tiles.append(layout.tiles)
        first += len(layout.tiles)
    return np.concatenate(tiles), table
