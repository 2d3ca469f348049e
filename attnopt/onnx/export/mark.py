"""Every attention of a graph as one placeholder node, which the export turns into the form that ONNX has for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.base.sizes import hint, is_static, same_size
from attnopt.graph.cleanup import prune_unused_state, sweep
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import RESHAPES, aten, dtype, is_call, shape, value
from attnopt.ir.operands import ROLES, selected_pairs
from attnopt.lower.lower import copy_program
from attnopt.match.anchors import SDPA
from attnopt.onnx.export.choose_form import WITH_ATTENTION, Form, OnnxSite, choose
from attnopt.onnx.export.mask_split import soft_floor, without_pattern
from attnopt.onnx.export.split_projections import apart
from attnopt.patterns import Causal, Full, Pattern, parse
from attnopt.slicing.weight_store import Weights

Operands = dict[str, fx.Node | None]
Settle = Callable[[Emitter, OnnxSite, Operands], tuple[Operands, OnnxSite, Form]]
DOMAIN, OP = "attnopt", "Attention"  # the placeholder's name in the exported graph; it never reaches the file


@dataclass(frozen=True)
class _Call:
    """The 4-D operands of an attention call, and its options."""

    operands: Mapping[str, fx.Node | None]
    pattern: Pattern
    kv_of_head: tuple[int, ...]
    scale: float
    softcap: float | None = None


@dataclass(frozen=True)
class Marked:
    """The attention of a placeholder, its chosen form, and the graph node that it replaces."""

    site: OnnxSite
    form: Form
    node: fx.Node
    given: frozenset[str] = frozenset()  # the operands' roles


def mark(
    gm: fx.GraphModule, patterns: Mapping[str, Pattern], settle: Settle, takes_apart: bool = True
) -> tuple[fx.GraphModule, tuple[Marked, ...]]:
    """A copy of ``gm`` with placeholders for its attentions, numbered in the order in which they run.

    ``patterns``: the known patterns of the sites, by name; a mask that only repeats one is dropped.  ``settle`` says which
    form each attention takes.  ``takes_apart``: unpack packed projections.
    """
    module, table = copy_program(gm)
    original = {new: old for old, new in table.items()}
    weights = Weights(module)
    marked: list[Marked] = []
    for node in list(module.graph.nodes):
        if not (is_attention(node) or is_call(node, SDPA)):
            continue
        name = str(node.meta.get("attnopt", {}).get("site", node.name))
        emit = Emitter(module.graph, node)
        call = _operator(emit, node) if is_attention(node) else _sdpa(emit, node, patterns.get(name, Full()))
        if call is None:
            continue
        given = _apart(emit, weights, call.operands) if takes_apart else dict(call.operands)
        operands, site, form = settle(emit, _site(name, call), given)
        placeholder = _placeholder(emit, site, len(marked), operands)
        lead = value(node).shape[:-2]
        if len(lead) != 2:
            placeholder = emit.inline(lambda o, like: o.reshape(like.shape), placeholder, node)
        node.replace_all_uses_with(placeholder)
        module.graph.erase_node(node)
        marked.append(Marked(site, form, original[node], frozenset(_given(operands))))
    for node in module.graph.nodes:
        if is_call(node, *RESHAPES):  # a placeholder's strides are not the attention's
            node.target = aten.reshape.default
    sweep(module)
    weights.settle()
    prune_unused_state(module)
    return module, tuple(marked)


def _apart(emit: Emitter, weights: Weights, operands: Mapping[str, fx.Node | None]) -> Operands:
    projected = [operands[role] for role in ("q", "k", "v")]
    q, k, v = (n for n in projected if n is not None)
    return {**operands, **dict(zip("qkv", apart(emit, weights, q, k, v), strict=True))}


def is_attention(node: fx.Node) -> bool:
    """A call of attnopt's own attention operator."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    return schema is not None and schema.name == "attnopt::attention"


def _operator(emit: Emitter, node: fx.Node) -> _Call:
    given = _arguments(node)
    operands: dict[str, fx.Node | None] = {role: given[role] for role in ROLES}
    if (selected := given.get("selected")) is not None:
        q, k, mask = (operands[role] for role in ("q", "k", "mask"))
        assert q is not None
        assert k is not None
        kept = emit.inline(lambda s, q, k: selected_pairs(s, q.shape[2], k.shape[2]), selected, q, k)
        operands["mask"] = kept if mask is None else emit.call(aten.bitwise_and.Tensor, kept, mask)
    return _Call(operands, parse(given["pattern"]), tuple(given["kv_of_head"]), given["scale"], given["softcap"])


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of a call by its name."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments}


