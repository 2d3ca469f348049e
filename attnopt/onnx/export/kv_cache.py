"""Causal attentions over a cache of keys and values: GroupQueryAttention, for a whole prompt and for each token after it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from attnopt.errors import ExportError
from attnopt.graph.emitter import Emitter
from attnopt.ir.operands import Operands
from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export.builder import Attribute, Builder
from attnopt.onnx.export.canonical import Canonical
from attnopt.onnx.export.causal_pattern import bare, reach_of
from attnopt.onnx.export.choose_form import Form, OnnxSite
from attnopt.onnx.export.fused_ops import group_query
from attnopt.onnx.export.head_slots import HeadSlots
from attnopt.onnx.export.sink_tokens import SinkPart, first_position, kept_sinks, sink_part, widened_scales
from attnopt.onnx.export.write_form import flat

PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"  # by layer, and "key" or "value"
WIDTH = 16  # of int8 heads in a rolling buffer: their features are a multiple of it
ROLLING = "window_"  # the name of a rolling buffer's length, before the window's


@dataclass(frozen=True, kw_only=True)
class Kept(Form):
    """How the keys and values of an attention are kept.

    ``slots``: where its heads are.  ``window``: how many keys a query sees, its own included; None for all before it.
    ``sinks``: of the first tokens, it sees so many besides.  ``rolls``: the buffer holds the window and a few more, and forgets
    the oldest; sinks have a buffer of their own.  ``scales``: of int8 keys and values, [G, D] each.
    """

    slots: HeadSlots
    window: int | None = None
    sinks: int = 0
    rolls: bool = False
    scales: tuple[Tensor, Tensor] | None = field(default=None, compare=False, repr=False)

    @property
    def more_features(self) -> int:
        """Of its heads in the buffers, beside sinks: the operator takes multiples of 8, and of 16 in int8."""
        return (8 if self.scales is None else WIDTH) if self.sinks else 0


def cached(emit: Emitter, call: Canonical) -> tuple[Canonical, Form]:
    """An attention over a cache.  Raises ExportError if it is unsupported."""
    dtype, spec = call.site.dtype, call.site.spec
    others = {
        f"elements of type {dtype}": dtype != torch.float32,
        f"heads of {spec.head_dim} and {spec.value_dim} features": spec.head_dim % 8 or spec.value_dim != spec.head_dim,
        f"a scale of {spec.scale:g}": not spec.scale > 0,
    }
    alone = bare(call, "GroupQueryAttention", others)
    window, sinks = reach_of(alone.site.spec.pattern)
    kind = "GroupQueryAttention over a cache"
    return alone, Kept(kind=kind, cost=0.0, slots=HeadSlots.of(alone.site.spec), window=window, sinks=sinks)


@dataclass(frozen=True)
class Cache:
    """The graph's inputs and outputs for keys and values: [B, G, length, D] each, all attentions alike in G and D.

    Past and present may be one buffer, longer than its filled part.  The padding mask [B, total length] counts the tokens
    of each sequence, including those of this call; padding is at the end.  A rolling buffer's length is an axis of its own.
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

    def write(self, b: Builder, site: OnnxSite, form: Form, operands: Operands[ir.Value]) -> ir.Value:
        """[B, H, L, D] of an attention, over the next entry of the cache."""
        assert isinstance(form, Kept)
        slots, more = form.slots, form.more_features
        spec, (q, k, v) = slots.spec(site.spec), slots.fill(b, site.spec, operands)
        layer = sum(str(i.name).endswith(".key") for i in self.graph.inputs)
        sinks = self._sinks(b, spec, form, layer, q, k, v) if form.sinks else None
        if sinks is not None:
            q, k, v = sinks.widened(b, spec, more, q, k, v)
        width = spec.head_dim + more
        past = [self._entry(spec, form, PAST.format(layer, what), "past_length") for what in ("key", "value")]
        inputs = (*(flat(b, x) for x in (q, k, v)), *past, self.last, self.total)
        scales = [widened_scales(slots.scales(s), more) for s in form.scales or ()]
        given = [b.constant(s[None, :, None].numpy()) for s in scales]
        made = group_query(
            b, spec, *inputs, *[None] * 5 * bool(scales), *given, window=form.window, **_attributes(form)
        )
        node = made.producer()
        assert node is not None
        for output, what in zip(node.outputs[1:], ("key", "value"), strict=True):
            entry = self._entry(spec, form, PRESENT.format(layer, what), "present_length")
            output.name, output.shape, output.type = entry.name, entry.shape, entry.type
        self.graph.inputs.extend(past)
        self.graph.outputs.extend(node.outputs[1:])
        by_head = b.op("Transpose", b.op("Reshape", made, b.ints(0, 0, spec.num_heads, width)), perm=[0, 2, 1, 3])
        return slots.take(b, site.spec, by_head if sinks is None else sinks.joined(b, spec, by_head))

    def _sinks(
        self, b: Builder, spec: AttentionSpec, form: Kept, layer: int, q: ir.Value, k: ir.Value, v: ir.Value
    ) -> SinkPart:
        """Of the first tokens, over a cache of their own."""
        assert form.window is not None
        first, kept = first_position(b, self.last, k), list[ir.Value]()
        for what, new in (("sink_key", k), ("sink_value", v)):
            shape = ir.Shape([self.batch, spec.num_kv_heads, form.sinks, spec.head_dim])
            past = ir.Value(name=PAST.format(layer, what), shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
            present = kept_sinks(b, past, new, first, form.sinks)
            present.name, present.shape, present.type = PRESENT.format(layer, what), past.shape, past.type
            self.graph.inputs.append(past)
            self.graph.outputs.append(present)
            kept.append(present)
        return sink_part(b, spec, form.window, q, k, (kept[0], kept[1]), first, form.sinks)

    def _entry(self, spec: AttentionSpec, form: Kept, name: str, length: str) -> ir.Value:
        length = f"{ROLLING}{form.window}" if form.rolls else length
        element = ir.DataType.FLOAT if form.scales is None else ir.DataType.INT8
        shape = ir.Shape([self.batch, spec.num_kv_heads, length, spec.head_dim + form.more_features])
        return ir.Value(name=name, shape=shape, type=ir.TensorType(element))


def _attributes(form: Kept) -> dict[str, Attribute]:
    """Of the operator, for its cache."""
    found: dict[str, Attribute] = {"sliding_window_cache": 1} if form.rolls else {}
    if form.sinks:
        found["smooth_softmax"] = 1
    if form.scales is None:
        return found
    return {**found, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
