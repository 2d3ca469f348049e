"""Where a model adds the output of an attention to what it was computed from: the residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.base.closeness import ROOM, difference, tolerance
from attnopt.fit.least_squares import output_weights, with_ones
from attnopt.graph.interpreter import Interpreter
from attnopt.graph.nodes import is_tensor, shape
from attnopt.graph.resume import Part
from attnopt.match.find import Found

STEPS = 8  # operators between an output projection and the sum


@dataclass(frozen=True)
class ResidualSum:
    """Read from the graph, and proved by evaluation.  ``stream``: what the output is added to; ``part``: from the attention and
    the stream to the sum."""

    stream: fx.Node
    part: Part

    def holds(self, run: Interpreter, f: Found, out: Tensor, o_BHLD: Tensor) -> bool:
        """Whether the sum is just that where ``run`` has come to the attention, for these outputs of heads, which are ``out`` in
        the model's own layout."""
        stream: Tensor = run(self.stream)
        weights, bias = output_weights(f.site), f.site.out_bias()
        if weights is None:
            return False
        every = torch.ones(o_BHLD.shape[0], o_BHLD.shape[2], dtype=torch.bool, device=o_BHLD.device)
        added = (with_ones(o_BHLD, every) @ weights).reshape(*every.shape, -1)
        if added.shape != stream.shape:
            return False
        want = stream.double() + added + (0.0 if bias is None else bias.double())
        (got,) = self.part.run({n: run(n) for n in self.part.reads}, [out, stream])
        return difference([got], [want.to(got.dtype)]) <= ROOM * tolerance([got])


def residual_sum(gm: fx.GraphModule, f: Found, end: fx.Node) -> ResidualSum | None:
    """A sum behind the output projection that may be that of the stream; ``holds`` tells whether it is.

    ``end``: the outputs of the heads in the model's own layout."""
    node = f.output_op
    for _ in range(STEPS):
        users = [] if node is None else [u for u in node.users if is_tensor(u)]
        if len(users) != 1:
            return None
        others = [n for n in users[0].all_input_nodes if n is not node and n.op != "get_attr" and is_tensor(n)]
        if not others:
            node = users[0]
            continue
        (stream, *more) = others
        if more or shape(stream) != shape(users[0]) or not stream < f.raised.node:
            return None
        part = Part(gm.graph, [end, stream], [users[0]])
        is_fixed = all(n.op == "get_attr" or not is_tensor(n) for n in part.reads)
        return ResidualSum(stream, part) if is_fixed else None
    return None
