"""What a decoder can keep of a token in the place of its keys and values: the fewest numbers that determine both.

Keys and values that are linear in the features of their token, at whatever position, depend on the features' part in one
subspace: its coordinates are the latents.  The subspace is read off by trial, from the keys and values of unit vectors.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.base.closeness import TOLERANCE
from attnopt.base.double_precision import widened_arguments
from attnopt.base.sizes import same_size
from attnopt.errors import ExportError
from attnopt.graph.interpreter import Interpreter
from attnopt.graph.nodes import calls, inputs_of, is_number, is_tensor, opname, run_call, shape, value
from attnopt.graph.ops import Kind, of

LOST = 1e-6  # of the norm of all keys and values: what rounding leaves of a subspace that is not there
_PROJECTIONS = of(Kind.PRODUCT, Kind.CONVOLUTION)


@dataclass(frozen=True)
class LatentSource:
    """``features`` [B, L, in], from which keys ``k`` and values ``v`` [B, G, L, D] of one attention come by way of ``inside``.

    ``down`` [in, width]: to the latents; its transpose gives back all that keys and values depend on.
    """

    features: fx.Node
    inside: tuple[fx.Node, ...]
    k: fx.Node
    v: fx.Node
    down: Tensor

    @property
    def width(self) -> int:
        return self.down.shape[1]

    @property
    def kept_otherwise(self) -> int:
        """The numbers of a token that a cache of keys and values holds."""
        return sum(shape(n)[1] * shape(n)[3] for n in (self.k, self.v))


def of_content(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values depend on which tokens the text has, and not on their places alone."""
    found: set[fx.Node] = {n for n in inputs_of(graph) if n.name == "input_ids"}
    for node in graph.nodes:
        if not is_number(node) and found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def latent_source(gm: fx.GraphModule, site: str, k: fx.Node, v: fx.Node, content: Collection[fx.Node]) -> LatentSource:
    """Raises ExportError if keys and values are not linear in the features of their token."""
    features, inside = _nearest(site, k, v, content)
    ids = next(n for n in inputs_of(gm.graph) if n.name == "input_ids")
    sizes = value(features).shape
    if len(sizes) != 3 or not all(map(same_size, sizes[:2], value(ids).shape)):
        raise _error(site, f"they come from {_told(features)}, whose axes are not [batch, tokens, features]")
    return LatentSource(features, inside, k, v, _subspace(gm, site, features, k, v))


def _nearest(site: str, k: fx.Node, v: fx.Node, content: Collection[fx.Node]) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The nearest features that all ways up from keys and values lead to, past a projection, and the nodes below them."""
    ends, projected, inside = {k, v}, set[fx.Node](), list[fx.Node]()
    while True:
        node = max(ends)
        if len(ends) == 1 and node in projected:
            return node, tuple(sorted(inside))
        above = [n for n in node.all_input_nodes if n in content]
        if node.op != "call_function" or not above:
            raise _error(site, f"they come from several tensors: {', '.join(sorted(map(_told, ends)))}")
        ends.remove(node)
        inside.append(node)
        if calls(node, _PROJECTIONS) or node in projected:
            projected.update(above)
        ends.update(above)


def _subspace(gm: fx.GraphModule, site: str, features: fx.Node, k: fx.Node, v: fx.Node) -> Tensor:
    """[in, width], orthonormal."""
    width = shape(features)[2]
    some = torch.randn(1, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    tried = torch.cat([torch.zeros(1, width, dtype=torch.float64), torch.eye(width, dtype=torch.float64), some])
    run = _Trial(gm, features, tried[None])
    made = torch.cat([run(n)[0].transpose(0, 1).flatten(1).double() for n in (k, v)], 1)  # [tokens, features]
    offset, linear, other = made[0], made[1:-1] - made[0], made[-1] - made[0]
    apart = float((some[0] @ linear - other).abs().max())
    if not apart <= TOLERANCE[torch.float32] * float(other.abs().max().clamp(min=float(offset.abs().max()))):
        raise _error(site, f"they are not linear in {_told(features)}, from which they come")
    u: Tensor
    u, s, _ = torch.linalg.svd(linear, full_matrices=False)
    left = s.square().flip(0).cumsum(0).flip(0).sqrt()  # the norm without the first 0, 1, ... directions
    kept = int((left > LOST * left[0]).sum())
    return u[:, : max(kept, 1)].to(value(features).dtype)


class _Trial(Interpreter):
    """Keys and values of features that are given, all at position 0, in double precision."""

    def __init__(self, gm: fx.GraphModule, features: fx.Node, given: Tensor) -> None:
        super().__init__(gm, {features: given})
        self.tokens = given.shape[1]

    def leaf(self, node: fx.Node) -> Any:
        if node.op == "placeholder" and is_tensor(node):
            fill = torch.ones if node.name == "attention_mask" else torch.zeros
            return fill(1, self.tokens, dtype=value(node).dtype)
        return super().leaf(node)

    def stored(self, node: fx.Node) -> object:
        found = super().stored(node)
        return found.double() if isinstance(found, Tensor) and found.is_floating_point() else found

    def call(self, node: fx.Node, args: tuple[object, ...], kwargs: Any) -> object:
        args, kwargs = widened_arguments((args, kwargs))
        return run_call(node, args, kwargs)


def _error(site: str, why: str) -> ExportError:
    return ExportError(
        f"its keys and values have no latents: {why}",
        site=site,
        hint='use kv="float32"; latents need keys and values that are projected from the features of their token, and rotated by '
        "position_ids",
    )


def _told(node: fx.Node) -> str:
    return opname(node) if node.op == "call_function" else node.name
