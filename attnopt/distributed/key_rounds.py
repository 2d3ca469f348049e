"""Keys and values on their way: each round of an attention that several ranks share, and the gradients that go back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.base.intervals import Ranges, merged
from attnopt.distributed.ranks import Exchange, Ranks
from attnopt.distributed.rounds import Rounds
from attnopt.distributed.shards import Shards
from attnopt.patterns.algebra import FULL, Pattern
from attnopt.patterns.part import Part, count


@dataclass(frozen=True, eq=False)
class Attention:
    """What an attention computes, and how its ranks share it.  ``site``: its name; ``with_lse``: its results over other keys are
    merged with this one's."""

    site: str
    pattern: Pattern
    kv_of_head: tuple[int, ...]
    scale: float
    softcap: float | None
    rounds: Rounds
    ranks: Ranks
    with_lse: bool = False

    @property
    def shards(self) -> Shards:
        return self.rounds.shards

    def seen(self, keys: Ranges) -> Pattern:
        """What the own queries see of these keys."""
        if self.pattern == FULL:
            return FULL
        return Part(self.pattern, self.shards.positions[self.ranks.rank], keys, self.shards.length)


@dataclass(frozen=True, eq=False)
class OwnOperands:
    """Of one rank: q [B, H, l, D], k [B, G, l, D], v [B, G, l, Dv] of its own tokens; bias and mask [B|1, H|1, l|1, S|1] and
    segments of the keys [B|1, S] of all S keys; segments of the queries [B|1, l]; sinks [B|1, H|1, l|1, 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None
    q_segments: Tensor | None = None
    kv_segments: Tensor | None = None
    pairs: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """The keys of one round, at the positions ``keys``, in their order, from the ranks of ``sources``."""

    sources: Mapping[int, Ranges]
    keys: Ranges
    k: Tensor
    v: Tensor


def rounds(attention: Attention, t: OwnOperands) -> Iterator[Step]:
    """The rounds of this rank; the next keys travel while those of a round are used."""
    following = _send(attention, t, 0)
    for number in range(attention.rounds.count):
        arriving = following
        if number + 1 < attention.rounds.count:
            following = _send(attention, t, number + 1)
        yield _joined(attention, t, number, arriving.wait())


def _send(attention: Attention, t: OwnOperands, number: int) -> Exchange:
    rounds, ranks = attention.rounds, attention.ranks
    kind = torch.promote_types(t.k.dtype, t.v.dtype)
    sent = {
        other: torch.cat([chosen(x.to(kind), 2, rounds.shards.places(ranks.rank, tokens)) for x in (t.k, t.v)], -1)
        for other, tokens in rounds.sent(number, ranks.rank).items()
    }
    B, G, _, width = t.k.shape
    heard = {
        source: t.k.new_empty(B, G, count(tokens), width + t.v.shape[3], dtype=kind)
        for source, tokens in rounds.sources(number, ranks.rank).items()
        if source != ranks.rank
    }
    return ranks.exchange(sent, heard, attention.site)


def _joined(attention: Attention, t: OwnOperands, number: int, arrived: Mapping[int, Tensor]) -> Step:
    """The keys of a round in the order of their positions."""
    rank, width = attention.ranks.rank, t.k.shape[3]
    sources = attention.rounds.sources(number, rank)
    pieces: list[tuple[int, Tensor, Tensor]] = []
    for source, tokens in sources.items():
        own = source == rank
        before = 0
        for start, stop in tokens:
            if own:
                ((a, b),) = attention.shards.places(rank, ((start, stop),))
                pieces.append((start, t.k[:, :, a:b], t.v[:, :, a:b]))
                continue
            part = arrived[source][:, :, before : before + stop - start]
            pieces.append((start, part[..., :width].to(t.k.dtype), part[..., width:].to(t.v.dtype)))
            before += stop - start
    pieces.sort(key=lambda piece: piece[0])
    keys = merged(run for tokens in sources.values() for run in tokens)
    if len(pieces) == 1:
        return Step(sources, keys, pieces[0][1], pieces[0][2])
    if not pieces:
        return Step(sources, keys, t.k[:, :, :0], t.v[:, :, :0])
    return Step(sources, keys, torch.cat([k for _, k, _ in pieces], 2), torch.cat([v for _, _, v in pieces], 2))


def returned(
    attention: Attention, number: int, step: Step, kv: tuple[Tensor, Tensor]
) -> Iterator[tuple[Ranges, Tensor]]:
    """Send the gradients of keys back to where these come from; what all ranks have for the own keys, and their places."""
    ranks, both = attention.ranks, torch.cat([x.to(torch.promote_types(x.dtype, torch.float32)) for x in kv], -1)
    of_source = {source: _tokens_of(both, step.keys, tokens) for source, tokens in step.sources.items()}
    mine = of_source.pop(ranks.rank, None)
    B, G, _, width = both.shape
    sent = attention.rounds.sent(number, ranks.rank)
    heard = {other: both.new_empty(B, G, count(tokens), width) for other, tokens in sent.items()}
    on_its_way = ranks.exchange(of_source, heard, f"{attention.site} (backward)")
    if mine is not None:
        yield attention.shards.places(ranks.rank, step.sources[ranks.rank]), mine
    for other, given in on_its_way.wait().items():
        yield attention.shards.places(ranks.rank, sent[other]), given


def _tokens_of(x: Tensor, keys: Ranges, wanted: Ranges) -> Tensor:
    """Of the tokens ``wanted`` among ``keys``, along axis 2."""
    held = Shards(keys[-1][1], (keys,))
    return chosen(x, 2, held.places(0, wanted))


def chosen(x: Tensor, axis: int, places: Ranges) -> Tensor:
    parts = [x.narrow(axis, start, stop - start) for start, stop in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
