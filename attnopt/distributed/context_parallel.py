"""``attnopt.distributed.context_parallel``: an optimized model whose ranks share each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import ROOM, difference, tolerance
from attnopt.base.options import choice
from attnopt.base.trees import text
from attnopt.capture.calibration import shapes_of
from attnopt.compiler.resized_inputs import resized
from attnopt.distributed.layout import Sharing
from attnopt.distributed.plan import LAYOUTS, METHODS, ParallelPlan
from attnopt.distributed.ranks import Ranks
from attnopt.distributed.same_inputs import require_same_inputs, sampled
from attnopt.distributed.same_model import require_optimized, told_of
from attnopt.distributed.shard_graph import Sharded, sharded
from attnopt.distributed.shards import TooShortError
from attnopt.distributed.token_moves import taken
from attnopt.distributed.token_rules import Tokens
from attnopt.distributed.traffic import Link
from attnopt.errors import DistributedError, VerificationError
from attnopt.model import OptimizedModel, run_graph

_TRIED = 2  # sizes at which the result is compared
_KEPT = 64  # sizes of calls whose graphs are kept


class ContextParallel(nn.Module):
    """A model that each rank calls with the same, whole inputs, and that computes the rank's own tokens.

    See ``context_parallel``.  Parameters are shared with the optimized model.
    """

    def __init__(self, fast: OptimizedModel, ranks: Ranks, sharing: Sharing) -> None:
        super().__init__()
        self.fast, self.ranks, self.sharing = fast, ranks, sharing
        self._made: dict[object, Sharded] = {}

    def forward(self, *args: object, **kwargs: object) -> Any:
        """The outputs of the model: of those with tokens, the rank's own, unless outputs are whole."""
        with self.ranks.together("reading the inputs") as told:
            inputs, give = self.fast.arranged(args, kwargs)
            told.own = sampled(inputs)
        require_same_inputs(told.all)
        return give(run_graph(self.at(inputs).module, inputs))

    def plan(self, *args: object, **kwargs: object) -> ParallelPlan:
        """What a call with these inputs sends, without running it; it prints as a table."""
        return ParallelPlan.of(self.at(self.fast.arranged(args, kwargs)[0]).layout)

    def own(self, x: Tensor, axis: int = 1) -> Tensor:
        """The rank's own tokens of a whole tensor, such as labels, along the axis of its tokens."""
        shards = self._of_length(x.shape[axis]).layout.shards
        return taken(x, shards.positions[self.ranks.rank], shards.length, Tokens(axis % x.dim()))

    def reduce_gradients(self) -> None:
        """Sum the gradients of all parameters over the ranks, in place; all ranks call it after the backward pass.

        The objective is then the sum of the losses that the ranks called backward on."""
        with torch.no_grad():
            for p in self.fast.parameters():
                if p.requires_grad:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    self.ranks.summed(p.grad, "gradients")

    @property
    def received(self) -> dict[str, int]:
        """The bytes that this rank was sent since it was made or ``received`` was cleared, by what they were for."""
        return self.ranks.received

    def at(self, inputs: CallInputs) -> Sharded:
        """The graph of this rank for inputs in the form of the graph.  Raises DistributedError."""
        leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
        key = shapes_of(inputs), tuple(x for x in leaves if not isinstance(x, Tensor))
        if key not in self._made:
            made = sharded(self.fast.graph_module, leaves, self.ranks, self.sharing)
            self._require_whole_objects(made)
            self._made[key] = made
            if len(self._made) > _KEPT:
                del self._made[next(iter(self._made))]
        return self._made[key]

    def _require_whole_objects(self, made: Sharded) -> None:
        """A cache with the rank's own tokens of some layers and all tokens of others would be read wrongly."""
        form = self.fast.origin.form
        if form is None:
            return
        for axis, path, outer in zip(made.axes, form.results.paths, form.results.outer, strict=True):
            if axis is not None and len(path) > outer:
                raise DistributedError(
                    f"each rank would return its own tokens of {text(path)}, which is part of an object, as of a cache",
                    hint='pass outputs="whole", or optimize the model with inputs that make no cache, such as use_cache=False',
                )

    def _of_length(self, length: int) -> Sharded:
        found = next((made for made in self._made.values() if made.layout.shards.length == length), None)
        if found is None:
            raise DistributedError(f"no call had {length} tokens yet", hint="call the model first, or its plan")
        return found