def _sdpa(emit: Emitter, node: fx.Node, known: Pattern) -> _Call | None:
    """None if the call draws random numbers."""
    given = _arguments(node)
    if given["dropout_p"]:
        return None
    q, k, v, attn_mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    is_causal, scale = given["is_causal"], given["scale"]
    if len(value(q).shape) != 4:
        q, k, v, attn_mask = _four_axes(emit, q, k, v, attn_mask)
    heads, kv_heads = shape(q)[1], shape(k)[1]
    kv_of_head = tuple(h * kv_heads // heads for h in range(heads)) if given["enable_gqa"] else tuple(range(heads))
    pattern: Pattern = Full()
    bias = mask = None
    if is_causal and same_size(value(q).shape[2], value(k).shape[2]):
        pattern = Causal()
    elif is_causal:  # the triangle is aligned with the first key; a pattern's with the last
        mask = emit.inline(lambda a, b: a.new_ones(a.shape[2], b.shape[2], dtype=torch.bool).tril(), q, k)
    elif attn_mask is not None:
        bias, mask = (None, attn_mask) if dtype(attn_mask) == torch.bool else (attn_mask, None)
    if known != Full() and attn_mask is not None:
        bias, mask, is_implied = without_pattern(emit, bias, mask, known, len(kv_of_head))
        pattern = known if is_implied else pattern
    operands = dict(zip(ROLES, (q, k, v, bias, mask, None), strict=True))
    return _Call(operands, pattern, kv_of_head, float(value(q).shape[-1] ** -0.5 if scale is None else scale))


def _four_axes(
    emit: Emitter, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None
) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]:
    """Operands of 3 axes, or of more than 4, with one head per index of their leading axes."""

    def four(x: Tensor) -> Tensor:
        return x.reshape(-1, 1, *x.shape[-2:])

    if mask is not None and len(value(mask).shape) > 2:
        mask = emit.inline(lambda m, q: four(m.expand(*q.shape[:-2], *m.shape[-2:])), mask, q)
    return emit.inline(four, q), emit.inline(four, k), emit.inline(four, v), mask


def _site(name: str, call: _Call) -> OnnxSite:
    q, k, v = (call.operands[role] for role in ("q", "k", "v"))
    assert q is not None
    assert k is not None
    assert v is not None
    batch, _, *lengths = value(q).shape[:3] + value(k).shape[2:3]
    q_len, kv_len = (hint(n) if is_static(n) else -1 for n in lengths)
    return OnnxSite(
        name,
        call.pattern,
        call.kv_of_head,
        shape(k)[1],
        shape(q)[3],
        shape(v)[3],
        call.scale,
        call.softcap,
        dtype(q),
        q_len,
        kv_len,
        same_size(*lengths),
        (hint(batch), shape(q)[2], shape(k)[2]),
    )


def fastest(contrib: bool, opset: int = WITH_ATTENTION) -> Settle:
    """The cheapest form of each attention; a pattern that it does not know becomes a part of the mask operand.

    ``contrib``: the operators of ONNX Runtime may be used.
    """

    def settle(emit: Emitter, site: OnnxSite, operands: Operands) -> tuple[Operands, OnnxSite, Form]:
        if site.is_static and site.pattern.covers(site.q_len, site.kv_len, num_heads=site.heads):
            site = replace(site, pattern=Full())
        form = choose(site, _given(operands), contrib, opset)
        if form.kind == "Attention" and site.pattern != Full():
            seen, mask = _dense_mask(emit, site, operands), operands["mask"]
            operands["mask"] = seen if mask is None else emit.call(aten.bitwise_and.Tensor, seen, mask)
            site = replace(site, pattern=Full())
            form = choose(site, _given(operands), contrib, opset)
        for role in ("bias", "mask", "sinks"):
            operand = operands[role]
            if operand is not None and len(value(operand).shape) < 4:
                operands[role] = emit.inline(_with_four_axes, operand)
        if (bias := operands["bias"]) is not None and opset >= WITH_ATTENTION:
            operands["bias"] = soft_floor(emit, bias)
        return operands, site, form

    return settle


def _with_four_axes(x: Tensor) -> Tensor:
    return x.reshape(*[1] * (4 - x.dim()), *x.shape)


def _given(operands: Mapping[str, fx.Node | None]) -> set[str]:
    return {role for role, node in operands.items() if node is not None}


def _dense_mask(emit: Emitter, site: OnnxSite, operands: Operands) -> fx.Node:
    """The pattern's mask, [1, 1 or H, L, S]."""
    q, k = operands["q"], operands["k"]
    assert q is not None
    assert k is not None

    def seen(q: Tensor, k: Tensor) -> Tensor:
        return site.pattern.mask(q.shape[2], k.shape[2], num_heads=site.heads).unsqueeze(0)

    return emit.inline(seen, q, k)


def _placeholder(emit: Emitter, site: OnnxSite, number: int, operands: Mapping[str, fx.Node | None]) -> fx.Node:
    given = [role for role in ROLES if operands[role] is not None]

    def attend(*tensors: Tensor) -> Tensor:
        found = dict(zip(given, tensors, strict=True))
        q = found["q"]
        made: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP}",
            [found.get(role) for role in ROLES],
            {"site": number},
            dtype=found["v"].dtype,
            shape=[*q.shape[:3], site.value_dim],
            version=1,
        )
        return made

    return emit.inline(attend, *(node for role in given if (node := operands[role]) is not None))
