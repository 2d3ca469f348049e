"""Canonicalization: remove or unify spellings without semantic difference."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx
from torch.fx.node import Target

from attnopt.base.sizes import hint, is_static, same_size
from attnopt.graph.cleanup import remove_unused_nodes
from attnopt.graph.constants import filling
from attnopt.graph.einsums import in_pairs
from attnopt.graph.emitter import Emitter
from attnopt.graph.interpreter import Interpreter
from attnopt.graph.nodes import (
    arg,
    aten,
    calls,
    dtype,
    get_attr,
    is_call,
    is_state,
    is_tensor,
    operand,
    opname,
    shape,
    value,
    wrap,
)
from attnopt.graph.ops import ADD, COPIES, FACTORS, SUB, Kind, aliases, is_random, named, of, rules
from attnopt.graph.pieces import moved
from attnopt.graph.scatters import filled, full, joined, sizes_of, written
from attnopt.graph.sdpa import SDPA, call_arguments
from attnopt.graph.select import restrict
from attnopt.graph.value_names import inherit

STRIDED = named("view_as_complex as_strided view.dtype")  # these depend on the memory layout
_ALIASES = aliases()
_DROPOUTS = of(Kind.DROPOUT)
_SAME_IF_AS_LARGE = of(Kind.RESHAPE, Kind.CAST, Kind.EXPAND) | named("slice")
_UNCHANGED = COPIES - named("detach")  # which stops gradients
LINKS = 6  # chained operators, as in arange(heads) // group
FEW = 64  # indices of one axis, such as a choice of heads or of a packed role, to write as slices


Rule = Callable[
    [fx.GraphModule, fx.Node], fx.Node
]  # returns the replacement of the node, possibly the node itself, changed


def tidy(gm: fx.GraphModule) -> None:
    """Canonicalize: remove metadata asserts, and copies, casts and slices that change nothing.

    Every ``view`` becomes a ``reshape``, so nothing depends on the strides of a removed copy.
    """
    outputs = set(next(iter(reversed(gm.graph.nodes))).all_input_nodes)
    strides_matter = any(calls(n, STRIDED) for n in gm.graph.nodes)
    for node in list(gm.graph.nodes):
        if is_call(node, aten._assert_tensor_metadata.default):
            gm.graph.erase_node(node)
            continue
        node.target = _ALIASES.get(node.target, node.target)
        if (rule := _RULES.get(node.target)) is not None or (
            node not in outputs and (rule := _REPLACED.get(node.target)) is not None
        ):
            node = rule(gm, node)
        if strides_matter and is_call(node, aten.clone.default, aten.contiguous.default):
            continue
        if node in outputs and not calls(node, _DROPOUTS):  # an inactive dropout returns the tensor itself
            continue
        if is_tensor(node) and (same := _changes_nothing(node)) is not None:
            _replaced(node, same)
    remove_unused_nodes(gm)


def _as_reshape(_: fx.GraphModule, node: fx.Node) -> fx.Node:
    node.target = aten.reshape.default
    return node


def _over_named_axes(_: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A reduction over all axes names them: ONNX wants that."""
    if not (arg(node, 1) or node.kwargs):
        node.args = (operand(node), list(range(len(shape(operand(node))))), *node.args[2:])
    return node