def _examples(made: ContextParallel) -> list[CallInputs]:
    """Inputs on which the ranks are compared with one: the example inputs, and some at another size if that is free.

    Raises DistributedError."""
    origin, found = made.fast.origin, list[CallInputs]()
    candidates = [origin.inputs, *resized(made.fast.graph_module, origin.inputs, origin.report.fixed_axes)]
    for inputs in candidates:
        with suppress(TooShortError):
            made.at(inputs)
            found.append(inputs)
        if len(found) == _TRIED:
            break
    if not found:
        raise DistributedError(
            f"the example inputs have fewer tokens than there are ranks ({made.ranks.size})",
            hint="optimize the model with longer example inputs, or with free axes (dynamic_shapes)",
        )
    return found


def _compare(made: ContextParallel, inputs: CallInputs) -> None:
    """Raises VerificationError."""
    ours = made.at(inputs)
    with torch.no_grad():
        want = pytree.tree_leaves(run_graph(made.fast.graph_module, inputs))
        got = pytree.tree_leaves(run_graph(ours.module, inputs))
    own, wanted = _compared(ours, got, want, made.ranks.rank)
    apart = difference(own, wanted)
    if not apart <= ROOM * tolerance(wanted):
        raise VerificationError(
            f"rank {made.ranks.rank} of {made.ranks.size} does not compute its tokens as one rank alone would: "
            f"{apart:.2g} (relative)",
            hint="run the model on one rank, and report it",
        )


def _compared(made: Sharded, got: Sequence[Any], want: Sequence[Any], rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that should be equal."""
    own, wanted, shards = list[Tensor](), list[Tensor](), made.layout.shards
    for x, y, axis in zip(got, want, made.axes, strict=True):
        if isinstance(x, Tensor):
            own.append(x)
            wanted.append(y if axis is None else taken(y, shards.positions[rank], shards.length, Tokens(axis)))
    return own, wanted


def context_parallel(
    fast: OptimizedModel,
    mesh: DeviceMesh,
    *,
    axis: str | int | None = None,
    layout: str = "auto",
    method: str = "auto",
    outputs: str = "own",
    link: Link | None = None,
) -> ContextParallel:
    """``fast`` with its sequences shared by the ranks of one axis of ``mesh``; every rank calls this, and then the result.

    Each rank passes the same, whole inputs (token ids and masks are small), and computes its own tokens only: everything between
    attentions must act token by token, which is proven operator by operator.  Attentions of a sequence to itself, of the length
    with the most work, are shared; one to keys that every rank has whole, as cross-attention to an input, is computed for the own
    queries alone, and what shares no tokens is computed by every rank.  Any length of at least one token a rank will do.
    ``axis``: of the mesh, where it has several.  ``layout``: "contiguous": each rank holds one run of the sequence; "zigzag": one
    from each end, which gives all ranks the same work under a causal mask; "auto": zigzag for causal attentions without a window.
    ``method``: "keys": keys and values travel to the queries that see them, in a ring if they are many; "heads": queries, keys
    and values travel so that each rank computes some heads over all tokens, where there are as many groups of heads as ranks;
    "auto": for each attention, what takes less time by the latency and bandwidth of ``link``.  ``plan`` tells which.
    ``outputs``: "own": an output [B, length, ...] comes as the rank's own tokens [B, own, ...], in their order; "whole": as the
    whole output, on every rank.  An output without tokens, as of a pooled classifier, is whole on every rank.

    Gradients: the objective is the sum of the losses of all ranks.  Call ``backward`` on the loss of the own tokens, or, of whole
    outputs, on the loss divided by the number of ranks, and then ``reduce_gradients()``.

    The result is compared with ``fast`` on its example inputs.  Raises DistributedError on every rank, or VerificationError.
    """
    ranks = Ranks.of(mesh, axis)
    with ranks.together("reading the model and the options"):
        choice("context_parallel", "layout", layout, tuple(LAYOUTS))
        choice("context_parallel", "method", method, METHODS)
        choice("context_parallel", "outputs", outputs, ("own", "whole"))
        given = told_of(require_optimized(fast))
    sharing = Sharing(LAYOUTS[layout], method, outputs == "whole", link or Link())
    asked = {"the layout": layout, "the method": method, "the choice of outputs": outputs, "the link": sharing.link}
    ranks.require_same({**given, **asked})
    made = ContextParallel(fast, ranks, sharing)
    with ranks.together("planning"):
        examples = _examples(made)
    for inputs in examples:
        with ranks.together("comparing with one rank"):
            _compare(made, inputs)
    made.received.clear()
    return made
