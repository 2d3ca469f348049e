"""Calls of ONNX Runtime to be timed: of a whole model, and of a decoder for one token.  One thread; results are not checked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import fx

from attnopt.base.call_inputs import CallInputs
from attnopt.compiler.origin import Origin
from attnopt.onnx.export.cache_forms import CacheOptions
from attnopt.onnx.export.decoder import FILE, export_decoder
from attnopt.onnx.export.decoder_inputs import with_cache
from attnopt.onnx.export.export import write_unquantized
from attnopt.onnx.export.kv_cache import PRESENT, Kept
from attnopt.onnx.export.quantizer import FLOATING, Quantization, quantized
from attnopt.onnx.export.verify import feed_of, open_session
from attnopt.onnx.export.verify_decoder import DecoderRun
from attnopt.onnx.export.write_file import is_external, save

Call = Callable[[], object]


def model_call(gm: fx.GraphModule, origin: Origin, inputs: CallInputs, quantize: Quantization | None) -> Call:
    """The file that ``export_onnx`` writes, on ``inputs`` in the form of the graph.  Raises ExportError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FLOATING
        written = write_unquantized(gm, origin, file, "onnxruntime", None, "auto", False)
        if quantize is not None:
            made, file = quantized(file, quantize, standard=False), file.with_name(f"{quantize}.onnx")
            save(made.model, file, file.with_name(f"{file.name}.data") if is_external(made.model) else None)
        session = open_session(file, exact=False, threads=1)
    feed = feed_of([i.name for i in session.get_inputs()], written.gm, inputs, written.names)
    return lambda: session.run(None, feed)


def token_call(gm: fx.GraphModule, origin: Origin, batch: int, past: int) -> Call:
    """The file that ``export_decoder`` writes, for one token of each sequence after ``past`` others; windows keep only
    their keys.  Raises ExportError."""
    rolls = any(w is not None and w <= past for w in _windows(gm, origin))
    cache = _cache("rolling" if rolls else "masked")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "decoder"
        export_decoder(
            gm, origin, folder, context_length=past + 1, eos_token_id=0, tokenizer=None, cache=cache, quantize=None
        )
        session = open_session(folder / FILE, threads=1)
    (logits,) = (o.name for o in session.get_outputs() if not o.name.startswith(PRESENT.partition(".")[0]))
    run = DecoderRun(session, logits, past + 1, batch)
    ids, lengths = torch.zeros(batch, 1, dtype=torch.long), torch.full((batch,), past + 1)
    return lambda: run(ids, lengths[:, None] - 1, lengths)


def require_cache(gm: fx.GraphModule, origin: Origin) -> None:
    """Raises ExportError for a graph that is no decoder's, or whose keys and values ONNX Runtime cannot keep."""
    _, marked = with_cache(gm, origin)
    _cache("masked").in_slots(marked)


def _cache(windows: str) -> CacheOptions:
    return CacheOptions(windows, "float32", pad_heads=False, calibration=None)


def _windows(gm: fx.GraphModule, origin: Origin) -> list[int | None]:
    return [m.form.window for m in with_cache(gm, origin)[1] if isinstance(m.form, Kept)]
