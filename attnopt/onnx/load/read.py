"""Reading an ONNX file from disk: nothing outside its folder is accessed, and damage is reported by name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.errors import CaptureError
from attnopt.onnx.load.error_text import reason
from attnopt.onnx.load.grouping import in_order, used_by
from attnopt.onnx.load.source import Source, dense

if TYPE_CHECKING:
    import onnx

LARGEST = 2**31 - 1  # bytes of a file, without its external data: more cannot be in one protocol buffer
SHARED = 4  # weights may take this many times the bytes of their files; tied ones are stored once


def read(path: str | os.PathLike[str], opens_fused: bool = False) -> Source:
    """The file with its external weights.  ``opens_fused``: see ``Source``.  Raises CaptureError."""
    import onnx
    from onnx import inliner

    file = Path(path)
    stored = structure(file)
    with _refusing(file):
        _check_external_data(stored, file)
        stored = _checked(stored, file)
        model = onnx.ModelProto()
        model.CopyFrom(stored)
        if model.functions:
            with contextlib.suppress(Exception):  # a function that cannot be inlined is called
                model = inliner.inline_local_functions(model)
        onnx.load_external_data_for_model(model, str(file.parent))
        model.graph.initializer.extend(dense(s) for s in model.graph.sparse_initializer)
        del model.graph.sparse_initializer[:]
        return Source(file, stored, model, opens_fused)


def _checked(model: onnx.ModelProto, file: Path) -> onnx.ModelProto:
    """The model with its nodes in order: neither ONNX Runtime nor onnxruntime's converters require it."""
    import onnx

    _register_operators()
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as e:
        if "topologically sorted" not in str(e) or places_of_data(model):
            raise
        nodes = [n.__deepcopy__() for n in in_order(list(model.graph.node), used_by, lambda n: n.output)]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        onnx.checker.check_model(model)
    return model


def _register_operators() -> None:
    """An operator of ONNX Runtime that its optimizers write as one of ONNX, which the checker has not heard of."""
    from onnx.defs import OpSchema, has, register_schema

    name, kinds = (
        "SimplifiedLayerNormalization",
        ["tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"],
    )
    if has(name):
        return
    optional = OpSchema.FormalParameterOption.Optional
    register_schema(
        OpSchema(
            name,
            "",
            1,
            inputs=[OpSchema.FormalParameter("X", "T"), OpSchema.FormalParameter("scale", "V")],
            outputs=[
                OpSchema.FormalParameter("Y", "V"),
                OpSchema.FormalParameter("inv_std_var", "U", param_option=optional),
            ],
            type_constraints=[(letter, kinds, "") for letter in "TUV"],
            attributes=[
                OpSchema.Attribute("axis", OpSchema.AttrType.INT, required=False),
                OpSchema.Attribute("epsilon", OpSchema.AttrType.FLOAT, required=False),
                OpSchema.Attribute("stash_type", OpSchema.AttrType.INT, required=False),
            ],
        )
    )


def structure(file: Path) -> onnx.ModelProto:
    """The contents of the file, without external weights.  Raises CaptureError."""
    import onnx

    with _refusing(file):
        _check_file(file)
        return onnx.load(file, load_external_data=False)


@contextlib.contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """Whatever fails is a CaptureError that names the file."""
    try:
        yield
    except CaptureError:
        raise
    except Exception as e:
        raise CaptureError(
            f"{file} is not a readable ONNX model: {reason(e)}",
            hint="pass a complete .onnx file, with its external weight files beside it",
        ) from e


def _check_file(file: Path) -> None:
    """Reading a pipe or a device could block or never end."""
    if not file.exists():
        raise CaptureError(f"there is no file {file}", hint="pass the path of an .onnx file")
    size = file.stat().st_size
    if not file.is_file():
        raise OSError("it is not a regular file")
    with file.open("rb") as opened:
        if opened.read(8)[4:] == b"ORTM":
            raise CaptureError(
                f"{file} is in ONNX Runtime's own format, which is not supported",
                hint="pass the .onnx file that it was converted from",
            )
    if size > LARGEST:
        raise OSError(f"{size} bytes exceed the size limit of an ONNX file")


def _check_external_data(model: onnx.ModelProto, file: Path) -> None:
    """Weights must be in files of the same folder, completely."""
    import onnx

    folder = file.resolve().parent
    sizes: dict[Path, int] = {}
    wanted = 0
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        if len(said) < len(tensor.external_data):  # other readers may disagree on which one counts
            raise CaptureError(f"{file} gives two locations for the weights {tensor.name!r}")
        place = (folder / said.get("location", "")).resolve()
        if not place.is_relative_to(folder) or not place.is_file():
            raise CaptureError(
                f"{file} refers to the weights {tensor.name!r} in {said.get('location')!r}, which is not a file in its folder",
                hint="put the weight files beside the model",
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
        raise CaptureError(f"{file} refers to {wanted} bytes of weights in files of {sum(sizes.values())} bytes")


def places_of_data(model: onnx.ModelProto) -> list[str]:
    """The weight files, relative to the folder of the model."""
    import onnx

    found = [t for t in _tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL]
    return list(dict.fromkeys(e.value for t in found for e in t.external_data if e.key == "location"))


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
