"""What each attention of a sequence-parallel model sends, before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.distributed.shard_graph import Cost, Sharded
from attnopt.distributed.shards import Shards


@dataclass(frozen=True)
class AttentionPlan:
    """``tokens``: keys that each rank is sent, by rank; ``bytes`` of them in one forward pass.  A backward pass sends the keys
    once more, and as many gradients back."""

    site: str
    method: str
    pattern: str
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]

    @classmethod
    def of(cls, cost: Cost) -> AttentionPlan:
        rounds = cost.attention.rounds
        tokens = tuple(rounds.tokens(rank) for rank in range(rounds.shards.ranks))
        return cls(
            cost.attention.site,
            rounds.method,
            str(cost.attention.pattern),
            tokens,
            tuple(n * cost.bytes for n in tokens),
        )


@dataclass(frozen=True)
class ParallelPlan:
    """How ranks share one call.  ``tokens``: how many each rank holds; ``collected``: tensors that all ranks collect."""

    length: int
    tokens: tuple[int, ...]
    layout: str
    attentions: tuple[AttentionPlan, ...]
    collected: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, made: Sharded) -> ParallelPlan:
        shards = made.shards
        tokens = tuple(map(shards.count, range(shards.ranks)))
        attentions = tuple(map(AttentionPlan.of, made.attentions))
        return cls(shards.length, tokens, _layout(shards), attentions, made.collected)

    def __str__(self) -> str:
        held = ", ".join(map(str, self.tokens))
        lines = [f"{self.length} tokens on {len(self.tokens)} ranks ({held}), {self.layout}"]
        lines += [
            f"  {a.site}: {a.method}, at most {max(a.tokens)} keys and {_size(max(a.bytes))} to a rank; {a.pattern}"
            for a in self.attentions
        ]
        lines += [f"  collected by all ranks: {name}, {_size(n)}" for name, n in self.collected]
        return "\n".join(lines)


def _layout(shards: Shards) -> str:
    return "one run each" if all(len(runs) == 1 for runs in shards.positions) else "one run from each end (zigzag)"


def _size(n: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= factor:
            return f"{n / factor:.1f} {unit}"
    return f"{n} bytes"
