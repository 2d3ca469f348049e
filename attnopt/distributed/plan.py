"""What each attention of a sequence-parallel model sends, before it runs: on these ranks, or on any number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from attnopt.base.options import choice, whole
from attnopt.base.sizes import hint
from attnopt.capture.valid_sizes import sizes_that_fit
from attnopt.distributed.layout import Layout, Sharing, Way
from attnopt.distributed.memory import peak_bytes
from attnopt.distributed.ranks import axis_of
from attnopt.distributed.same_model import require_optimized
from attnopt.distributed.shards import Shards
from attnopt.distributed.token_rules import ATTENTIONS
from attnopt.distributed.traffic import Link
from attnopt.distributed.traffic import Sizes as AttentionSizes
from attnopt.errors import DistributedError
from attnopt.graph.evaluate import Sizes, symbols
from attnopt.graph.nodes import calls, inputs_of, is_tensor, value
from attnopt.graph.sdpa import call_arguments
from attnopt.model import OptimizedModel

LAYOUTS = {"auto": None, "contiguous": False, "zigzag": True}
METHODS = ("auto", "keys", "heads")


@dataclass(frozen=True)
class AttentionPlan:
    """``tokens``: keys that each rank is sent, by rank; ``bytes`` that it is sent in one forward pass, and ``seconds`` that this
    takes.  A backward pass sends the keys once more, and as many gradients back."""

    site: str
    method: str
    pattern: str
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]
    seconds: float

    @classmethod
    def of(cls, site: str, pattern: object, way: Way, sizes: AttentionSizes, link: Link) -> AttentionPlan:
        steps = way.arriving(sizes)
        return cls(site, way.method, str(pattern), way.tokens, steps.totals, link.seconds(steps))


@dataclass(frozen=True)
class ParallelPlan:
    """How ranks share one call.  ``tokens``: how many each rank holds; ``collected``: tensors that all ranks collect, with the
    bytes that each is sent.  ``memory``: bytes of inputs and activations that a rank holds at most, without gradients, parameters
    and what a kernel copies for itself.  ``seconds``: of all transfers of a forward pass one after the other; what is computed
    meanwhile hides some.
    """

    length: int
    tokens: tuple[int, ...]
    layout: str
    attentions: tuple[AttentionPlan, ...]
    collected: tuple[tuple[str, int], ...]
    memory: int
    seconds: float

    @classmethod
    def of(cls, made: Layout) -> ParallelPlan:
        link, shards, found = made.link, made.shards, dict[object, AttentionPlan]()
        attentions = []
        for node, way in made.ways.items():
            core = made.placement.cores[node]
            sizes = core.sizes(made.values)
            known = found.get((id(way), sizes)) or AttentionPlan.of(core.site, core.pattern, way, sizes, link)
            found[id(way), sizes] = known
            attentions.append(replace(known, site=core.site))
        collected = made.collected
        seconds = sum(a.seconds for a in attentions) + sum(link.seconds(one) for _, one in collected)
        sent = tuple((name, one.totals[0]) for name, one in collected)
        return cls(shards.length, shards.counts, _layout(shards), tuple(attentions), sent, peak_bytes(made), seconds)

    def bytes(self, rank: int) -> int:
        """What the rank is sent in one forward pass."""
        return sum(a.bytes[rank] for a in self.attentions) + sum(n for _, n in self.collected)

    def __str__(self) -> str:
        ranks = len(self.tokens)
        held = ", ".join(map(str, self.tokens)) if ranks <= 8 else f"{min(self.tokens)} to {max(self.tokens)}"
        lines = [f"{self.length} tokens on {ranks} ranks ({held}), {self.layout}"]
        lines += [
            f"  {a.site}: {a.method}, at most {max(a.tokens)} keys and {_size(max(a.bytes))} to a rank; {a.pattern}"
            for a in self.attentions
        ]
        lines += [f"  collected by all ranks: {name}, {_size(n)} to a rank" for name, n in self.collected]
        most = max(map(self.bytes, range(ranks)))
        lines.append(
            f"  in all: {_size(most)} to a rank in {1e3 * self.seconds:.3g} ms, at most {_size(self.memory)} of activations"
        )
        return "\n".join(lines)


def plan(
    fast: OptimizedModel,
    ranks: int | DeviceMesh,
    length: int | None = None,
    *,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    axis: str | int | None = None,
    layout: str = "auto",
    method: str = "auto",
    outputs: str = "own",
    link: Link | None = None,
) -> ParallelPlan:
    """What ``context_parallel`` would send, hold and wait for on so many ranks, none of which has to be there.

    ``ranks``: how many, or a mesh and the name of its ``axis``.  ``length``: tokens of a sequence, of the example inputs at that
    size, where a free batch of one counts as the two that it was captured with; or ``args`` and ``kwargs``, whose tensors may be
    on the meta device.  ``layout``, ``method``, ``outputs``, ``link``: as of ``context_parallel``.

    Raises DistributedError.
    """
    choice("plan", "layout", layout, tuple(LAYOUTS))
    choice("plan", "method", method, METHODS)
    choice("plan", "outputs", outputs, ("own", "whole"))
    require_optimized(fast)
    size = ranks.size(axis_of(ranks, axis)) if isinstance(ranks, DeviceMesh) else whole("plan", "ranks", ranks, least=1)
    given = fast.arranged(args, kwargs or {})[0] if args or kwargs else None
    inputs = _of_length(fast, length) if given is None else pytree.tree_leaves(given)
    sharing = Sharing(LAYOUTS[layout], method, outputs == "whole", link or Link())
    return ParallelPlan.of(Layout.of(fast.graph_module, inputs, size, sharing))


def _of_length(fast: OptimizedModel, length: int | None) -> Sequence[object]:
    """The example inputs with so many tokens, on the meta device.  Raises DistributedError."""
    module, origin = fast.graph_module, fast.origin
    leaves = pytree.tree_leaves(origin.inputs)
    if length is None:
        return leaves
    sizes = {**symbols(module.graph), **_symbol_of(module.graph, whole("plan", "length", length, least=1))}
    if not sizes_that_fit(module.graph, origin.report.fixed_axes)(sizes):
        raise DistributedError(f"the model does not take {length} tokens", hint="see fast.report.fixed_axes")

    def fitted(x: object, node: fx.Node) -> object:
        if isinstance(x, int) and isinstance(value(node), torch.SymInt):
            return int(value(node).node.expr.subs(sizes))
        if not isinstance(x, Tensor) or not is_tensor(node):
            return x
        shape = [int(n.node.expr.subs(sizes)) if isinstance(n, torch.SymInt) else n for n in value(node).shape]
        return torch.empty(shape, dtype=x.dtype, device="meta")

    return [fitted(x, node) for x, node in zip(leaves, inputs_of(module.graph), strict=True)]


def _symbol_of(graph: fx.Graph, length: int) -> Sizes:
    """The symbol of the graph's sizes with which the longest attention of a sequence to itself has so many tokens.

    Raises DistributedError if no one symbol decides that."""
    operands = [list(call_arguments(n).values())[:2] for n in graph.nodes if calls(n, ATTENTIONS)]
    lengths = [tuple(value(x).shape[-2] for x in of_call) for of_call in operands]
    own = [q for q, k in lengths if hint(q) == hint(k)]
    tokens = max(own, key=hint, default=0)
    solved: list[sympy.Expr] = []
    if isinstance(tokens, torch.SymInt) and len(tokens.node.expr.free_symbols) == 1:
        (symbol,) = tokens.node.expr.free_symbols
        solved = sympy.solve(tokens.node.expr - length, symbol)
    elif hint(tokens) == length:
        return {}
    if len(solved) != 1 or not solved[0].is_Integer:
        raise DistributedError(
            f"the attentions are over {tokens} tokens, and no one free axis makes that {length}",
            hint="optimize with dynamic_shapes, or pass inputs of the wanted size (args=)",
        )
    return {symbol: int(solved[0])}


def _layout(shards: Shards) -> str:
    return "one run each" if all(len(runs) == 1 for runs in shards.positions) else "one run from each end (zigzag)"


def _size(n: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= factor:
            return f"{n / factor:.1f} {unit}"
    return f"{n} bytes"
