"""What the rewrites of a case mean, said to the optimizer as passes and to the oracle as edits of the user's model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import oracle
import torch
from models import MAX, Attention, Spelling, places
from steering import steered
from torch import Tensor, nn

from attnopt.ir.interfaces import Pass
from attnopt.passes import (
    AddValues,
    GroupedQuery,
    LocalWindow,
    MixMap,
    PoolKeys,
    PruneHeads,
    QueryRows,
    Replace,
    ScaleHeads,
    SegmentGain,
    Sparse,
    Steer,
)  # fmt: skip
from attnopt.patterns import Blocks, Causal, Pattern, PerHead, Sinks, Strided, Window
from fuzzing.brought import Inside, brought, by_normaliser
from fuzzing.calls import Call
from fuzzing.grammar import CALLED, Case
from fuzzing.modules import group_target, padding_of
from fuzzing.planted import Planted
from fuzzing.row_order import Shuffled

PATTERNS: tuple[Pattern, ...] = (
    Window(1, 0), Causal(), Sinks(1) | Window(1), Strided(2), Window(2, 1) & Strided(2) | Sinks(2),
    Blocks(2, 1, edge="shift"), Blocks(3, 1), Causal() & Blocks(3), Blocks(2, 0, 1, "shift"), Sinks(1) | Blocks(2, 2),
)  # fmt: skip


PADDED: tuple[tuple[Pattern, Callable[[Tensor], Tensor], int], ...] = (  # with the first key of a query, and how many there are
    (Blocks(2, 1), lambda i: i // 2 * 2 - 1, 4), (Blocks(3, 4), lambda i: i // 3 * 3 - 4, 11),
    (Window(1, 2), lambda i: i - 1, 4), (Blocks(4), lambda i: i // 4 * 4, 4), (Window(0, 9), lambda i: i, 10),
)  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """The passes at one site, and by pass what each means: a mask, gains, a change of its map, what is added to heads' outputs at
    some queries, or to their maps where ``raised`` shows it, groups of K/V heads that become one, or [H, S, S] weights
    of the keys whose mean takes the place of a key, or zero keys [L, P], or a context of the run.  ``tensors``: what the
    call brings."""

    call: Call
    passes: tuple[Pass, ...]
    visible: Mapping[str, Tensor]
    gains: Mapping[str, Mapping[int, float]]
    maps: Mapping[str, Callable[[Tensor], Tensor]]
    shift: Mapping[int, Tensor]
    queries: tuple[int, ...] | None
    raised: tuple[tuple[float, ...], Tensor] | None
    merged: int = 0
    pools: Tensor | None = None
    zeros: Tensor | None = None
    inside: Mapping[str, Inside] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def edit_of(
    case: Case, call: Call, attention: Attention, given: Mapping[str, Tensor], only_called: bool = False
) -> Edit | None:
    """What the block's rewrite makes of this run, or None where nothing is to be tried.  ``only_called``: the part of it that
    reads what the call brings."""
    block, s, n = call.block, call.block.spelling, call.block.number
    passes, visible, gains = list[Pass](), dict[str, Tensor](), dict[str, Mapping[int, float]]()
    merged, pools, zeros = 0, None, None
    maps = dict[str, Callable[[Tensor], Tensor]]()
    shift, queries, raised = dict[int, Tensor](), None, None
    inside, tensors = dict[str, Inside](), dict[str, Tensor]()
    for kind in block.rewrite.split("+"):
        if kind in CALLED:
            found = brought(
                call, kind, n, getattr(torch, case.dtype), lambda m: _leaves_keys(call, attention, m, given)
            )
            if found is None or (only_called and not found.tensors):
                continue
            passes.append(found.made)
            tensors.update(found.tensors)
            if found.around is not None:
                inside[found.made.name] = found.around
            if found.weights is not None:
                maps[found.made.name] = found.weights
        elif only_called:
            continue
        elif kind == "window":
            left, right, sinks = n % 4, n // 4 % 3, n // 12
            step = torch.arange(call.kv_len)[None, :] - torch.arange(call.q_len)[:, None]
            mask = (step >= -left) & (step <= right) | (torch.arange(call.kv_len) < sinks)
            if not _leaves_keys(call, attention, mask, given):
                left = right = 100
                mask = torch.ones_like(mask)
            passes.append(LocalWindow(left, right, sinks))
            visible[passes[-1].name] = mask
        elif kind == "sparse":
            pattern = PATTERNS[n % len(PATTERNS)]
            mask = pattern.mask(call.q_len, call.kv_len)[0]
            if not _leaves_keys(call, attention, mask, given):
                pattern, mask = Window(100), torch.ones_like(mask)
            if n % 2:
                only = n % s.heads
                alone = torch.ones(s.heads, *mask.shape, dtype=torch.bool)
                alone[only] = mask
                pattern, mask = PerHead({only: pattern}), alone
            passes.append(Sparse(pattern))
            visible[passes[-1].name] = mask
        elif (
            kind == "pad" and by_normaliser(s) and s.softmax != "shifted"
        ):  # what is subtracted from all scores is not told
            pattern, first, width = PADDED[n % len(PADDED)]
            far = torch.arange(-width, call.kv_len + width)
            start = first(torch.arange(call.q_len))[:, None]
            seen, is_key = (far >= start) & (far < start + width), (far >= 0) & (far < call.kv_len)
            if _leaves_keys(call, attention, seen[:, is_key], given):
                passes.append(Sparse(pattern, zero_pad=True))
                visible[passes[-1].name], zeros = seen[:, is_key], seen[:, ~is_key]
        elif kind == "prune" and s.heads > 1 and _gains_can_be_told(case, s):
            heads = sorted({n % s.heads, n // 4 % s.heads})[: s.heads - 1]
            passes.append(PruneHeads(heads=heads, compensate="none"))
            gains[passes[-1].name] = dict.fromkeys(heads, 0.0)
        elif kind == "scale" and _gains_can_be_told(case, s):
            given_gains = {h: (0.0, 0.5, 2.0, -1.0)[(n + h) % 4] for h in range(s.heads) if (n + h) % 3}
            if given_gains:
                passes.append(ScaleHeads(given_gains))
                gains[passes[-1].name] = given_gains
        elif kind == "segment" and by_normaliser(s):
            passes.append(_segment_gain(n, call.kv_len))
            maps[passes[-1].name] = _map_of(n, call.kv_len, has_sink=s.sinks)
        elif kind == "mix" and by_normaliser(s) and not s.after:  # a second mask would hide what was mixed in
            mixed = torch.randn(call.q_len, call.kv_len, generator=torch.Generator().manual_seed(n))
            gate = (0.25, 1.0, 0.5, 0.0)[n % 4]
            passes.append(MixMap(mixed, gate))
            maps[passes[-1].name] = partial(_mixed, gate, mixed)
        elif kind == "convolve" and by_normaliser(s) and not s.after:
            planted = Planted((1, 3, 5, 7)[n % 4], seed=n)
            passes.insert(0, Replace(planted))
            maps[passes[0].name] = partial(_in_its_place, planted.map(call.kv_len, _is_causal(attention)))
        elif kind == "rows" and by_normaliser(s) and not s.mask:  # padding is never chosen
            keep, prefix = n % 5 + 1, n % 2
            passes.append(QueryRows(Shuffled(n), keep, prefix))
            place = torch.arange(call.q_len)
            rank = Shuffled(n).of(place).masked_fill(place < prefix, torch.inf)
            chosen = rank.sort(descending=True, stable=True).indices[: keep + prefix]
            maps[passes[-1].name] = partial(_rows_alone, torch.isin(place, chosen))
        elif kind == "group" and s.kv_heads > 1 and s.norm != "across" and not case.reuse:
            merged = group_target(block)
            passes.append(GroupedQuery(kv_heads=merged, merge="mean", compensate="none"))
        elif kind == "pool" and _pools_can_be_told(s):
            sizes = [r for r in range(1, call.kv_len + 1) if call.kv_len % r == 0]
            size, heads = sizes[-1 - n % len(sizes)], sorted({n % s.heads, n // 4 % s.heads})
            passes.append(PoolKeys(size, heads=heads))
            pools = torch.eye(call.kv_len).repeat(s.heads, 1, 1)
            pools[heads] = torch.block_diag(*[torch.full((size, size), 1 / size)] * (call.kv_len // size))
        elif kind == "steer":
            queries = (None, (0,), (-1,), (0, -1))[n % 4]
            numbers = torch.randn(s.heads, s.value_dim, generator=torch.Generator().manual_seed(n))
            shift = {h: numbers[h] for h in sorted({n % s.heads, n // 4 % s.heads}, reverse=True)}
            passes.append(Steer(torch.stack([*shift.values()]), [*shift], queries))
        elif kind == "add" and by_normaliser(s):
            keys, heads = (
                ((0,), (-1,), (0, -1), (call.kv_len // 2, -call.kv_len))[n % 4],
                sorted({n % s.heads, n // 4 % s.heads}),
            )
            passes.append(AddValues(keys, 0.5, heads, hidden_below=-1e4))
            raised = tuple(0.5 * (h in heads) for h in range(s.heads)), _shown(call, attention, keys, given)
    return (
        Edit(call, tuple(passes), visible, gains, maps, shift, queries, raised, merged, pools, zeros, inside, tensors)
        if passes
        else None
    )


def _pools_can_be_told(s: Spelling) -> bool:
    """The oracle averages the scores of a query, which have to be linear in the keys where they meet the normaliser.  Other masks
    are refused."""
    is_linear = s.softcap is None and not s.bias_kind and not {"window", "far", "chunk"} & set(s.mask)
    return by_normaliser(s) and is_linear and s.core != "transposed"


def _segment_gain(n: int, kv_len: int) -> SegmentGain:
    segment, to = _segment(n, kv_len)
    gain, how = (0.25, 0.0, 0.5, 1.0)[n // 3 % 4], ("logits", "none", "redistribute")[n % 3]
    if how == "redistribute":
        return SegmentGain(segment, gain, normalise="redistribute", to=to)
    return SegmentGain(segment, gain * 3 or 0.125, normalise=how)  # type: ignore[arg-type]


def _segment(n: int, kv_len: int) -> tuple[list[int], list[int]]:
    """Some keys, never all of them, and those that receive."""
    first = n % kv_len
    segment = sorted({first, (first + n // 5) % kv_len})[: max(1, kv_len - 1)]
    return segment, [j for j in range(kv_len) if j % 3 != 1]


def _map_of(n: int, kv_len: int, has_sink: bool) -> Callable[[Tensor], Tensor]:
    """What the gain makes of weights [..., L, S], a sink's column last."""
    segment, to = _segment(n, kv_len)
    gain, how = (0.25, 0.0, 0.5, 1.0)[n // 3 % 4], ("logits", "none", "redistribute")[n % 3]
    inside = torch.tensor([j in segment for j in range(kv_len)] + [False] * has_sink)
    receives = torch.tensor([j in to and j not in segment for j in range(kv_len)] + [False] * has_sink)

    def change(p: Tensor) -> Tensor:
        if how == "redistribute":
            freed = torch.where(inside, (1 - gain) * p, 0.0).sum(-1, keepdim=True)
            held = torch.where(receives, p, 0.0).sum(-1, keepdim=True)
            moved = torch.where(receives, p + freed * (p / held), torch.where(inside, gain * p, p))
            return torch.where(held > 0, moved, p)
        scaled = torch.where(inside, (gain * 3 or 0.125) * p, p)
        return scaled if how == "none" else scaled / scaled.sum(-1, keepdim=True)

    return change


def _mixed(gate: float, mixed: Tensor, p: Tensor) -> Tensor:
    """Weights [..., L, S], a sink's column last, with a map mixed into them."""
    sinks = p.shape[-1] - mixed.shape[-1]
    return (1 - gate) * p + gate * nn.functional.pad(mixed, (0, sinks)).to(p.dtype)


def _is_causal(attention: Attention) -> bool:
    kinds = [kind for kind in attention.s.mask if kind not in ("given", "padding", "float-padding")]
    seen = torch.ones(MAX, MAX, dtype=torch.bool)
    for kind in kinds:
        seen = seen & attention._visible(kind, MAX, MAX, None)
    return not bool(seen.triu(1).any())


def _in_its_place(own: Tensor, p: Tensor) -> Tensor:
    """A map [L, S] in the place of weights [..., L, S], a sink's column last; keys that no query sees give nothing."""
    there = (p != 0).any(-2, keepdim=True)
    return (nn.functional.pad(own, (0, p.shape[-1] - own.shape[-1])) * there).to(p.dtype)


def _rows_alone(chosen: Tensor, p: Tensor) -> Tensor:
    """Weights [..., L, S] of these rows, and zeros."""
    return p * chosen.unsqueeze(-1).to(p.dtype)


def _gains_can_be_told(case: Case, s: Spelling) -> bool:
    """To the normaliser itself, or by way of the output projection of an attention that runs once, with weights of its own."""
    return by_normaliser(s) or (s.out and not case.reuse and s.returns == "output")


def _shown(call: Call, attention: Attention, keys: tuple[int, ...], given: Mapping[str, Tensor]) -> Tensor:
    """Bool [L, S] or [B, 1, L, S]: these keys, for the queries that the model lets see them."""
    shown = torch.zeros(call.q_len, call.kv_len, dtype=torch.bool)
    shown[:, list(keys)] = True
    for kind in (kind for kind in attention.s.mask if kind != "given"):
        shown = shown & attention._visible(kind, call.q_len, call.kv_len, padding_of(call.block, given))
    return shown


def _leaves_keys(call: Call, attention: Attention, visible: Tensor, given: Mapping[str, Tensor]) -> bool:
    """A query that sees nothing gets zeros from attnopt and NaN, or the mean of hidden keys, from the model."""
    for kind in attention.s.mask:
        if kind != "given":
            visible = visible & attention._visible(kind, call.q_len, call.kv_len, padding_of(call.block, given))
    return bool(visible.any(-1).all())


def meant(
    model: nn.Module, given: Mapping[str, Tensor], edits: Mapping[str, Edit], refused: Mapping[str, set[str]]
) -> list[Tensor]:
    """What the user's model gives with these edits, less the passes that refused at their sites."""
    model = copy.deepcopy(model)
    told: dict[int, oracle.Edit] = {}
    shifts = ExitStack()
    for site, edit in edits.items():
        kept = [p.name for p in edit.passes if p.name not in refused[site]]
        masks = [edit.visible[name] for name in kept if name in edit.visible]
        gains = {h: g for name in kept for h, g in edit.gains.get(name, {}).items()}
        s, attention = edit.call.block.spelling, model.get_submodule(edit.call.path)
        assert isinstance(attention, Attention)
        if edit.merged and "grouped-query" in kept:
            _average(attention, edit.merged)
        if edit.shift and "steer" in kept:
            later = gains if by_normaliser(s) else {}  # those of the output projection scale what reaches it
            by = {h: delta * later.get(h, 1.0) for h, delta in edit.shift.items()}
            shifts.enter_context(steered(attention, by, edit.queries, edit.call.time))
        pruned = frozenset(edit.gains["prune-heads"]) if "prune-heads" in kept else frozenset()
        for name in (name for name in kept if name in edit.inside):
            shifts.enter_context(edit.inside[name](attention, edit.call.time, pruned))
        if gains and not by_normaliser(s):
            attention.load_state_dict(attention.with_gains(gains).state_dict())
            gains = {}
        change = next((edit.maps[name] for name in kept if name in edit.maps), None)
        factors = tuple(gains.get(h, 1.0) for h in range(s.heads)) if gains else None
        pools = edit.pools if "pool-keys" in kept else None
        zeros = edit.zeros if "sparse" in kept else None
        alphas, shown = edit.raised if edit.raised is not None and "add-values" in kept else (None, None)
        if shown is not None and masks:
            shown = shown & masks[0]
        told[edit.call.normaliser] = oracle.Edit(
            masks[0] if masks else None, factors, raised=alphas, shown=shown, weights=change, pools=pools, zeros=zeros
        )
    with shifts:
        return oracle.run_edited(model, (), given, told, exponentials=True)


def _average(attention: Attention, groups: int) -> None:
    """K/V heads replaced by the mean of their group."""
    s = attention.s
    found = places(s)
    for role in "kv":
        rows = found[role].view(groups, s.kv_heads // groups, -1)
        for parameter in attention.stored(role):
            by_row = _rows_first(parameter, s.op)
            mean = by_row[rows].mean(1, keepdim=True).expand(-1, rows.shape[1], *(-1 for _ in by_row.shape[1:]), -1)
            by_row[rows] = mean.reshape(*rows.shape, *by_row.shape[1:])


def _rows_first(parameter: Tensor, op: str) -> Tensor:
    """A view whose first axis is the projection's output features."""
    data = parameter.data
    if op == "einsum":
        return data.view(-1, *data.shape[2:])
    return data.mT if op == "addmm" and data.dim() == 2 else data
