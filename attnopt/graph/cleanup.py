"""Dead code and common subexpression elimination."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from attnopt.graph.emitter import _key
from attnopt.graph.nodes import aten, is_call, is_state, opname, value
from attnopt.graph.ops import is_random
from attnopt.graph.sdpa import SDPA, call_arguments, sdpa_arguments


def remove_unused_nodes(gm: fx.GraphModule) -> None:
    """Remove unused nodes.  torch would keep an unused fused attention, because it might draw random numbers."""
    gm.graph.eliminate_dead_code(is_impure_node=has_effects)
    gm.recompile()


def has_effects(node: fx.Node) -> bool:
    """It is not there for its result alone: an input, the output, a check, a write."""
    if node.op in ("placeholder", "output", "call_module") or "attnopt.call" in node.meta:
        return True
    return writes(node) or checks(node)


def checks(node: fx.Node) -> bool:
    """It fails if a number or a size is not what the model expects, and does nothing else."""
    return opname(node).startswith(("_assert", "sym_constrain"))


def writes(node: fx.Node) -> bool:
    """It changes one of its operands: state, or an input."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def draws(node: fx.Node) -> bool:
    """It draws random numbers."""
    if is_call(node, SDPA):
        return bool(sdpa_arguments(node).dropout_p)
    if not is_random(node.target):
        return False
    given = call_arguments(node)
    is_off = any(given.get(name) is False for name in ("train", "training"))
    return not is_off and not any(given.get(name) == 0 for name in ("p", "dropout", "dropout_p"))


def share_equal_nodes(gm: fx.GraphModule) -> None:
    """Common subexpression elimination: every layer of a model may compute the same mask."""
    known: dict[object, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not (checks(node) or not (has_effects(node) or _varies(node))):
            continue
        same = known.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)


def computes_same(a: fx.Node, b: fx.Node) -> bool:
    """The same operators on the same tensors, written once or twice."""
    stack, seen = [(a, b)], set[tuple[fx.Node, fx.Node]]()
    while stack:
        a, b = pair = stack.pop()
        if a is b or pair in seen:
            continue
        seen.add(pair)
        if a.op != b.op or a.target != b.target or a.op not in ("call_function", "get_attr") or is_state(a):
            return False
        if a.op == "call_function" and (_varies(a) or _numbers_of(a) != _numbers_of(b)):
            return False
        above = a.all_input_nodes, b.all_input_nodes
        if len(above[0]) != len(above[1]):
            return False
        stack += zip(*above, strict=True)
    return True


def _numbers_of(node: fx.Node) -> object:
    """The arguments of a call, with each node replaced by its index among the inputs."""
    place = {n: i for i, n in enumerate(node.all_input_nodes)}
    return _key(fx.node.map_arg((node.args, node.kwargs), lambda n: f"node {place[n]}"))


def _varies(node: fx.Node) -> bool:
    """The operator may return a different result each time."""
    if is_call(node, aten.sym_size.int) or getattr(node.target, "__module__", "") == "_operator":
        return False
    return draws(node) or "empty" in opname(node) or not _makes_tensors(node)


def _makes_tensors(node: fx.Node) -> bool:
    """Its result is a tensor or, of an operator of torch, several: subgraphs may draw random numbers."""
    found = value(node)
    if isinstance(found, (tuple, list)) and isinstance(node.target, torch._ops.OpOverload):
        return all(isinstance(x, Tensor) for x in found)
    return isinstance(found, Tensor)


def prune_unused_state(gm: fx.GraphModule) -> None:
    """Drop parameters, buffers and empty submodules that no node reads any more."""
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    for name in [
        n for n, _ in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    ]:
        if name not in used and not any(name.startswith(u + ".") for u in used):
            owner, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(owner), leaf)