def _result(_: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One result of an operator that has several."""
    if is_call(arg(node, 0), aten._native_batch_norm_legit_no_training.default):
        _as_batch_norm(node)
    elif opname(operand(node)).startswith("_scaled_dot_product_"):
        _as_attention(node)
    return node


def _as_filled(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    number = filling(node)
    return node if number is None else _replaced(node, full(Emitter(gm.graph, node), node, number))


def _as_joined(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    return _replaced(node, joined(Emitter(gm.graph, node), node))


def _as_moved(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    return _replaced(node, moved(Emitter(gm.graph, node), node))


def _as_put(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    return _replaced(node, filled(Emitter(gm.graph, node), node))


def _as_written(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    return _replaced(node, written(Emitter(gm.graph, node), node))


def _spell_out(_: fx.GraphModule, node: fx.Node) -> fx.Node:
    """flatten, unflatten, expand_as and type_as as the reshape, expand or cast that they are."""
    if is_call(node, aten.type_as.default):
        like, x = value(node), operand(node)
        moved = {} if value(x).device == like.device else {"device": like.device}
        node.target, node.args, node.kwargs = aten._to_copy.default, (x,), {"dtype": like.dtype, **moved}
    elif is_call(node, aten.expand_as.default):
        sizes = sizes_of(Emitter(node.graph, node), node)
        if sizes is not None:
            node.target, node.args = aten.expand.default, (operand(node), sizes)
    elif all(map(is_static, value(node).shape)):
        node.target, node.kwargs = aten.reshape.default, {}
        node.args = (operand(node), [hint(s) for s in value(node).shape])
    return node


def _squeeze_ones(_: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Longer axes stay in torch, and ONNX's Squeeze must not name them."""
    x, axes = operand(node), arg(node, 1)
    ones = [a for a in ([axes] if isinstance(axes, int) else axes) if same_size(value(x).shape[a], 1)]
    if not ones:
        node.target, node.args = aten.alias.default, (x,)
    elif is_call(node, aten.squeeze.dims):
        node.args = (x, ones)
    return node


def _as_batch_norm(node: fx.Node) -> None:
    """The first result of torch's decomposed batch norm, as the batch norm that it was."""
    if arg(node, 1) != 0:
        return
    *tensors, momentum, eps = operand(node).args
    node.target, node.args = aten.batch_norm.default, (*tensors, False, momentum, eps, False)


def _as_attention(node: fx.Node) -> None:
    """The first result of one of torch's attention kernels, as a plain attention."""
    if arg(node, 1) != 0:
        return
    given = call_arguments(operand(node))
    bias = given.get("attn_mask", given.get("attn_bias"))
    node.target = SDPA
    node.args = (*(given[name] for name in ("query", "key", "value")), bias, given["dropout_p"], given["is_causal"])
    node.kwargs = {name: given[name] for name in ("scale", "enable_gqa") if name in given}


def _as_pairs(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    return _replaced(node, in_pairs(Emitter(gm.graph, node), node))


def _as_slices(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A selection of known indices of one axis as joined slices; otherwise ``node`` itself."""
    found = _known_places(gm, node)
    if found is None:
        return node
    x, axis, places = found
    return _replaced(node, restrict(Emitter(gm.graph, node), x, {axis: places}))


def _replaced(node: fx.Node, made: fx.Node | None) -> fx.Node:
    """``made`` instead of ``node``; ``node`` if there is no replacement."""
    if made is None:
        return node
    inherit(made, node)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    return made


def _known_places(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, int, tuple[int, ...]] | None:
    """(the tensor, the axis, the selected indices), if these are few and known."""
    x = operand(node)
    if is_call(node, aten.index_select.default):
        axis, index = wrap(arg(node, 1), len(shape(x))), arg(node, 2)
    else:
        by_axis = [(a, i) for a, i in enumerate(arg(node, 1)) if i is not None]
        if len(by_axis) != 1:
            return None
        ((axis, index),) = by_axis
    size = value(x).shape[axis]
    if x.op == "get_attr" or not isinstance(size, int) or not isinstance(index, fx.Node):
        return None
    if value(index).dtype not in (torch.int32, torch.int64) or len(shape(index)) != 1 or not 0 < shape(index)[0] <= FEW:
        return None
    if not _is_known(gm, index, LINKS):
        return None
    return x, axis, tuple(wrap(i, size) for i in Interpreter(gm)(index).tolist())


def _is_known(gm: fx.GraphModule, node: fx.Node, links: int) -> bool:
    """At most ``links`` operators compute it, from stored numbers alone."""
    if node.op == "get_attr":
        return not is_state(node) and not get_attr(gm, str(node.target)).is_meta
    if node.op != "call_function" or links == 0 or not is_tensor(node):
        return False
    return not is_random(node.target) and all(_is_known(gm, n, links - 1) for n in node.all_input_nodes)


def _changes_nothing(node: fx.Node) -> fx.Node | None:
    if is_call(node, aten.cat.default):
        return _only_part(node)
    if node.op != "call_function" or not node.args or not is_tensor(arg(node, 0)):
        return None
    x = operand(node)
    before, after = value(x), value(node)
    if calls(node, _UNCHANGED):
        return x
    if calls(node, _DROPOUTS):
        return x if not arg(node, 2) or arg(node, 1) == 0 else None
    same_shape = len(before.shape) == len(after.shape) and all(map(same_size, before.shape, after.shape))
    if not same_shape or before.dtype != after.dtype or before.device != after.device:
        return None
    if calls(node, _SAME_IF_AS_LARGE):
        step = arg(node, 4, 1)
        return x if not is_call(node, aten.slice.Tensor) or step == 1 else None
    scalar = arg(node, 1)
    if calls(node, ADD | SUB) and not isinstance(scalar, fx.Node) and scalar == 0:
        return x
    if calls(node, FACTORS) and not isinstance(scalar, fx.Node) and scalar == 1:
        return x
    return None


def _only_part(node: fx.Node) -> fx.Node | None:
    """The only non-empty tensor of a concatenation, as with an empty cache."""
    parts = [p for p in arg(node, 0) if math.prod(shape(p)) != 0]
    if len(parts) != 1 or len(shape(parts[0])) != len(shape(node)):
        return None
    part = parts[0]
    assert isinstance(part, fx.Node)
    return part if dtype(part) == dtype(node) and all(map(same_size, value(part).shape, value(node).shape)) else None


_RULES: dict[Target, Rule] = rules(
    {
        Kind.RESHAPE: _as_reshape,
        Kind.SHORT: _spell_out,
        "amax amin": _over_named_axes,
        "squeeze.dim squeeze.dims": _squeeze_ones,
        "getitem": _result,
    }
)
_REPLACED: dict[Target, Rule] = rules(
    {  # only nodes that are not outputs, whose names would be lost
        Kind.FILL: _as_filled,
        "index index_select": _as_slices,
        "einsum": _as_pairs,
        "slice_scatter select_scatter": _as_joined,
        "cat": _as_moved,
        "index_put": _as_put,
        "copy": _as_written,
    }
)
