"""A file rewritten in place: changed attentions get new nodes, everything else stays byte for byte the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, fx

from attnopt.base.atomic_files import atomic_write
from attnopt.base.sizes import is_static
from attnopt.compiler.origin import FileOrigin, Origin
from attnopt.errors import AttnoptWarning, ExportError
from attnopt.graph.copies import copy_program
from attnopt.graph.nodes import get_attr, value
from attnopt.graph.value_names import names_of
from attnopt.onnx.export.builder import ORT, Array
from attnopt.onnx.export.correspondence import SHARED, Change, changed
from attnopt.onnx.export.mark import Marked
from attnopt.onnx.export.older_opsets import WRITTEN, older
from attnopt.onnx.export.only_faster import worthwhile
from attnopt.onnx.export.packed_weights import NotSliceableError, Slices, places, refuse
from attnopt.onnx.export.part import Part, parts_of
from attnopt.onnx.export.pieces import Piece
from attnopt.onnx.export.splicing import Insert, renamed, spliced
from attnopt.onnx.export.translate import OPSETS
from attnopt.onnx.export.write_file import METADATA, Written, said, written_to
from attnopt.onnx.load.grouping import used_by
from attnopt.onnx.load.source import Source
from attnopt.onnx.load.unread import rounds
from attnopt.version import __version__

if TYPE_CHECKING:
    import onnx

PREFIX = "attnopt/"  # of the names of new nodes, values and weights
CONSTANT = "attnopt_"  # of constants that are named after their values


def export_in_place(
    gm: fx.GraphModule,
    origin: Origin,
    path: str | os.PathLike[str],
    *,
    flavor: str,
    opset: int | None,
    external_data: bool | Literal["auto"],
    verify: bool,
) -> Written:
    """Write the file from which ``gm`` was captured, with its rewrites.  Raises ExportError.

    An attention that is only fused, without being faster in this file's opset, stays unchanged.
    """
    file = origin.file
    assert file is not None
    source = file.model.source
    if opset is not None and opset != source.opset:
        raise ExportError(
            f"{source.path} has opset {source.opset} and can only be written in that opset",
            hint="omit opset, or convert the file with onnx.version_converter first",
        )
    contrib = flavor == "onnxruntime"
    gm, _ = copy_program(worthwhile(gm, origin, contrib, source.opset))
    change = changed(gm, file)
    written = Written(gm, {node.name: name for node, name in file.inputs(gm.graph).items()})
    if not change.made:
        _copied(source, path)
        return written
    parts = parts_of(gm, origin, change, min(source.opset, OPSETS[-1]), contrib)
    own = _own_names(file, change)
    insert = _insert(gm, file, change, parts, source.opset, own)
    model = spliced(_base(file, change), insert)
    fixed = _fix_axes(model, gm, file)
    _sign(model, origin, flavor, [m for part in parts for m in part.marked])
    is_external = _is_external(source.stored) if external_data == "auto" else external_data
    with written_to(path) as (temporary, data):
        _save(model, source, temporary, data if is_external else None)
        if verify:
            from attnopt.onnx.export.verify import verify_file

            pieces = [_piece(gm, part, own, own[change.made[part.output]]) for part in parts] if rounds(source) else ()
            verify_file(gm, origin, temporary, written.names, pieces)
    if fixed:
        warnings.warn(
            f"{path} is valid only at the sizes of the example inputs: {', '.join(fixed)}", AttnoptWarning, stacklevel=4
        )
    return written


def _copied(source: Source, path: str | os.PathLike[str]) -> None:
    """Nothing was rewritten: the same bytes, and the external weights."""
    target, folder = Path(path).resolve(), source.path.resolve().parent
    if target == source.path.resolve():
        return
    from attnopt.onnx.load.read import places_of_data

    for name in places_of_data(source.stored):
        if target.parent != folder:
            (target.parent / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target.parent / name)
    with atomic_write(path) as temporary:
        shutil.copyfile(source.path, temporary)


def _base(file: FileOrigin, change: Change) -> onnx.ModelProto:
    """The model as stored in the file; with its functions inlined if one of them changes."""
    stored: onnx.ModelProto = file.model.source.stored
    whole: onnx.ModelProto = file.model.source.model
    graph = stored.graph
    there = {o for n in graph.node for o in n.output} | {i.name for i in graph.input}
    there |= {t.name for t in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    there |= set(file.added(file.captured.graph))
    if {*(n for n in change.made if not n.startswith(SHARED)), *change.read.values()} <= there:
        return stored
    return whole


def _own_names(file: FileOrigin, change: Change) -> dict[fx.Node, str]:
    """How the written file calls the values that new nodes compute."""
    prefix = _free_prefix(_names(file.model.source.model))
    return {
        node: name.replace(SHARED, prefix, 1) if name.startswith(SHARED) else name for name, node in change.made.items()
    }


def _piece(gm: fx.GraphModule, part: Part, own: Mapping[fx.Node, str], output: str) -> Piece:
    def given(x: str | fx.Node) -> str | Tensor:
        return x if isinstance(x, str) else own[x] if x in own else get_attr(gm, str(x.target))

    return Piece(part.module, tuple(map(given, part.inputs)), output)


def _insert(
    gm: fx.GraphModule,
    file: FileOrigin,
    change: Change,
    parts: Sequence[Part],
    opset: int,
    own: Mapping[fx.Node, str],
) -> Insert:
    import onnx

    prefix = _free_prefix(_names(file.model.source.model))
    stored = {where: name for name, where in file.model.places.items()}
    packed = file.model.derived
    slices, cut = Slices(file.model.source, prefix), set[str]()
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, onnx.TensorProto] = {}
    for number, part in enumerate(parts):
        inner = f"{prefix}{number}/" if len(parts) > 1 else prefix
        names: list[str] = []
        for given in part.inputs:
            if isinstance(given, str) or given in own:
                names.append(given if isinstance(given, str) else own[given])
                continue
            origin = stored.get(re.sub(r"__\d+$", "", str(given.target)), str(given.target))
            tensor = get_attr(gm, str(given.target)).detach().cpu().contiguous()
            name = f"{prefix}{stored.get(str(given.target), str(given.target))}"
            names.append(name)
            if origin in packed:
                if name not in cut:
                    cut.add(name)
                    _cut(slices, origin, packed[origin], tensor.numpy(), name)
            else:
                weights[name] = onnx.numpy_helper.from_array(tensor.numpy(), name)
        made, constants = _nodes_of(part, names, own[change.made[part.output]], prefix, inner, opset)
        nodes += made
        weights |= {t.name: t for t in constants}
    nodes = [*slices.nodes, *nodes]
    weights |= slices.weights
    used = {name for node in nodes for name in used_by(node)}
    before = {name: n for n in file.captured.graph.nodes for name in names_of(n)}
    reshaped = {n for n, node in change.made.items() if n in before and _sizes(node) != _sizes(before[n])}
    found = [t for name, t in weights.items() if name in used]
    infos = [_info(name, node) for node, name in own.items()]
    return Insert(nodes, found, frozenset(own.values()), frozenset(reshaped), infos, _added(gm, file), {ORT: 1})


def _added(gm: fx.GraphModule, file: FileOrigin) -> list[onnx.ValueInfoProto]:
    """The inputs that the file does not have; axes that an input of the file has, too, keep their name."""
    nodes = {name: node for node, name in file.inputs(gm.graph).items()}
    free = [(value(nodes[name]).shape[axis], label) for name, axis, label in reversed(file.model.source.free)]
    labels = {size.node.expr: label for size, label in free if label and not is_static(size)}
    return [_info(name, node, labels) for name, node in file.added(gm.graph).items()]


def _info(name: str, node: fx.Node, labels: Mapping[object, str] = MappingProxyType({})) -> onnx.ValueInfoProto:
    import onnx

    kind = onnx.helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=value(node).dtype).numpy().dtype)
    sizes = [int(n) if is_static(n) else labels.get(n.node.expr) for n in value(node).shape]
    return onnx.helper.make_tensor_value_info(name, kind, sizes)


def _nodes_of(
    part: Part, inputs: Sequence[str], output: str, shared: str, prefix: str, opset: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The part's nodes and constants, with the file's names.  ``shared``: prefix of constants named after their values."""
    import onnx
    import onnx_ir as ir

    graph = ir.serde.serialize_model(part.model).graph
    names = {i.name: name for i, name in zip(graph.input, inputs, strict=True)}
    made = graph.output[0].name
    nodes = list(graph.node)
    if made in names or made not in {o for n in nodes for o in n.output}:
        nodes.append(onnx.helper.make_node("Identity", [made], ["made"]))
        made = "made"
    names[made] = output
    stored = list(graph.initializer)
    if opset < WRITTEN:
        nodes, more = older(nodes, stored, opset)
        stored += more
    for number, tensor in enumerate(stored):
        after_values = tensor.name.startswith(CONSTANT)
        names[tensor.name] = f"{shared}{tensor.name.removeprefix(CONSTANT)}" if after_values else f"{prefix}c{number}"
        tensor.name = names[tensor.name]
    return renamed(nodes, names, prefix), stored


