"""An attention on DTensors: each rank computes some of the heads, or of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from attnopt.graph.nodes import is_call
from attnopt.graph.sdpa import SDPA, call_arguments
from attnopt.patterns.registry import parse

_HEADS = {"bias": 1, "mask": 1, "attn_mask": 1, "sinks": 1, "selected": 1, "wanted": 1, "pairs": 0}  # their axis
_BATCH = ("bias", "mask", "attn_mask", "sinks", "selected", "wanted", "q_segments", "kv_segments")


@dataclass(frozen=True)
class Share:
    """Of the heads of one attention on one rank.  ``kv``: the key/value heads that the local ones are; None: those of the rank's
    own shard."""

    heads: range
    kv: tuple[int, ...] | None
    kv_of_head: tuple[int, ...]

    @classmethod
    def of(cls, kv_of_head: Sequence[int], kv_heads: int, rank: int, ranks: int) -> Share:
        """Heads have to divide by the ranks; key/value heads stay where they are if no rank reads those of another."""
        size, kv_size = len(kv_of_head) // ranks, kv_heads // ranks
        parts = [kv_of_head[r * size : (r + 1) * size] for r in range(ranks)]
        heads, read = range(rank * size, (rank + 1) * size), parts[rank]
        if kv_heads % ranks == 0 and all(
            set(part) <= {*range(r * kv_size, (r + 1) * kv_size)} for r, part in enumerate(parts)
        ):
            return cls(heads, None, tuple(kv - rank * kv_size for kv in read))
        kv = tuple(sorted(set(read)))
        return cls(heads, kv, tuple(map(kv.index, read)))


class ShardedAttention(nn.Module):
    """In the place of the call ``node``: its arguments, in their order.  ``way``: what the last call did."""

    def __init__(self, node: fx.Node, site: str, mesh: DeviceMesh) -> None:
        super().__init__()
        self.target: Any = node.target
        self.names, self.site, self.mesh = tuple(call_arguments(node)), site, mesh
        self.fuses = is_call(node, SDPA)
        self.way = "not called yet"

    def forward(self, *args: Any) -> Tensor:
        given = dict(zip(self.names, args, strict=True))
        q = self._distributed(given[self.names[0]])
        ranks, place = self.mesh.size(), q.placements[0]
        if place == Shard(1) and q.shape[1] % ranks == 0:
            return self._by_heads(given, q)
        if place == Shard(0) and q.shape[0] % ranks == 0:
            return self._by_batch(given)
        self.way = f"whole on each rank: {q.shape[1]} heads" if q.shape[1] % ranks else "whole on each rank"
        whole = {name: self._local(x, Replicate()) if isinstance(x, Tensor) else x for name, x in given.items()}
        return self._wrapped(self.target(*whole.values()), Replicate())

    def extra_repr(self) -> str:
        return f"{self.site}: {self.way}"

    def _by_heads(self, given: Mapping[str, Any], q: DTensor) -> Tensor:
        heads, kv_heads = q.shape[1], given[self.names[1]].shape[1]
        reads = given.get("kv_of_head") or [h * kv_heads // heads for h in range(heads)]
        share = Share.of(reads, kv_heads, self.mesh.get_local_rank(), self.mesh.size())
        self.way = f"{len(share.heads)} of {heads} heads on each rank"
        local = dict(given)
        local[self.names[0]] = self._local(q, Shard(1))
        for name in self.names[1:3]:
            local[name] = self._keys(given[name], share)
        for name, axis in _HEADS.items():
            if isinstance(x := given.get(name), Tensor):
                local[name] = self._of_heads(x, axis, share.heads)
        for name in ("q_segments", "kv_segments"):
            if isinstance(x := given.get(name), Tensor):
                local[name] = self._local(x, Replicate())
        if self.fuses:
            local["enable_gqa"] = local[self.names[1]].shape[1] != len(share.heads)
        else:
            local["kv_of_head"] = list(share.kv_of_head)
            local["pattern"] = parse(given["pattern"]).for_heads(share.heads).to_json()
        return self._wrapped(self.target(*local.values()), Shard(1))

    def _keys(self, x: Tensor, share: Share) -> Tensor:
        if share.kv is None:
            return self._local(x, Shard(1))
        whole = self._local(x, Replicate(), Partial())
        chosen = [share.kv[kv] for kv in share.kv_of_head] if self.fuses else share.kv
        return whole.index_select(1, torch.tensor(chosen, device=whole.device))

    def _of_heads(self, x: Tensor, axis: int, heads: range) -> Tensor:
        whole = self._local(x, Replicate(), Partial())
        axis += whole.dim() - 4 if axis else 0  # masks may have fewer axes
        if axis < 0 or whole.shape[axis] == 1:
            return whole
        return whole.narrow(axis, heads.start, len(heads))

    def _by_batch(self, given: Mapping[str, Any]) -> Tensor:
        self.way = "some sequences on each rank"
        local = dict(given)
        batch = given[self.names[0]].shape[0]
        for name, x in given.items():
            if isinstance(x, Tensor):
                by_sequence = name in (*self.names[:3], *_BATCH) and x.dim() != 3 and x.shape[0] == batch
                local[name] = self._local(x, Shard(0)) if by_sequence else self._local(x, Replicate(), Partial())
        return self._wrapped(self.target(*local.values()), Shard(0))

    def _distributed(self, x: Tensor) -> DTensor:
        """One that is the same on every rank, if it is a plain tensor."""
        if isinstance(x, DTensor):
            return x
        return DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)

    def _local(self, x: Tensor, place: Placement, of_gradient: Placement | None = None) -> Tensor:
        given = self._distributed(x).redistribute(self.mesh, [place])
        return given.to_local(grad_placements=[of_gradient or place])

    def _wrapped(self, x: Tensor, place: Placement) -> Tensor:
        return DTensor.from_local(x, self.mesh, [place], run_check=False)
