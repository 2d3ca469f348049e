"""Whether an optimized graph is a decoder's, whose attentions can read a cache; and these attentions, marked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from attnopt.base.sizes import is_static
from attnopt.compiler.origin import Origin
from attnopt.errors import ExportError
from attnopt.graph.cleanup import prune_unused_state, remove_unused_nodes
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import calls, inputs_of, is_tensor, shape, value
from attnopt.graph.ops import Kind, of
from attnopt.ir.site import Site
from attnopt.lower.attention_calls import is_attention_call
from attnopt.onnx.export.cache_names import without_caches
from attnopt.onnx.export.canonical import canonical
from attnopt.onnx.export.mark import Marked, Settle, mark
from attnopt.slicing.pull import pull
from attnopt.slicing.selection import Demand
from attnopt.slicing.selector import Selector
from attnopt.slicing.weight_store import Weights

_TAKEN = of(Kind.SLICE, Kind.JOIN)
INPUTS = ("input_ids", "attention_mask", "position_ids")


def with_cache(
    gm: fx.GraphModule, origin: Origin, settle: Settle | None = None
) -> tuple[fx.GraphModule, tuple[Marked, ...]]:
    """The graph of a decoder, each attention marked as one over a cache; ``settle``: in which form, by default as
    GroupQueryAttention.  Raises ExportError where that cannot be."""
    from attnopt.onnx.export.kv_cache import cached

    _check_inputs(gm, origin.report.fixed_axes)
    marked_gm, marked = mark(_without_own_cache(gm, origin), settle or cached)
    check_edits(origin.sites)
    _check_sites(marked, [s.name for s in origin.sites])
    return marked_gm, marked


def _without_own_cache(gm: fx.GraphModule, origin: Origin) -> fx.GraphModule:
    """The graph without the cache that the model itself returns, whose heads that were removed need no weights anymore."""
    made = without_caches(gm, origin)
    if made is gm:
        return gm
    weights = Weights(made)
    for node in filter(is_attention_call, list(made.graph.nodes)):
        emit = Emitter(made.graph, node)
        call = canonical(emit, node)
        for operand in () if call is None else (call.operands.k, call.operands.v):
            if (heads := _heads_of(operand)) is not None:
                operand.replace_all_uses_with(Selector(emit, weights).select(*heads))
    remove_unused_nodes(made)
    weights.settle()
    prune_unused_state(made)
    return made


def _heads_of(operand: fx.Node) -> Demand | None:
    """Of what tensor it is some heads, where nothing else reads the others."""
    found = pull(operand, {1: tuple(range(shape(operand)[1]))}) if calls(operand, _TAKEN) else None
    if found is None or len(found.demands) != 1:
        return None
    source = found.demands[0][0]
    taken = {operand, *operand.all_input_nodes}
    return found.demands[0] if set(source.users) <= taken else None


def _check_inputs(gm: fx.GraphModule, fixed: Sequence[str]) -> None:
    """Token ids and related inputs, with dynamic batch and length."""
    inputs = {n.name: n for n in inputs_of(gm.graph) if is_tensor(n)}
    if "input_ids" not in inputs or not set(inputs) <= set(INPUTS):
        raise ExportError(
            f"a decoder takes input_ids, and optionally attention_mask and position_ids; this model takes {list(inputs)}",
            hint="capture the model with these inputs only, and with use_cache=False if it has its own cache",
        )
    for name, node in inputs.items():
        sizes = value(node).shape
        if len(sizes) != 2 or any(map(is_static, sizes)):
            raise ExportError(
                f"{name} is [{', '.join(map(str, sizes))}], expected [batch, length] with both axes dynamic",
                hint="pass an example of several sequences of several tokens"
                if any(f.startswith(f"{name}[") for f in fixed)
                else 'optimize the model with dynamic_shapes="auto"',
            )


def check_edits(sites: Sequence[Site]) -> None:
    """Its steps see one token at a time: what depends on others' places or values cannot be part of them."""
    for site in sites:
        if site.spec.weight_gains is not None:
            raise ExportError(
                f"GroupQueryAttention does not support gains on weights: {site.spec.weight_gains}",
                site=site.name,
                hint="use export_onnx, or leave segment-gain out",
            )
        if site.spec.has_map:
            raise ExportError(
                "its attention weights are mixed with a map, which depends on the positions of tokens",
                site=site.name,
                hint="use export_onnx",
            )
        if site.spec.before:
            raise ExportError(
                f"queries and keys of another run are those of all tokens at once: {site.spec.before[0]}",
                site=site.name,
                hint="use export_onnx",
            )
        edit = next((e for e in site.spec.after if e.reads_positions), None)
        if edit is not None:
            raise ExportError(
                f"the edit of its head outputs depends on the positions of tokens: {edit}",
                site=site.name,
                hint="use export_onnx, or edit every token alike",
            )


def _check_sites(marked: Sequence[Marked], sites: Sequence[str]) -> None:
    there = {m.site.name for m in marked}
    for name in sites:
        if name not in there:
            raise ExportError(
                "this attention is not a fused operator, so its keys and values cannot be cached",
                site=name,
                hint='see the report for the reason; with backend="sdpa" every rewritten attention is fused',
            )
