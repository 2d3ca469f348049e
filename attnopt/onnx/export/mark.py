"""Every attention of a graph as one placeholder node, which the export turns into the form that ONNX has for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from attnopt.graph.cleanup import prune_unused_state, remove_unused_nodes, share_equal_nodes
from attnopt.graph.copies import copy_program
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import RESHAPES, aten, is_call, opname, value
from attnopt.ir.operands import ROLES, Operands
from attnopt.lower.attention_calls import is_attention_call
from attnopt.lower.operator_calls import called_spec, hidden_by_both, write_out_lse
from attnopt.lower.received_calls import write_out_received
from attnopt.onnx.export.canonical import Canonical, canonical, site_of
from attnopt.onnx.export.choose_form import WITH_ATTENTION, Form, OnnxSite, choose
from attnopt.onnx.export.mask_split import soft_floor
from attnopt.onnx.export.sent_calls import SentCall, sent_call
from attnopt.onnx.export.split_projections import apart
from attnopt.patterns import Full, Pattern
from attnopt.slicing.weight_store import Weights

Settle = Callable[[Emitter, Canonical], tuple[Canonical, Form]]
DOMAIN, OP = "attnopt", "Attention"  # the placeholder's name in the exported graph; it never reaches the file


@dataclass(frozen=True)
class Marked:
    """The attention of a placeholder, its chosen form, and the graph node that it replaces."""

    site: OnnxSite
    form: Form
    node: fx.Node


def mark(gm: fx.GraphModule, settle: Settle, takes_apart: bool = True) -> tuple[fx.GraphModule, tuple[Marked, ...]]:
    """A copy of ``gm`` with placeholders for its attentions, numbered in the order in which they run.

    ``settle`` says which form each attention takes.  ``takes_apart``: unpack packed projections.
    """
    module, table = copy_program(gm)
    original = {new: old for old, new in table.items()}
    weights = Weights(module)
    marked: list[Marked] = []
    sent = {found.made: n for n in module.graph.nodes if (found := sent_call(n)) is not None}
    for node in [n for n in module.graph.nodes if n in sent or is_attention_call(n)]:
        emit = Emitter(module.graph, node)
        if node in sent:
            of_senders = _of_senders(emit, sent_call(sent[node]))
            node.replace_all_uses_with(_placeholder(emit, of_senders, len(marked)))
            marked.append(Marked(of_senders.site, choose(of_senders.site, contrib=False), original[node]))
            continue
        call = canonical(emit, node)
        if call is None:
            continue
        if takes_apart:
            call = replace(call, operands=apart(weights, call.operands))
        call, form = settle(emit, call)
        placeholder = _placeholder(emit, call, len(marked))
        if len(value(node).shape) != 4:
            placeholder = emit.inline(lambda o, like: o.reshape(like.shape), placeholder, node)
        node.replace_all_uses_with(placeholder)
        module.graph.erase_node(node)
        marked.append(Marked(call.site, form, original[node]))
    remove_unused_nodes(module)
    write_out_lse(module.graph)
    write_out_received(module.graph)
    for node in module.graph.nodes:
        if is_call(node, *RESHAPES):  # a placeholder's strides are not the attention's
            node.target = aten.reshape.default
    share_equal_nodes(module)  # layers with one pattern have one mask
    remove_unused_nodes(module)
    weights.settle()
    prune_unused_state(module)
    return module, tuple(marked)


def _of_senders(emit: Emitter, found: SentCall | None) -> Canonical:
    assert found is not None
    operands = found.operands.map(lambda role, x: x if role in "qkv" else _with_four_axes(emit, x))
    spec = replace(called_spec(operands, found.kv_of_head, found.scale, Full(), found.softcap), sends=True)
    name = found.made.meta.get("attnopt", {}).get("site", found.made.name)
    return Canonical(site_of(name, spec, operands), operands, None)


def fastest(contrib: bool, opset: int = WITH_ATTENTION) -> Settle:
    """The cheapest form of each attention; a pattern that it does not know becomes a part of the mask operand.

    ``contrib``: the operators of ONNX Runtime may be used.
    """

    def settle(emit: Emitter, call: Canonical) -> tuple[Canonical, Form]:
        site, operands, pattern = call.site, call.operands, call.site.spec.pattern
        if site.is_static and pattern.covers(site.q_len, site.kv_len, num_heads=site.spec.num_heads):
            call = call.having(operands, pattern := Full())
        form = choose(call.site, contrib, opset)
        if form.kind == "Attention" and pattern != Full():
            mask = hidden_by_both(emit, _dense_mask(emit, operands, pattern, site.spec.num_heads), operands.mask)
            operands = replace(operands, mask=mask)
            call = call.having(operands, Full())
            form = choose(call.site, contrib, opset)
        given = {role: _with_four_axes(emit, operand) for role, operand in operands.given.items() if role not in "qkv"}
        if "bias" in given and opset >= WITH_ATTENTION:
            given["bias"] = soft_floor(emit, given["bias"])
        return replace(call, operands=replace(operands, **given)), form

    return settle


def _with_four_axes(emit: Emitter, operand: fx.Node) -> fx.Node:
    if len(value(operand).shape) >= 4:
        return operand
    return emit.inline(lambda x: x.reshape(*[1] * (4 - x.dim()), *x.shape), operand)


def _dense_mask(emit: Emitter, operands: Operands[fx.Node], pattern: Pattern, heads: int) -> fx.Node:
    """The pattern's mask, [1, 1 or H, L, S]."""

    def seen(q: Tensor, k: Tensor) -> Tensor:
        return pattern.mask(q.shape[2], k.shape[2], num_heads=heads).unsqueeze(0)

    return emit.inline(seen, operands.q, operands.k)


def _placeholder(emit: Emitter, call: Canonical, number: int) -> fx.Node:
    given = call.operands.given

    def attend(*tensors: Tensor) -> Tensor:
        found = dict(zip(given, tensors, strict=True))
        made: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP}",
            [found.get(role) for role in ROLES],
            {"site": number},
            dtype=found["v"].dtype,
            shape=[*found["q"].shape[:3], found["v"].shape[3]],
            version=1,
        )
        return made

    return emit.inline(attend, *given.values())


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """Those of a marked graph, in the order of their numbers; the first argument of each lists the operands by ``ROLES``."""
    return [n for n in graph.nodes if opname(n) == "_symbolic" and OP in n.args]
