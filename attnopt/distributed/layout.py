"""How several ranks share one call, before any of them runs it: which tokens each holds, and how each attention is shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from attnopt.distributed.attention_arguments import AttentionCall, attention_call
from attnopt.distributed.head_exchange import HeadShares
from attnopt.distributed.placement import ON_ONE_RANK, Form, Placement, at_node, is_between_channels
from attnopt.distributed.rounds import Rounds
from attnopt.distributed.shards import Shards
from attnopt.distributed.token_rules import ATTENTIONS, Tokens
from attnopt.distributed.traffic import Arriving, Link
from attnopt.errors import DistributedError
from attnopt.graph.copies import copy_program
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, calls, inputs_of, operand, opname, run_call, value, written
from attnopt.graph.sdpa import call_arguments

Way = Rounds | HeadShares


@dataclass(frozen=True)
class Sharing:
    """``zigzag`` None: where an attention is causal without a window.  ``method``: "keys" travel to queries, all operands to
    "heads", or of both what takes less time on ``link`` ("auto").  ``whole``: outputs are collected."""

    zigzag: bool | None = None
    method: str = "auto"
    whole: bool = False
    link: Link = field(default_factory=Link)


@dataclass(frozen=True, eq=False)
class Layout:
    """``values``: of every node at the sizes of the call.  ``ways``: of the attentions that ranks share.  ``forms``: of the
    outputs.  ``link``: by which the ways were chosen."""

    gm: fx.GraphModule
    values: Mapping[fx.Node, Any]
    shards: Shards
    ways: Mapping[fx.Node, Way]
    placement: Placement
    forms: Mapping[fx.Node, Form]
    link: Link

    @classmethod
    def of(cls, gm: fx.GraphModule, inputs: Sequence[object], ranks: int, sharing: Sharing) -> Layout:
        """For flat ``inputs``, of which those on the meta device stand for others of their sizes.  Raises DistributedError."""
        if names := written(gm):
            raise DistributedError(
                f"the model writes to its state {names[0]}", hint="optimize it without a cache of its own"
            )
        gm = _with_own_segments(gm)
        values = _values(gm, inputs)
        cores = _shared(gm.graph, values)
        length = int(values[_queries_and_keys(cores[0].node)[0]].shape[2])
        is_causal = any(c.pattern.is_causal and c.pattern.look_back is None for c in cores)
        shards = Shards.of(length, ranks, is_causal if sharing.zigzag is None else sharing.zigzag)
        known: dict[object, Rounds] = {}
        ways = {c.node: _way(c, values, shards, sharing, known) for c in cores}
        by_heads = [node for node, way in ways.items() if isinstance(way, HeadShares)]
        placement = Placement(gm.graph, values, {c.node: c for c in cores}, length, by_heads)
        placement.place()
        leaves = pytree.tree_leaves(gm.graph.output_node().args[0])
        forms = {x: None if sharing.whole else _own(placement, x) for x in leaves if isinstance(x, fx.Node)}
        placement.want(forms)
        return cls(gm, values, shards, ways, placement, forms, sharing.link)

    @property
    def collected(self) -> list[tuple[str, Arriving]]:
        """Each tensor that all ranks collect, and what that sends to each of them."""
        others, found = self.shards.ranks - 1, list[tuple[str, Arriving]]()
        for node in self.gm.graph.nodes:
            wanted = self.placement.wanted.get(node, {})
            if None in wanted and wanted[None].get(node) is not None:
                x = self.values[node]
                padded = x.numel() // self.shards.length * self.shards.longest * x.element_size()
                found.append((f"{opname(node)} {tuple(x.shape)}", Arriving.evenly(others, others * padded)))
        return found


def _with_own_segments(gm: fx.GraphModule) -> fx.GraphModule:
    """Ids of queries and of keys as two tensors: a rank needs its own of the former, and all of the latter."""

    def is_shared(node: fx.Node) -> bool:
        given = call_arguments(node) if calls(node, ATTENTIONS) else {}
        return given.get("q_segments") is not None and given["q_segments"] is given["kv_segments"]

    if not any(map(is_shared, gm.graph.nodes)):
        return gm
    module, _ = copy_program(gm)
    for node in filter(is_shared, list(module.graph.nodes)):
        emit, place = Emitter(module.graph, node), list(call_arguments(node)).index("kv_segments")
        node.update_arg(place, emit.call(aten.clone.default, operand(node, place)))
    return module


def _values(gm: fx.GraphModule, inputs: Sequence[object]) -> dict[fx.Node, Any]:
    """Of every node at these sizes: tensors without data, and numbers."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values: dict[fx.Node, Any] = dict(zip(inputs_of(gm.graph), inputs, strict=True))
    with mode, torch.no_grad():
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = _without_data(values[node], node, mode)
            elif node.op == "get_attr":
                x = attrgetter(str(node.target))(gm)
                values[node] = mode.from_tensor(x) if isinstance(x, Tensor) else x
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    values[node] = run_call(node, args, kwargs)
                except Exception as e:
                    raise at_node(
                        node, f"has a result whose size is not known before the call: {type(e).__name__}"
                    ) from e
    return values


