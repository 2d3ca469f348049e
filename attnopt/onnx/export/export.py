"""ONNX for ONNX Runtime: exported by torch, every attention in its fastest form, checked before it is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from torch import fx

from attnopt.base.compile_lock import compiling
from attnopt.compiler.origin import Origin
from attnopt.errors import ExportError
from attnopt.onnx.export.mark import fastest, mark
from attnopt.onnx.export.quantizer import Quantization, check_quantization
from attnopt.onnx.export.translate import OPSETS, expand, translated
from attnopt.onnx.export.write_file import Written, finish, is_external, save, written_to
from attnopt.report.quantized_file import QuantizedFile

Flavor = Literal["onnxruntime", "standard"]


@compiling()
def export_onnx(
    gm: fx.GraphModule,
    origin: Origin,
    path: str | os.PathLike[str],
    *,
    flavor: Flavor,
    opset: int | None,
    external_data: bool | Literal["auto"],
    verify: bool,
    quantize: Quantization | None = None,
) -> QuantizedFile | None:
    """Write an optimized graph to ``path``; what quantization made of it.  Raises ExportError, in which case ``path`` is
    unchanged."""
    if flavor not in get_args(Flavor):
        raise ExportError(f"unknown flavor {flavor!r}", hint=f"choose one of {', '.join(get_args(Flavor))}")
    if origin.file is None and opset is not None and opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported", hint=f"choose one of {', '.join(map(str, OPSETS))}")
    if external_data not in (True, False, "auto"):
        raise ExportError(f"invalid value external_data={external_data!r}", hint='use True, False or "auto"')
    check_quantization(quantize)
    if quantize is None:
        write_unquantized(gm, origin, path, flavor, opset, external_data, verify)
        return None
    from attnopt.onnx.export.export_quantized import export_quantized

    def write(file: Path) -> Written:
        return write_unquantized(gm, origin, file, flavor, opset, "auto", verify)

    return export_quantized(write, origin, path, quantize, flavor=flavor, external_data=external_data, verify=verify)


def write_unquantized(
    gm: fx.GraphModule,
    origin: Origin,
    path: str | os.PathLike[str],
    flavor: Flavor,
    opset: int | None,
    external_data: bool | Literal["auto"],
    verify: bool,
) -> Written:
    """Write a graph in float to ``path``.  Raises ExportError."""
    if origin.file is not None:
        from attnopt.onnx.export.in_place import export_in_place

        return export_in_place(gm, origin, path, flavor=flavor, opset=opset, external_data=external_data, verify=verify)
    from attnopt.onnx.export.cache_names import with_names
    from attnopt.onnx.export.peephole import settle
    from attnopt.onnx.export.size_checks import check_sizes
    from attnopt.onnx.export.write_form import write

    with written_to(path) as (file, data):
        contrib = flavor == "onnxruntime"
        gm, names = with_names(gm, origin)
        marked_gm, marked = mark(gm, fastest(contrib))
        model, held = translated(marked_gm, origin, opset or OPSETS[0])
        expand(model.graph, marked, write)
        settle(model, contrib)
        check_sizes(model.graph, held)
        if names is not None:
            names.give(model.graph)
        finish(model, origin, flavor, marked)
        save(model, file, data if is_external(model, external_data) else None)
        written = Written(gm, {} if names is None else names.inputs)
        if verify:
            from attnopt.onnx.export.verify import verify as run_and_compare

            run_and_compare(gm, origin, file, marked, written.names)
    return written
