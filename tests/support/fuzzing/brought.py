"""Rewrites that read a tensor from outside of the attention: known, or an input of each call.

Each says what it means inside the harness's own attention, by changes of what ``Attention._attended`` reads and gives, or of
the weights at its normaliser.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from models import Attention, Spelling
from torch import Tensor

from attnopt import Input
from attnopt.ir.interfaces import Pass
from attnopt.passes import ExtendKeys, HeadPatch, MixMap, ScaleHeads, SegmentGain, Sparse, Steer, Transplant
from attnopt.patterns import Segments
from fuzzing.calls import Call

_DIFFERENT = (3, 4, 5, 2)  # numbers of tokens of a reference

Inside = Callable[[Attention, int, frozenset[int]], AbstractContextManager[None]]
Outputs = Callable[[Tensor, Tensor], Tensor]  # [B, L, H, Dv] and the values [B, S, G, Dv] -> [B, L, H, Dv]


@dataclass(frozen=True)
class Brought:
    """``around``: a context in which the attention's run of this number does what the pass says, for heads that are not pruned.
    ``weights``: or a change of the map, [..., L, S] with a sink's column last.  ``tensors``: what the call brings."""

    made: Pass
    around: Inside | None = None
    weights: Callable[[Tensor], Tensor] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Drawn:
    """What one rewrite draws, the same for any sizes; ``called``: as inputs of the call."""

    call: Call
    kind: str
    number: int
    dtype: torch.dtype

    @property
    def s(self) -> Spelling:
        return self.call.block.spelling

    @property
    def heads(self) -> list[int]:
        """Two of them or one, not in order."""
        n, count = self.number, self.s.heads
        return sorted({n % count, n // 4 % count}, reverse=True)

    @property
    def is_called(self) -> bool:
        with_keys = self.kind == "segments" and self.s.cross  # ids of keys are always an input
        return self.kind.startswith("call-") or with_keys or self.number % 2 == 0

    @property
    def one_for_all(self) -> bool:
        return self.number % 3 == 0

    @property
    def batch(self) -> int:
        return 1 if self.one_for_all or not self.is_called else self.call.batch

    def name(self, what: str) -> str:
        return "in_" + re.sub(r"\W", "_", f"{self.call.site}_{self.kind}_{what}")

    def numbers(self, what: str, *sizes: int) -> Tensor:
        seed = self.number + 31 * self.call.q_len + len(what)
        return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def option(self, what: str, known: Tensor) -> Any:
        return Input(self.name(what)) if self.is_called else known

    def tensors(self, **found: Tensor) -> dict[str, Tensor]:
        return {self.name(what): x for what, x in found.items()} if self.is_called else {}


def brought(
    call: Call, kind: str, number: int, dtype: torch.dtype, seen_by: Callable[[Tensor], bool]
) -> Brought | None:
    """What ``kind`` makes of this run; None where it is not tried.  ``seen_by``: whether every query keeps a key under a mask."""
    d, s = _Drawn(call, kind, number, dtype), call.block.spelling
    if s.windows:  # batches of windows are told by no input
        return None
    match kind:
        case "call-steer":
            return _steer(d)
        case "call-scale":
            return _scale(d)
        case "call-mix":
            return _mix(d)
        case "patch":
            return _patch(d)
        case "swap-map":
            return _swap_map(d)
        case "swap":
            return _swap(d)
        case "segments" if by_normaliser(s):
            return _segments(d, seen_by)
        case "call-gain" if by_normaliser(s):
            return _gain(d)
        case "extend" if _extends(s):
            return _extend(d)
    return None


def by_normaliser(s: Spelling) -> bool:
    return not s.exponentials and s.softmax not in ("log", "again")


def _extends(s: Spelling) -> bool:
    """The harness joins the scores of other tokens to those of its own, behind the masks of these."""
    is_told = s.core not in ("sdpa", "flex") and s.bias_kind != "addend"
    return is_told and not (s.rope or s.after) and s.returns in ("output", "heads")


# ---------------------------------------------------------------- of what heads give
def _steer(d: _Drawn) -> Brought:
    by_token = d.number % 4 == 3
    sizes = (d.call.q_len, d.s.value_dim) if by_token else (d.s.value_dim,)
    delta = d.numbers("delta", d.batch, len(d.heads), *sizes)
    tokens = (None, (0, -1))[d.number // 2 % 2]

    def change(o: Tensor, _: Tensor) -> Tensor:
        shifted = o + _of_heads(o, d.heads, delta if by_token else delta.unsqueeze(2))
        return shifted if tokens is None else _at(o, shifted, tokens)

    made = Steer(Input(d.name("delta")), d.heads, tokens)
    return Brought(made, _outputs(d.heads, change), tensors=d.tensors(delta=delta))


def _scale(d: _Drawn) -> Brought:
    gains = d.numbers("gains", d.batch, d.s.heads)

    def change(o: Tensor, _: Tensor) -> Tensor:
        return o * gains[:, None, :, None].to(o.dtype)

    made = ScaleHeads(Input(d.name("gains")))
    return Brought(made, _outputs(range(d.s.heads), change), tensors=d.tensors(gains=gains))


def _patch(d: _Drawn) -> Brought:
    by_token = d.is_called and d.number % 4 == 2
    sizes = (d.call.q_len, d.s.value_dim) if by_token else (d.s.value_dim,)
    values = d.numbers("values", d.batch, len(d.heads), *sizes)

    def change(o: Tensor, _: Tensor) -> Tensor:
        new = _of_heads(o, d.heads, values if by_token else values.unsqueeze(2))
        return torch.where(_chosen(o, d.heads), new, o)

    made = HeadPatch(d.heads, d.option("values", values[0]))
    return Brought(made, _outputs(d.heads, change), tensors=d.tensors(values=values))


def _mix(d: _Drawn) -> Brought:
    gate = (0.25, 1.0, 0.5)[d.number % 3]
    return _mapped(d, gate, lambda maps: MixMap(d.option("map", maps[0]), gate, d.heads))


def _swap_map(d: _Drawn) -> Brought:
    tokens = (None, (0, -1))[d.number // 2 % 2]
    return _mapped(d, 1.0, lambda maps: Transplant(map=d.option("map", maps), heads=d.heads, tokens=tokens), tokens)


def _mapped(d: _Drawn, gate: float, make: Callable[[Tensor], Pass], tokens: tuple[int, ...] | None = None) -> Brought:
    maps = d.numbers("map", d.batch, len(d.heads), d.call.q_len, d.call.kv_len)

    def change(o: Tensor, v: Tensor) -> Tensor:
        own = v[:, :, list(d.s.kv_of_head)].transpose(1, 2)[:, d.heads]
        mixed = _of_heads(o, d.heads, maps.to(o.dtype) @ own)
        new = torch.where(_chosen(o, d.heads), (1 - gate) * o + gate * mixed, o)
        return new if tokens is None else _at(o, new, tokens)

    return Brought(make(maps), _outputs(d.heads, change), tensors=d.tensors(map=maps))


def _of_heads(o: Tensor, heads: list[int], values: Tensor) -> Tensor:
    """[B or 1, heads, L or 1, Dv] as [B, L, H, Dv], zeros elsewhere."""
    made = torch.zeros_like(o)
    made[:, :, heads] = values.to(o.dtype).transpose(1, 2).expand(o.shape[0], o.shape[1], -1, -1)
    return made


def _chosen(o: Tensor, heads: list[int]) -> Tensor:
    found = torch.zeros(o.shape[2], 1, dtype=torch.bool)
    found[heads] = True
    return found


def _at(o: Tensor, new: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """``new`` in these rows, ``o`` in the others."""
    rows = torch.zeros(o.shape[1], dtype=torch.bool)
    rows[[t for t in tokens if -o.shape[1] <= t < o.shape[1]]] = True
    return torch.where(rows[:, None, None], new, o)


def _outputs(heads: Iterable[int], change: Outputs) -> Inside:
    """Pruned heads stay as they are, whatever comes later."""

    @contextmanager
    def around(model: Attention, time: int, pruned: frozenset[int]) -> Iterator[None]:
        own, seen = model._attended, [0]

        def attended(q: Tensor, k: Tensor, v: Tensor, *masks: Any) -> tuple[Tensor, Tensor | None]:
            seen[0] += 1
            out, weights = own(q, k, v, *masks)
            if seen[0] == time:
                out = torch.where(_chosen(out, sorted(set(heads) - pruned)), change(out, v), out)
            return out, weights

        with mock.patch.object(model, "_attended", attended), torch.no_grad():
            yield

    return around


# ---------------------------------------------------------------- of queries and keys
def _swap(d: _Drawn) -> Brought:
    """Queries, and keys where each head has its own."""
    s, roles = d.s, ("q", "k") if d.s.kv_heads == d.s.heads and d.number % 3 else ("q",)
    tokens = (None, (0, -1))[d.number // 2 % 2] if roles == ("q",) else None
    sizes = {"q": d.call.q_len, "k": d.call.kv_len}
    given = {r: d.numbers(r, d.batch, len(d.heads), sizes[r], s.head_dim) for r in roles}

    def swapped(model: Attention, role: str, x: Tensor) -> Tensor:
        if role not in given:
            return x
        new = _of_heads(x, d.heads, given[role])
        if role == "q" and s.scale in ("temperature", "over"):  # a factor of each head counts among its queries
            of_heads = model.temperature.flatten()[:, None]
            new = new / of_heads if s.scale == "temperature" else new * of_heads
        found = torch.where(_chosen(x, d.heads), new, x)
        return found if tokens is None else _at(x, found, tokens)

    @contextmanager
    def around(model: Attention, time: int, _: frozenset[int]) -> Iterator[None]:
        own, seen = model._attended, [0]

        def attended(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor | None]:
            seen[0] += 1
            return (
                own(swapped(model, "q", q), swapped(model, "k", k), *others) if seen[0] == time else own(q, k, *others)
            )

        with mock.patch.object(model, "_attended", attended), torch.no_grad():
            yield

    made = Transplant(**{r: d.option(r, x) for r, x in given.items()}, heads=d.heads, tokens=tokens)
    return Brought(made, around, tensors=d.tensors(**given))


# ---------------------------------------------------------------- of keys
def _extend(d: _Drawn) -> Brought:
    s, M = d.s, _DIFFERENT[(d.number + d.call.q_len) % 4 if d.is_called else d.number % 4]
    is_masked, weight = d.number % 3 == 1, (1.0, 2.5)[d.number // 2 % 2]
    reference = d.numbers("reference", d.batch, M, s.width)
    seen = torch.arange(M).expand(d.batch, -1) != d.number % M

    def joined(model: Attention, scores: Tensor, padding: Tensor | None, given: Tensor | None, _: None) -> Tensor:
        """Of a product [B, H, L, S + M]: masks and biases are for the S alone."""
        own, other = scores.split([d.call.kv_len, M], -1)
        conditioned = type(model)._conditioned
        left = conditioned(model, own, padding, given)
        with mock.patch.object(model, "_masked", lambda x, *_: x), mock.patch.object(model, "_biased", lambda x, _: x):
            right = conditioned(model, other, None, None) + torch.tensor(weight).log()
        if is_masked:
            right = right.masked_fill(~seen[:, None, None], -torch.inf)
        only = torch.zeros(s.heads, dtype=torch.bool)
        only[d.heads] = True
        right = right.masked_fill(~only[:, None, None], -torch.inf)
        return torch.cat([left, right.to(left.dtype)], -1)

    @contextmanager
    def around(model: Attention, time: int, _: frozenset[int]) -> Iterator[None]:
        own, count = model._attended, [0]

        def attended(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor | None]:
            count[0] += 1
            if count[0] != time:
                return own(q, k, v, *others)
            B = k.shape[0]
            features = reference.to(k.dtype).expand(B, -1, -1)
            found = model._heads(features, features)
            more = model._normed(found["k"], "k") * s.head_dim ** {"k": -0.5, "both": -0.25}.get(s.scale, 0.0)
            change = mock.patch.object(model, "_conditioned", lambda *a: joined(model, *a))
            with change:
                return own(q, torch.cat([k, more], 1), torch.cat([v, found["v"]], 1), *others)

        with mock.patch.object(model, "_attended", attended), torch.no_grad():
            yield

    mask = None if not is_masked else d.option("seen", seen[0])
    made = ExtendKeys(d.option("reference", reference[0]), weight, d.heads, mask)
    given = {"reference": reference, **({"seen": seen} if is_masked else {})}
    return Brought(made, around, tensors=d.tensors(**given))


# ---------------------------------------------------------------- of the map
def _ids(d: _Drawn) -> dict[str, Tensor]:
    """Of tokens, or of queries and keys, [B or 1, length]."""
    r = torch.Generator().manual_seed(d.number + 31 * d.call.q_len)
    found = {"ids": torch.randint(0, 3, (d.batch, d.call.q_len), generator=r)}
    if d.s.cross:
        found["words"] = torch.randint(0, 3, (d.batch, d.call.kv_len), generator=r)
    return found


def _named(d: _Drawn, ids: Mapping[str, Tensor]) -> dict[str, Any]:
    options = {"ids": "ids", "words": "keys"}
    return {options[what]: Input(d.name(what)) if d.is_called else x[0].tolist() for what, x in ids.items()}


def _pairs_seen(d: _Drawn, ids: Mapping[str, Tensor], pairs: list[tuple[int | None, int]] | None) -> Tensor:
    """[B or 1, 1, L, S], pair by pair."""
    queries, keys = ids["ids"][:, None, :, None], ids.get("words", ids["ids"])[:, None, None, :]
    if pairs is None:
        return queries == keys
    found = torch.zeros(torch.broadcast_shapes(queries.shape, keys.shape), dtype=torch.bool)
    for a, b in pairs:
        found |= (keys == b) if a is None else (queries == a) & (keys == b)
    return found


def _segments(d: _Drawn, seen_by: Callable[[Tensor], bool]) -> Brought:
    pairs: list[tuple[int | None, int]] | None = [None, [(None, 0), (1, 1), (2, 1)]][d.number // 2 % 2]
    ids = _ids(d)
    if not seen_by(_pairs_seen(d, ids, pairs)):
        ids = {what: torch.zeros_like(x) for what, x in ids.items()}  # one segment: every query sees what it saw
    visible = _pairs_seen(d, ids, pairs)

    def change(p: Tensor) -> Tensor:
        kept = torch.where(_like(visible, True, p), _by_batch(d, p), 0.0)
        return (kept / kept.sum(-1, keepdim=True)).nan_to_num(0.0).reshape(p.shape)

    return Brought(Sparse(Segments(**_named(d, ids), pairs=pairs)), weights=change, tensors=d.tensors(**ids))


def _gain(d: _Drawn) -> Brought:
    gain, how = (0.25, 0.5, 0.125)[d.number // 2 % 3], ("logits", "none", "redistribute")[d.number % 3]
    ids = _ids(d)
    named = _named(d, ids)
    inside, receives = (_pairs_seen(d, ids, [(None, i)]) for i in (1, 2))

    def change(p: Tensor) -> Tensor:
        weights = _by_batch(d, p)
        here, there = _like(inside, False, p), _like(receives, False, p)
        scaled = torch.where(here, gain * weights, weights)
        if how == "redistribute":
            freed = torch.where(here, (1 - gain) * weights, 0.0).sum(-1, keepdim=True)
            held = torch.where(there, weights, 0.0).sum(-1, keepdim=True)
            scaled = torch.where(held > 0, torch.where(there, weights + freed * (weights / held), scaled), weights)
        if how == "logits":
            scaled = (scaled / scaled.sum(-1, keepdim=True)).nan_to_num(0.0)
        return scaled.reshape(p.shape)

    to = {"to": Segments(**named, pairs=[(None, 2)])} if how == "redistribute" else {}
    made = SegmentGain(Segments(**named, pairs=[(None, 1)]), gain, normalise=how, **to)  # type: ignore[arg-type]
    return Brought(made, weights=change, tensors=d.tensors(**ids))


def _by_batch(d: _Drawn, p: Tensor) -> Tensor:
    """[..., L, S] as [B, H, L, S]."""
    return p.reshape(d.call.batch, -1, *p.shape[-2:])


def _like(mask: Tensor, value: bool, p: Tensor) -> Tensor:
    """With the columns of ``p`` that are no keys of the segments: a sink's, or of other tokens."""
    return torch.nn.functional.pad(mask, (0, p.shape[-1] - mask.shape[-1]), value=value)