def _without_data(x: object, node: fx.Node, mode: FakeTensorMode) -> object:
    if not isinstance(x, Tensor):
        return x
    if x.is_meta:
        return torch.empty(x.shape, dtype=x.dtype, device=value(node).device)
    return mode.from_tensor(x)


def _queries_and_keys(node: fx.Node) -> list[fx.Node]:
    return list(call_arguments(node).values())[:2]


def _shared(graph: fx.Graph, values: Mapping[fx.Node, Any]) -> list[AttentionCall]:
    """The attentions of sequences to themselves, or to others as long, of the length that has the most work.  Others are computed
    by each rank, for its own queries if the keys are whole."""
    found: dict[int, list[fx.Node]] = {}
    work: dict[int, int] = {}
    seen = [n for n in graph.nodes if calls(n, ATTENTIONS) and not is_between_channels(n)]
    for node in seen:
        q, k = (values[n] for n in _queries_and_keys(node))
        if q.dim() == 4 and q.shape[2] == k.shape[2]:
            length = int(q.shape[2])
            found.setdefault(length, []).append(node)
            work[length] = work.get(length, 0) + q.numel() * length
    if not seen:
        other = "without a softmax, with a map across heads, or between channels: "
        raise DistributedError(
            "the graph has no attention over tokens in one operator, which ranks can share",
            hint=f'optimize with backend="blocked"; if its attentions are {other}{ON_ONE_RANK}',
        )
    if not found:
        call = attention_call(seen[0])
        q, k = (int(values[n].shape[-2]) for n in _queries_and_keys(seen[0]))
        raise call.error(
            f"it has {q} queries and {k} keys, and no attention of the model has as many keys as queries",
            "run a model that reads a cache of keys on one rank, or split its heads: parallelize_module on the result of "
            "attnopt.convert",
        )
    return [attention_call(node) for node in found[max(work, key=lambda n: (work[n], n))]]


def _way(
    core: AttentionCall, values: Mapping[fx.Node, Any], shards: Shards, sharing: Sharing, known: dict[object, Rounds]
) -> Way:
    """``known``: rounds of patterns."""
    key = core.pattern, core.heads if core.pattern.is_per_head else 0
    rounds = known[key] = known.get(key) or Rounds.plan(core.pattern, core.heads, shards)
    shares = None if core.with_lse else HeadShares.of(core.kv_of_head, shards)
    if sharing.method == "keys":
        return rounds
    if sharing.method == "heads":
        if shares is None:
            groups = f"they read {len(set(core.kv_of_head))} key/value heads, fewer than {shards.ranks} ranks"
            why = "its log-sum-exps are merged with those of other keys" if core.with_lse else groups
            raise core.error(f"ranks cannot share its heads: {why}", 'choose method="keys" or "auto"')
        return shares
    if core.has_rows(values):
        return rounds  # otherwise each rank would hold a whole map
    sizes, link = core.sizes(values), sharing.link
    if shares is not None and link.seconds(shares.arriving(sizes)) < link.seconds(rounds.arriving(sizes)):
        return shares
    return rounds


def _own(placement: Placement, node: fx.Node) -> Form:
    at = placement.places.get(node)
    return at if at is not None and at == Tokens(at.axis) else None
