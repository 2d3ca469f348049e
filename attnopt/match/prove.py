"""Verification by evaluation: a canonical attention, run by the reference backend, must equal the original operators.

Both run on random values of the nearest projections above them, so nothing depends on the weights or on how
representative the example inputs are; masks are computed from the example inputs.  Tensors on the meta device, which
have no values, take random ones too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.backends.reference import Reference
from attnopt.base.closeness import TOLERANCE, difference
from attnopt.base.double_precision import widened_arguments, widened_inputs
from attnopt.base.sizes import hint
from attnopt.capture.flex_attention import call_behind
from attnopt.graph.interpreter import COMPUTED, Interpreter
from attnopt.graph.nodes import ancestors, calls, get_attr, inputs_of, is_number, shape, value, with_values
from attnopt.graph.ops import Kind, named, of
from attnopt.ir.plugin_calls import attention_of
from attnopt.match.fused import FUSED
from attnopt.match.raise_region import Raised
from attnopt.slicing.weight_store import fingerprint

# Projections and norms.  Other products may be the attention's own.
_CUTS = named("linear addmm mm") | of(Kind.CONVOLUTION, Kind.EMBEDDING, Kind.NORM) | FUSED


def example_values(gm: fx.GraphModule, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[fx.Node, object]:
    """The example input of each placeholder."""
    placeholders = inputs_of(gm.graph)
    leaves = torch.utils._pytree.tree_leaves((args, dict(kwargs)))
    return dict(zip(placeholders, leaves, strict=True)) if len(leaves) == len(placeholders) else {}


def site_error(gm: fx.GraphModule, raised: Raised, examples: Mapping[fx.Node, object], seed: int = 0) -> float:
    """Largest relative difference between the raised attention and the original; NaN rows count as zeros.

    Where half precision rounds by more than it should, the two are compared in double precision.
    """
    error = _error(_Slice(gm, examples, seed), raised)
    if error <= site_tolerance(raised) or site_tolerance(raised) <= TOLERANCE[torch.float32]:
        return error
    exact = _error(_Slice(gm, examples, seed, wide=True), raised)
    return exact if exact <= TOLERANCE[torch.float64] else error


def _error(run: _Slice, raised: Raised) -> float:
    region = raised.region
    run.inside, run.moved = inside_of(raised), _mixed_in(raised)
    with torch.no_grad():
        want = run(call_behind(region.out.node))
        t = raised.operands.map(lambda _, operand: run(operand))
        run.values[raised.node] = attention_of(Reference(), raised.spec)(t.q, t.k, t.v, **t.others)
        got = run(raised.out)
    blind = torch.isnan(want)
    return difference([got], [want.masked_fill(blind, 0.0)])


def inside_of(raised: Raised) -> set[fx.Node]:
    """What is computed from the operands: the region, and a map that is mixed into its weights, before and after."""
    return {*raised.region.nodes, *_mixed_in(raised)}


def _mixed_in(raised: Raised) -> set[fx.Node]:
    mixture, made = raised.region.mixture, raised.operands
    maps = [m for m in (raised.region.score_map, raised.region.weight_map) if m is not None]
    ends = [] if mixture is None else [*(o.node for o in mixture.operands), made.keep, made.added]
    ends += [made.score_map, made.weight_map, *(n for m in maps for n in (m.weight, m.added))]
    return {n for end in ends if end is not None for n in ancestors(end, stop=is_number)}


def region_key(raised: Raised) -> object:
    """Equal for two sites only if the original and the raised operators between the nearest projections and the output are
    the same, with the same sizes and constants: one proof serves both."""
    inside = inside_of(raised)
    number: dict[fx.Node, int] = {}
    lines: list[object] = [raised.spec]
    gm = raised.node.graph.owning_module
    assert isinstance(gm, fx.GraphModule)

    def visit(target: fx.Node) -> None:
        stack = [target]
        while stack:
            node = stack[-1]
            if node in number:
                stack.pop()
                continue
            leaf = is_leaf(node, inside)
            waiting = [] if leaf else [n for n in node.all_input_nodes if n not in number]
            if waiting:
                stack.extend(waiting)
                continue
            stack.pop()
            number[node] = len(number)
            lines.append(
                _leaf_key(gm, node)
                if leaf
                else (node.target, str(fx.node.map_arg((node.args, node.kwargs), number.get)))
            )

    visit(raised.region.out.node)
    visit(raised.out)
    return tuple(lines)


def _leaf_key(gm: fx.GraphModule, node: fx.Node) -> object:
    val = value(node)
    if node.op == "get_attr":
        found = get_attr(gm, str(node.target))
        is_small = not isinstance(found, torch.nn.Parameter) and found.numel() < 2**20
        return (
            ("constant", *fingerprint(found))
            if is_small and not found.is_meta
            else ("weight", tuple(found.shape), found.dtype)
        )
    if isinstance(val, Tensor):
        name = node.name if node.op == "placeholder" else ""
        return ("value", name, tuple(map(str, val.shape)), val.dtype)
    return ("number", str(val))


def is_leaf(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Where verification stops and uses a random value, a weight or an example input."""
    if node.op != "call_function":
        return True
    val = value(node)
    if isinstance(val, (torch.SymInt, int)):
        return hint(val) >= 0
    if not isinstance(val, Tensor):
        return False
    return node not in inside and calls(node, _CUTS) and -1 not in shape(node)


