"""ONNX Runtime's own quantizers, called for the products with constant weights alone, and tables of embeddings in int8.

Attentions stay in float.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from attnopt.base.quiet import quiet
from attnopt.errors import ExportError
from attnopt.onnx.export.write_file import METADATA

if TYPE_CHECKING:
    import onnx_ir as ir

    from attnopt.onnx.export.weight_products import WeightProducts

Quantization = Literal["int8", "int4"]
QUANTIZATION = f"{METADATA}quantization"
FLOATING = "float.onnx"  # the file to quantize

BLOCK = 32  # rows of a weight that share a scale in int4; the last block is padded with zeros
BLOCKED_WEIGHTS, DYNAMIC = 21, 11  # first opsets with DequantizeLinear by blocks, and with DynamicQuantizeLinear


@dataclass(frozen=True)
class Quantized:
    """``model``: its weights are read from disk as they are needed.  ``tables``: how many are in int8.  ``bytes_before``: of the
    file that it was made from."""

    model: ir.Model
    how: Quantization
    products: WeightProducts
    tables: int
    bytes_before: int


def check_quantization(how: object) -> None:
    """Raises ExportError for an unknown one."""
    if how is not None and how not in get_args(Quantization):
        raise ExportError(f"invalid value quantize={how!r}", hint='use "int8", "int4", or None')


def quantized(file: Path, how: Quantization, standard: bool) -> Quantized:
    """The model of ``file``, quantized.  Further files are written into its folder.  Raises ExportError.

    ``standard``: only with operators of ONNX.  OSError passes through.
    """
    import onnx_ir as ir

    from attnopt.onnx.export.embedding_tables import quantize_tables
    from attnopt.onnx.export.weight_products import prepared

    before = sum(f.stat().st_size for f in file.parent.rglob("*") if f.is_file())
    model = ir.load(str(file))
    _check_opset(model.opset_imports.get("", 0), how, standard)
    products = prepared(model)
    if not products.chosen:
        raise ExportError(
            "no product with constant float32 weights was found, so nothing would be quantized",
            hint="leave quantize out; convert a model in half precision with model.float() first",
        )
    tables = quantize_tables(model, products.chosen)
    source, target = file.with_name("prepared.onnx"), file.with_name("quantized.onnx")
    ir.save(model, str(source), external_data=f"{source.name}.data")
    _run(source, target, products, how, standard)
    made = ir.load(str(target))
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    made.metadata_props.clear()
    made.metadata_props.update(model.metadata_props)
    made.metadata_props.pop(QUANTIZATION, None)  # of a file that was quantized before
    return Quantized(made, how, products, tables, before)


def _check_opset(opset: int, how: Quantization, standard: bool) -> None:
    """Of a file rewritten in place: the quantizers would change it."""
    needed = DYNAMIC if how == "int8" else BLOCKED_WEIGHTS if standard else 0
    if opset < needed:
        raise ExportError(
            f"{how} needs opset {needed} or later, and the file has opset {opset}",
            hint="convert it with onnx.version_converter first"
            + (', or use flavor="onnxruntime"' if how == "int4" else ""),
        )


def _run(source: Path, target: Path, products: WeightProducts, how: Quantization, standard: bool) -> None:
    with quiet(), _root_logger_kept():
        try:
            if how == "int8":
                _dynamic(source, target, products)
            else:
                _by_blocks(source, target, products, standard)
        except ImportError as e:
            raise ExportError(
                f"onnxruntime.quantization cannot be imported: {e}",
                hint=f"pip install {e.name.partition('.')[0]}" if e.name else "reinstall onnxruntime",
            ) from e
        except OSError:
            raise
        except Exception as e:
            raise ExportError(
                f"ONNX Runtime's quantizer failed: {type(e).__name__}: {str(e)[:300]}",
                hint="please report the model; without quantize the export does not need it",
            ) from e


def _dynamic(source: Path, target: Path, products: WeightProducts) -> None:
    """int8 weights with a scale for each column; activations are quantized at run time, each tensor with one scale."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        source,
        target,
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=list(products.chosen),
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},  # of outputs whose type ONNX cannot infer
    )


def _by_blocks(source: Path, target: Path, products: WeightProducts, standard: bool) -> None:
    """int4 weights with a scale and a zero point for each block of a column; activations stay in float."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, QuantFormat

    quantizer = MatMulNBitsQuantizer(
        str(source),
        bits=4,
        block_size=BLOCK,
        nodes_to_exclude=list(products.others),
        op_types_to_quantize=("MatMul",),
        quant_format=QuantFormat.QDQ if standard else QuantFormat.QOperator,
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """onnxruntime.quantization gives the root logger a handler and a level of its own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in [h for h in root.handlers if h not in handlers]:
            root.removeHandler(handler)
        root.setLevel(level)
