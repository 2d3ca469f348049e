"""Causal attentions over a cache of keys and values: GroupQueryAttention, for a whole prompt and for each token after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch

from attnopt.errors import ExportError
from attnopt.graph.emitter import Emitter
from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export.builder import ORT, Builder
from attnopt.onnx.export.choose_form import Form, OnnxSite
from attnopt.onnx.export.mark import Operands, Settle
from attnopt.onnx.export.write_form import flat, heads_of
from attnopt.patterns import Pattern
from attnopt.patterns.bands import Band

PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"  # by layer, and "key" or "value"


def cached(specs: Mapping[str, AttentionSpec]) -> Settle:
    """Every attention over a cache.  ``specs``: the specs of the sites, by name.  Raises ExportError if one is unsupported."""

    def settle(emit: Emitter, site: OnnxSite, operands: Operands) -> tuple[Operands, OnnxSite, Form]:
        spec = specs.get(site.name)
        if spec is None:
            raise ExportError(
                "this attention was left unchanged, so its keys and values cannot be cached",
                site=site.name,
                hint='use a policy that fuses every attention: {"*": "fuse", ...}',
            )
        pattern = _pattern(site, spec)
        kept = {role: operands[role] if role in ("q", "k", "v") else None for role in operands}
        return kept, replace(site, pattern=pattern), Form("GroupQueryAttention over a cache", 0.0)

    return settle


def _pattern(site: OnnxSite, spec: AttentionSpec) -> Pattern:
    """What queries see of unpadded inputs: everything before them, or a window of that."""
    if spec.is_cross or not site.is_square:
        raise _error(site.name, "its keys and queries come from different sequences")
    for what, given in {
        "a bias on its scores": spec.has_bias,
        "sinks": spec.has_sinks,
        "blocks chosen at run time": spec.selection is not None,
        "a mask other than a padding mask": spec.has_mask and spec.seen_as is None,
        f"elements of type {site.dtype}": site.dtype != torch.float32,
        f"heads of {site.head_dim} and {site.value_dim} features": site.head_dim % 8 or site.value_dim != site.head_dim,
        f"a scale of {site.scale:g}": not site.scale > 0,
    }.items():
        if given:
            raise _error(site.name, f"it has {what}, which GroupQueryAttention does not support")
    pattern = spec.visible_pattern
    match pattern.bands:
        case (Band(high=0, step=1, first=None),):
            return pattern
    raise _error(
        site.name, f"the pattern is {pattern}, but GroupQueryAttention supports only Causal() and a causal window"
    )


def _error(site: str, why: str) -> ExportError:
    hint = (
        "a decoder needs causal attentions, each with its keys and values in one cache; use export_onnx for all others"
    )
    return ExportError(why, site=site, hint=hint)


@dataclass(frozen=True)
class Cache:
    """The graph's inputs and outputs for keys and values: [B, G, length, D] each, all attentions alike in G and D.

    Past and present may be one buffer, longer than its filled part.  The padding mask [B, total length] counts the tokens
    of each sequence, including those of this call; padding is at the end.
    """

    graph: ir.Graph
    batch: int | ir.SymbolicDim
    last: ir.Value  # index of the last token of each sequence
    total: ir.Value  # length of the longest

    @classmethod
    def of(cls, graph: ir.Graph) -> Cache:
        """With its mask and its counts, in a graph whose attentions no longer use a mask.  Raises ExportError."""
        given = {i.name: i for i in graph.inputs}
        ids, mask = given["input_ids"], given.get("attention_mask")
        assert ids.shape is not None
        if mask is None:
            mask = ir.Value(name="attention_mask", type=ir.TensorType(ir.DataType.INT64))
            graph.inputs.append(mask)
        for node, place in list(mask.uses()):
            if node.op_type != "Shape":
                raise ExportError(
                    "the model uses attention_mask outside its attentions", hint="pass position_ids as well"
                )
            node.replace_input_with(place, ids)  # the mask grows with the generated tokens, the input does not
        mask.shape = ir.Shape([ids.shape[0], "total_length"])
        b = Builder(graph, "cache")
        count = b.op("ReduceSum", b.op("Cast", mask, to=ir.DataType.INT32), b.ints(1), keepdims=0)
        last = b.op("Sub", count, b.constant(np.asarray(1, np.int32)))
        total = b.op("Cast", b.op("Squeeze", b.size(mask, 1)), to=ir.DataType.INT32)
        graph.insert_before(graph[0], b.nodes)
        return cls(graph, ids.shape[0], last, total)

    def write(self, b: Builder, site: OnnxSite, form: Form, operands: Mapping[str, ir.Value | None]) -> ir.Value:
        """[B, H, L, D] of an attention, over the next entry of the cache."""
        q, k, v = (operands[role] for role in ("q", "k", "v"))
        assert q is not None
        assert k is not None
        assert v is not None
        if not site.is_evenly_shared:
            k, v = heads_of(b, k, site.kv_of_head), heads_of(b, v, site.kv_of_head)
            site = replace(site, kv_heads=site.heads)
        attributes = {"num_heads": site.heads, "kv_num_heads": site.kv_heads, "scale": site.scale}
        if site.softcap is not None:
            attributes["softcap"] = site.softcap
        for band in site.pattern.bands or ():
            if band.low is not None:
                attributes["local_window_size"] = 1 - band.low  # the query's own key included
        layer = sum(str(i.name).endswith(".key") for i in self.graph.inputs)
        past = [self._entry(site, PAST.format(layer, what), "past_length") for what in ("key", "value")]
        inputs = (flat(b, q), flat(b, k), flat(b, v), *past, self.last, self.total)
        made = b.op("GroupQueryAttention", *inputs, domain=ORT, outputs=3, **attributes)
        node = made.producer()
        assert node is not None
        for output, what in zip(node.outputs[1:], ("key", "value"), strict=True):
            entry = self._entry(site, PRESENT.format(layer, what), "present_length")
            output.name, output.shape, output.type = entry.name, entry.shape, entry.type
        self.graph.inputs.extend(past)
        self.graph.outputs.extend(node.outputs[1:])
        return b.op("Transpose", b.op("Reshape", made, b.ints(0, 0, site.heads, site.head_dim)), perm=[0, 2, 1, 3])

    def _entry(self, site: OnnxSite, name: str, length: str) -> ir.Value:
        shape = ir.Shape([self.batch, site.kv_heads, length, site.head_dim])
        return ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