def _cut(slices: Slices, origin: str, whole: Array, part: Array, name: str) -> None:
    try:
        slices.take(origin, *places(whole, part), out=name)
    except NotSliceableError:
        raise refuse(origin) from None


def _sizes(node: fx.Node) -> list[int]:
    return [int(n) if is_static(n) else -1 for n in value(node).shape]


def _free_prefix(taken: Collection[str]) -> str:
    prefix = PREFIX
    while any(name.startswith(prefix) for name in taken):
        prefix = f"{prefix[:-1]}_/"
    return prefix


def _names(model: onnx.ModelProto) -> set[str]:
    graph = model.graph
    return {o for n in graph.node for o in (*n.output, n.name)} | {t.name for t in (*graph.initializer, *graph.input)}


def _fix_axes(model: onnx.ModelProto, gm: fx.GraphModule, file: FileOrigin) -> list[str]:
    """Free axes of the file that are static in the graph: the file must declare their size."""
    inputs = {i.name: i for i in model.graph.input}
    placeholders = {name: node for node, name in file.inputs(gm.graph).items()}
    fixed = []
    for name, axis, label in file.model.source.free:
        node = placeholders.get(name)
        if node is None or not is_static(value(node).shape[axis]):
            continue
        size = int(value(node).shape[axis])
        inputs[name].type.tensor_type.shape.dim[axis].dim_value = size
        fixed.append(f"{label or f'axis {axis}'} of {name} = {size}")
    if fixed:
        for output in model.graph.output:
            for dim in output.type.tensor_type.shape.dim:
                if not dim.HasField("dim_value"):
                    dim.ClearField("dim_param")
    return fixed


def _sign(model: onnx.ModelProto, origin: Origin, flavor: str, marked: Sequence[Marked]) -> None:
    report = origin.report.to_json()
    texts = {
        "version": __version__,
        "flavor": flavor,
        "policy": json.dumps(report["policy"]),
        "attention": json.dumps([said(m.site, m.form) for m in marked]),
    }
    kept = [p for p in model.metadata_props if p.key not in {METADATA + k for k in texts}]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for key, text in texts.items():
        model.metadata_props.add(key=METADATA + key, value=text)


def _is_external(model: onnx.ModelProto) -> bool:
    import onnx

    return any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)


def _save(model: onnx.ModelProto, source: Source, file: Path, data: Path | None) -> None:
    import onnx

    onnx.load_external_data_for_model(model, str(source.path.resolve().parent))
    if data is None:
        file.write_bytes(model.SerializeToString())
        return
    onnx.save_model(
        model,
        str(file),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=data.name,
        size_threshold=1024,
    )
