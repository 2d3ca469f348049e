"""An ONNX file read from disk: nothing outside its folder is touched, and what is broken or unknown is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.errors import CaptureError
from attnopt.from_onnx.module import OnnxModule, module_of
from attnopt.from_onnx.operators import OPERATORS, SAFE_SOFTMAX
from attnopt.from_onnx.quoting import quoted, reason

if TYPE_CHECKING:
    import onnx

KNOWN = {*OPERATORS.keys() - {SAFE_SOFTMAX}, "Split", "Constant"}
OLDEST = 13  # opset; before it, axes and softmaxes mean something else
LARGEST = 2**31 - 1  # bytes of a file, without its external data: more cannot be in one protocol buffer
SHARED = 4  # so many times the bytes of their files weights may take; tied ones are stored once


def read(path: str | os.PathLike[str]) -> OnnxModule:
    """The file as a module that computes what its graph says.  Raises CaptureError."""
    import onnx
    from onnx import inliner

    file = Path(path)
    model = structure(file)
    with _refusing(file):
        _check_external_data(model, file)
        onnx.checker.check_model(str(file))
        model = inliner.inline_local_functions(model) if model.functions else model
        onnx.load_external_data_for_model(model, str(file.parent))
        _check_operators(model, file)
        return module_of(model, str(file))


def structure(file: Path) -> onnx.ModelProto:
    """What the file itself holds, without the weights that lie beside it.  Raises CaptureError."""
    import onnx

    with _refusing(file):
        _check_file(file)
        return onnx.load(file, load_external_data=False)


@contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """Whatever fails is a CaptureError that names the file."""
    try:
        yield
    except CaptureError:
        raise
    except Exception as e:
        raise CaptureError(
            f"{file} cannot be read as an ONNX model: {reason(e)}",
            hint="give a complete .onnx file, beside it the files that hold its weights",
        ) from e


def _check_file(file: Path) -> None:
    """Reading a pipe or a device could block or never end."""
    size = file.stat().st_size
    if not file.is_file():
        raise OSError("it is no plain file")
    if size > LARGEST:
        raise OSError(f"{size} bytes are more than an ONNX file can have")


def _check_external_data(model: onnx.ModelProto, file: Path) -> None:
    """Weights lie in files of the same folder, and wholly in them."""
    import onnx

    folder = file.resolve().parent
    sizes: dict[Path, int] = {}
    wanted = 0
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        if len(said) < len(tensor.external_data):  # which of them counts, others may see otherwise
            raise CaptureError(f"{file} says twice where the weights {tensor.name!r} are")
        place = (folder / said.get("location", "")).resolve()
        if not place.is_relative_to(folder) or not place.is_file():
            raise CaptureError(
                f"{file} wants the weights {tensor.name!r} from {said.get('location')!r}, which is no file in its folder",
                hint="put the files that hold the weights beside the model",
            )
        size = sizes.setdefault(place, place.stat().st_size)
        start = int(said.get("offset") or 0)
        length = int(said.get("length") or size - start)
        if start < 0 or length < 0 or start + length > size:
            raise CaptureError(
                f"{place} ends before the weights {tensor.name!r} of {file}", hint="copy both files again"
            )
        wanted += length
    if wanted > SHARED * sum(sizes.values()):
        raise CaptureError(f"{file} wants {wanted} bytes of weights from files of {sum(sizes.values())}")


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor, wherever it is: in attributes, inner graphs, functions and sparse weights too."""
    import onnx

    stack: list[Any] = [model]
    while stack:
        here = stack.pop()
        if isinstance(here, onnx.TensorProto):
            yield here
            continue
        for field, value in here.ListFields():
            if field.message_type is not None:
                stack.extend([value] if hasattr(value, "ListFields") else value)


def _check_operators(model: onnx.ModelProto, file: Path) -> None:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST:
        raise CaptureError(
            f"{file} has opset {opset}, and opset {OLDEST} is the oldest that is read",
            hint="convert it with onnx.version_converter",
        )
    unknown = sorted(
        {
            f"{n.domain}.{n.op_type}" if n.domain else n.op_type
            for n in model.graph.node
            if n.domain not in ("", "ai.onnx") or n.op_type not in KNOWN
        }
    )
    unknown += ["sparse weights"] if model.graph.sparse_initializer else []
    if unknown:
        raise CaptureError(
            f"{file} holds operators that are not read: {quoted(', '.join(unknown))}",
            hint="export the model with plain operators, in float32 and before it is optimized or quantized",
        )
