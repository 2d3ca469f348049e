"""A language model as one ONNX file for prompt and generation, in the folder layout of onnxruntime-genai."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from attnopt.base.atomic_files import atomic_folder, folder_beside
from attnopt.base.compile_lock import compiling
from attnopt.base.sizes import is_static
from attnopt.compiler.origin import Origin
from attnopt.errors import ExportError
from attnopt.graph.nodes import inputs_of, is_tensor, value
from attnopt.ir.site import Site
from attnopt.onnx.export.cache_forms import CacheOptions, about, reach, rolling, slots
from attnopt.onnx.export.kv_cache import PAST, PRESENT
from attnopt.onnx.export.mark import Marked, mark
from attnopt.onnx.export.quantizer import FLOATING, Quantization, check_quantization, quantized
from attnopt.onnx.export.translate import OPSETS, expand, translated
from attnopt.onnx.export.write_file import METADATA, ROOM_IN_FILE, finish, note, save, weights_size
from attnopt.report.quantized_file import QuantizedFile

if TYPE_CHECKING:
    import onnx_ir as ir

    from attnopt.onnx.export.verify_decoder import Whole

CONFIG, FILE = "genai_config.json", "model.onnx"
ABOUT = "cache.json"  # in the place of the configuration, where onnxruntime-genai cannot run the file
INPUTS = ("input_ids", "attention_mask", "position_ids")


@compiling()
def export_decoder(
    gm: fx.GraphModule,
    origin: Origin,
    folder: str | os.PathLike[str],
    *,
    context_length: int,
    eos_token_id: int | Sequence[int],
    tokenizer: Any,
    cache: CacheOptions,
    quantize: Quantization | None,
) -> QuantizedFile | None:
    """Write the folder, whole or not at all; what quantization made of it.  Raises ExportError."""
    from attnopt.onnx.export.kv_cache import Cache
    from attnopt.onnx.export.peephole import settle
    from attnopt.onnx.export.verify_decoder import Whole

    check_quantization(quantize)
    if isinstance(context_length, bool) or not isinstance(context_length, int) or context_length < 2:
        raise ExportError(
            f"invalid value context_length={context_length!r}: expected a number of tokens",
            hint="pass the longest context of the model",
        )
    tokens = _tokens(eos_token_id, tokenizer)
    cache.check()
    marked_gm, marked = with_cache(gm, origin)
    marked = cache.settled(gm, origin, marked, context_length)
    windows = rolling(marked)
    kept = about(marked)
    marker = ABOUT if any(layer["sinks"] for layer in kept) else CONFIG
    with atomic_folder(folder, marker=marker) as made:
        model, _ = translated(marked_gm, origin, OPSETS[0])  # of whole sequences: here past and new tokens are separate
        expand(model.graph, marked, Cache.of(model.graph).write)
        settle(model, contrib=True)
        finish(model, origin, "onnxruntime", marked)
        logits = _logits(model.graph.outputs)
        model.metadata_props[f"{METADATA}cache"] = json.dumps(kept)
        whole = Whole(gm, origin, str(logits.name), reach(marked))
        told = _saved(model, whole, made / FILE, cache.tolerance, quantize)
        config = _config(model.graph, logits, marked, context_length, tokens, windows)
        (made / marker).write_text(json.dumps(config if marker == CONFIG else kept, indent=2), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(made))
    return told


def with_cache(gm: fx.GraphModule, origin: Origin) -> tuple[fx.GraphModule, tuple[Marked, ...]]:
    """The graph of a decoder, each attention marked as one over a cache.  Raises ExportError where that cannot be."""
    from attnopt.onnx.export.kv_cache import cached

    _check_inputs(gm, origin.report.fixed_axes)
    marked_gm, marked = mark(gm, cached)
    _check_edits(origin.sites)
    _check_sites(marked, [s.name for s in origin.sites])
    return marked_gm, marked


def _saved(
    model: ir.Model, whole: Whole, file: Path, allowed: float | None, how: Quantization | None
) -> QuantizedFile | None:
    """The checked file, in float if ``how`` is None."""
    from attnopt.onnx.export.export_quantized import signed

    if how is None:
        _in_float(model, whole, file, allowed)
        return None
    with folder_beside(file) as work:
        floating = work / FLOATING
        _in_float(model, whole, floating, allowed)
        made = quantized(floating, how, standard=False)
        data = _data_of(file, made.weights_size)
        save(made.model, file, data)
        return signed(made, file, data, whole.deviation_of(file, how))


def _in_float(model: ir.Model, whole: Whole, file: Path, allowed: float | None) -> None:
    save(model, file, _data_of(file, weights_size(whole.gm)))
    error = whole.verify(file, allowed)
    if allowed is not None:
        note(file, f"{METADATA}cache_error", f"{error:.2g}")


def _data_of(file: Path, size: int) -> Path | None:
    return file.with_name(f"{file.name}.data") if size > ROOM_IN_FILE else None


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


def _check_edits(sites: Sequence[Site]) -> None:
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


def _logits(outputs: Sequence[ir.Value]) -> ir.Value:
    """The model's only output besides those of the cache."""
    found = [o for o in outputs if not str(o.name).startswith(PRESENT.partition(".")[0] + ".")]
    named = [o for o in found if o.name == "logits"] or found
    if len(named) != 1 or named[0].shape is None or len(named[0].shape) != 3:
        raise ExportError(
            f"the model returns {[o.name for o in found]}, expected logits [batch, length, vocabulary]",
            hint="wrap the model so that it returns only the logits",
        )
    return named[0]