def site_tolerance(raised: Raised) -> float:
    kind = value(raised.region.out.node).dtype
    return TOLERANCE.get(kind, 0.0)


class _Slice(Interpreter):
    """Stops at projections outside the attention, whose results are random."""

    def __init__(self, gm: fx.GraphModule, examples: Mapping[fx.Node, Any], seed: int, wide: bool = False) -> None:
        super().__init__(gm)
        self.examples, self.wide = examples, wide
        self.inside = set[fx.Node]()
        self.moved = set[
            fx.Node
        ]()  # parameters among these are others than they are: all gates are often equal at first
        self._parameters: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(seed)

    def leaf(self, node: fx.Node) -> object:
        if not is_leaf(node, self.inside):
            return COMPUTED
        given = self._given(node)
        return widened_inputs(given) if self.wide else given

    def call(self, node: fx.Node, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        if self.wide:
            args, kwargs = widened_arguments((args, kwargs))
        return super().call(node, args, kwargs)

    def _given(self, node: fx.Node) -> object:
        val = value(node)
        if node.op == "get_attr":
            held = self.stored(node)
            if isinstance(held, Tensor) and held.is_meta:
                return self._stand_in(held)
            return self._moved(node, held) if node in self.moved and isinstance(held, torch.nn.Parameter) else held
        if not isinstance(val, Tensor):
            is_size = isinstance(val, (int, torch.SymInt)) and node.op != "placeholder"
            return hint(val) if is_size else self.examples.get(node, val)
        if node in self.examples and not self.examples[node].is_meta:
            return self.examples[node]
        return self._stand_in(val)

    def _moved(self, node: fx.Node, held: Tensor) -> Tensor:
        """Somewhat larger, so that what is positive stays so."""
        name = str(node.target)
        if name not in self._parameters:
            by = torch.rand(held.shape, generator=self.random, dtype=torch.float32) / 8
            self._parameters[name] = held.detach() + by.to(held.dtype).to(held.device)
        return self._parameters[name]

    def _stand_in(self, val: Tensor) -> Tensor:
        """Random values of this form.  Numbers that may be flags, token ids or positions are 0 and 1, and of flags that
        hide keys each row leaves the first."""
        size, strides = [hint(s) for s in val.shape], [hint(s) for s in val.stride()]
        made = torch.empty_strided(size, strides, dtype=val.dtype, device=with_values(val.device))
        if val.is_floating_point() or val.is_complex():
            return made.copy_(torch.randn(size, generator=self.random))
        made.copy_(torch.randint(2, size, generator=self.random))
        if made.dim():
            made[..., :1] = 1
        return made
