"""A language model as one ONNX file for prompt and generation, in the folder layout of onnxruntime-genai."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import fx

from attnopt.base.atomic_files import atomic_folder, folder_beside
from attnopt.base.compile_lock import compiling
from attnopt.compiler.origin import Origin
from attnopt.errors import ExportError
from attnopt.onnx.export.cache_forms import LATENT, CacheOptions, about, reach, rolling, slots
from attnopt.onnx.export.decoder_inputs import INPUTS, with_cache
from attnopt.onnx.export.kv_cache import PAST, PRESENT
from attnopt.onnx.export.mark import Marked
from attnopt.onnx.export.quantizer import FLOATING, Quantization, check_quantization, quantized
from attnopt.onnx.export.translate import OPSETS, expand, translated
from attnopt.onnx.export.write_file import METADATA, finish, is_external, note, save
from attnopt.report.quantized_file import QuantizedFile

if TYPE_CHECKING:
    import onnx_ir as ir

    from attnopt.onnx.export.verify_decoder import Whole

CONFIG, FILE = "genai_config.json", "model.onnx"
ABOUT = "cache.json"  # in the place of the configuration, where onnxruntime-genai cannot run the file


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
    check_quantization(quantize)
    if isinstance(context_length, bool) or not isinstance(context_length, int) or context_length < 2:
        raise ExportError(
            f"invalid value context_length={context_length!r}: expected a number of tokens",
            hint="pass the longest context of the model",
        )
    tokens = _tokens(eos_token_id, tokenizer)
    cache.check()
    made = _of_latents(gm, origin) if cache.kv == LATENT else _of_keys(gm, origin, cache, context_length, tokens)
    with atomic_folder(folder, marker=made.marker) as path:
        finish(made.model, origin, made.flavor, made.marked)
        made.model.metadata_props[f"{METADATA}cache"] = json.dumps(made.kept)
        told = _saved(made, path / FILE, cache.tolerance, quantize)
        config = made.kept if made.config is None else made.config
        (path / made.marker).write_text(json.dumps(config, indent=2), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(path))
    return told


@dataclass(frozen=True)
class _Made:
    """``kept``: the layers' buffers.  ``config``: of onnxruntime-genai, or None if it cannot run the file."""

    model: ir.Model
    whole: Whole
    marked: Sequence[Marked]
    kept: list[dict[str, object]]
    config: dict[str, object] | None
    flavor: Literal["onnxruntime", "standard"]

    @property
    def marker(self) -> str:
        return ABOUT if self.config is None else CONFIG


def _of_keys(
    gm: fx.GraphModule, origin: Origin, cache: CacheOptions, context_length: int, tokens: Mapping[str, Any]
) -> _Made:
    """Over keys and values."""
    from attnopt.onnx.export.kv_cache import Cache
    from attnopt.onnx.export.peephole import settle
    from attnopt.onnx.export.verify_decoder import Whole

    marked_gm, marked = with_cache(gm, origin)
    marked = cache.settled(gm, origin, marked, context_length)
    model, _ = translated(marked_gm, origin, OPSETS[0])  # of whole sequences: here past and new tokens are separate
    expand(model.graph, marked, Cache.of(model.graph).write)
    settle(model, contrib=True)
    logits, kept = _logits(model.graph.outputs), about(marked)
    windows = rolling(marked)
    config = None
    if not any(layer["sinks"] for layer in kept):
        config = _config(model.graph, logits, marked, context_length, tokens, windows)
    return _Made(model, Whole(gm, origin, str(logits.name), reach(marked)), marked, kept, config, "onnxruntime")


def _of_latents(gm: fx.GraphModule, origin: Origin) -> _Made:
    """Over latents."""
    from attnopt.onnx.export.latent_file import about_latents, checked_decoder, latent_model, latent_run
    from attnopt.onnx.export.verify_decoder import Whole

    decoder, marked = checked_decoder(gm, origin)
    whole = Whole(gm, origin, "logits", 0, latent_run)
    return _Made(latent_model(decoder, marked), whole, marked, about_latents(decoder, marked), None, "standard")


def _saved(made: _Made, file: Path, allowed: float | None, how: Quantization | None) -> QuantizedFile | None:
    """The checked file, in float if ``how`` is None."""
    from attnopt.onnx.export.export_quantized import signed

    if how is None:
        _in_float(made, file, allowed)
        return None
    with folder_beside(file) as work:
        floating = work / FLOATING
        _in_float(made, floating, allowed)
        small = quantized(floating, how, standard=made.flavor == "standard")
        data = _data_of(file, small.model)
        save(small.model, file, data)
        return signed(small, file, data, made.whole.deviation_of(file, how))


def _in_float(made: _Made, file: Path, allowed: float | None) -> None:
    save(made.model, file, _data_of(file, made.model))
    error = made.whole.verify(file, allowed)
    if allowed is not None:
        note(file, f"{METADATA}cache_error", f"{error:.2g}")


def _data_of(file: Path, model: ir.Model) -> Path | None:
    return file.with_name(f"{file.name}.data") if is_external(model) else None


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
        "session_options": {"enable_mem_pattern": False, "provider_options": []},  # a pattern for each length is kept
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