def _tokens(eos_token_id: int | Sequence[int], tokenizer: object) -> dict[str, object]:
    """The special tokens, as the runtime wants to know them."""
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ExportError(
            f"a {type(tokenizer).__name__} is not a tokenizer", hint="pass a transformers tokenizer, or none"
        )
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if not ends or not all(isinstance(end, int) for end in ends):
        raise ExportError(
            f"invalid value eos_token_id={eos_token_id!r}: expected a token id",
            hint="pass the id of the end-of-text token",
        )
    begin, pad = (getattr(tokenizer, name, None) for name in ("bos_token_id", "pad_token_id"))
    return {
        "bos_token_id": ends[0] if begin is None else begin,
        "eos_token_id": ends,
        "pad_token_id": ends[0] if pad is None else pad,
    }


def _config(
    graph: ir.Graph,
    logits: ir.Value,
    marked: Sequence[Marked],
    context_length: int,
    tokens: Mapping[str, Any],
    windows: Mapping[int, int],
) -> dict[str, object]:
    """The configuration files of onnxruntime-genai."""
    dim, names = marked[0].site.spec.head_dim, {i.name for i in graph.inputs}
    heads, kv_heads = slots(marked)
    assert logits.shape is not None
    vocabulary, ends = logits.shape[2], tokens["eos_token_id"]
    if isinstance(vocabulary, int) and not all(0 <= end < vocabulary for end in ends):
        raise ExportError(f"{ends} are outside the vocabulary of {vocabulary} tokens", hint="correct eos_token_id")
    decoder = {
        "session_options": {"provider_options": []},
        "filename": FILE,
        "head_size": dim,
        "hidden_size": heads * dim,
        "inputs": {name: name for name in INPUTS if name in names}
        | {f"past_{what}_names": PAST.format("%d", what) for what in ("key", "value")},
        "outputs": {"logits": logits.name}
        | {f"present_{what}_names": PRESENT.format("%d", what) for what in ("key", "value")},
        "num_attention_heads": heads,
        "num_hidden_layers": len(marked),
        "num_key_value_heads": kv_heads,
    }
    if windows:  # the runtime has one length for all rolling buffers: that of the longest window, and a few more tokens
        decoder["sliding_window"] = {
            "window_size": max(windows.values()),
            "layers": sorted(windows),
            "slide_key_value_cache": False,  # the operator does
            "slide_inputs": False,
        }
    model = {
        "type": "decoder",
        "context_length": context_length,
        "vocab_size": vocabulary,
        "decoder": decoder,
        **tokens,
    }
    return {"model": model, "search": {"max_length": context_length, "past_present_share_buffer": True}}
