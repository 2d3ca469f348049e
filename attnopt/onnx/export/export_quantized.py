"""A quantized ONNX file: exported and verified in float, quantized, compared again, and only then put in its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from attnopt.base.atomic_files import folder_beside
from attnopt.compiler.origin import Origin
from attnopt.onnx.export.deviation import Deviation
from attnopt.onnx.export.quantizer import FLOATING, QUANTIZATION, Quantization, Quantized, quantized
from attnopt.onnx.export.write_file import Written, is_external, note, save, written_to
from attnopt.report.quantized_file import QuantizedFile


def export_quantized(
    write: Callable[[Path], Written],
    origin: Origin,
    path: str | os.PathLike[str],
    how: Quantization,
    *,
    flavor: str,
    external_data: bool | Literal["auto"],
    verify: bool,
) -> QuantizedFile:
    """``write`` writes the unquantized file.  Raises ExportError, in which case ``path`` is unchanged."""
    with folder_beside(path) as work:
        written = write(work / FLOATING)
        made = quantized(work / FLOATING, how, standard=flavor == "standard")
        external = is_external(made.model, external_data, f"its {how} file's")
        with written_to(path) as (file, beside):
            data = beside if external else None
            save(made.model, file, data)
            found = None
            if verify:
                from attnopt.onnx.export.verify import deviation_of

                found = deviation_of(written, origin, file, how)
            return signed(made, file, data, found)


def signed(made: Quantized, file: Path, data: Path | None, found: Deviation | None) -> QuantizedFile:
    """Record in the file's metadata what was done."""
    said = QuantizedFile(
        made.how, len(made.products.chosen), len(made.products.others), made.tables, made.bytes_before, 0,
        *(() if found is None else (found.cosine, found.relative_error, found.sizes)),
    )  # fmt: skip
    told = {key: value for key, value in said.to_json().items() if not key.startswith("bytes")}
    note(file, QUANTIZATION, json.dumps(told))
    size = file.stat().st_size + (0 if data is None else data.stat().st_size)
    return QuantizedFile(**{**said.to_json(), "bytes_after": size})
