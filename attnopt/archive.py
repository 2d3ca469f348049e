"""Saving and loading: a folder with two JSON files and one of weights, in which nothing is pickled.

``graph.json`` is torch.export's own serialized program, ``weights.safetensors`` its tensors, ``attnopt.json`` the rest, with
the digests by which damage is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from attnopt.calibration import Inputs
from attnopt.calling import Signature
from attnopt.capture import quiet
from attnopt.compiling import compiling, mode_of
from attnopt.containers import in_lists
from attnopt.errors import ArchiveError
from attnopt.files import MARKER, atomic_folder
from attnopt.form_json import form_from_json, form_to_json
from attnopt.graph import hint, is_static, stored
from attnopt.origin import Origin
from attnopt.relations import user_inputs
from attnopt.report import Report
from attnopt.site_json import site_from_json, site_to_json
from attnopt.untrusted import NotAGraphError, check_graph, check_operators

FORMAT = 3
LARGEST = 1 << 28  # bytes of a description or of a graph
GRAPH, WEIGHTS = "graph.json", "weights.safetensors"


@compiling()
def exported(module: fx.GraphModule, origin: Origin) -> ExportedProgram:
    """An optimized graph as an ExportedProgram, dynamic where it was captured so."""
    with quiet(), mode_of(module):
        return torch.export.export(
            module,
            origin.args,
            dict(origin.kwargs),
            dynamic_shapes=_shapes_of(module, origin.args, origin.kwargs),
            strict=False,
        )


def _shapes_of(module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Dynamic shapes read from the graph itself: an axis with a symbol is dynamic, and may turn out fixed no more."""
    shapes = [_dynamic(n.meta.get("val")) for n in module.graph.nodes if n.op == "placeholder"]
    if not any(shapes):
        return None
    left = iter(shapes)
    positional, keywords = in_lists((args, dict(kwargs)), lambda _: next(left))
    from torch.export._trace import _get_forward_arg_names

    names = _get_forward_arg_names(module, args, dict(kwargs))
    return dict(zip(names, (*positional, *keywords.values()), strict=True))


def _dynamic(val: Any) -> Any:
    if isinstance(val, torch.SymInt):
        return Dim.AUTO
    if not isinstance(val, Tensor):
        return None
    return {i: Dim.AUTO for i, s in enumerate(val.shape) if not is_static(s)} or None


@compiling()
def save(module: fx.GraphModule, origin: Origin, path: str | os.PathLike[str]) -> None:
    """Write an optimized graph to the folder ``path``; an older save there is replaced only once the new one is complete."""
    from safetensors.torch import save_file
    from torch._export.serde.serialize import serialize

    _refuse_unread(module)
    form = None if origin.form is None else form_to_json(origin.form)
    program = exported(module, origin)
    tensors, about_tensors = _tensors_of(program)
    empty = {
        name: type(t)(torch.empty(0)) if isinstance(t, torch.nn.Parameter) else torch.empty(0)
        for name, t in program.state_dict.items()
    }
    program._example_inputs, program._state_dict, program._constants = None, empty, {}
    try:
        with quiet():
            graph = serialize(program).exported_program
    except Exception as e:
        raise ArchiveError(
            f"torch cannot write down the graph: {type(e).__name__}: {str(e)[:300]}",
            hint="let the model take and return plain tuples, lists and dicts of tensors",
        ) from e
    try:
        check_graph(json.loads(graph))
    except NotAGraphError as e:
        raise ArchiveError(f"the model cannot be saved: no file that it is read from may say that {e}") from e
    with atomic_folder(path) as folder:
        (folder / GRAPH).write_bytes(graph)
        try:
            save_file(tensors, folder / WEIGHTS)
        except Exception as e:
            raise OSError(f"{type(e).__name__}: {e}") from e
        about = {
            "format": FORMAT,
            "report": origin.report.to_json(),
            "signature": origin.signature.to_json(),
            "trains_otherwise": origin.trains_otherwise,
            "form": form,
            "sites": [site_to_json(s) for s in origin.sites],
            "tensors": about_tensors,
            "sha256": {name: _digest_of_file(folder / name) for name in (GRAPH, WEIGHTS)},
        }
        about["self_sha256"] = _digest(json.loads(json.dumps(about)))
        (folder / MARKER).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _refuse_unread(module: fx.GraphModule) -> None:
    if any(n.op == "call_function" and str(n.target).startswith("attnopt.onnx_nodes") for n in module.graph.nodes):
        raise ArchiveError(
            "the model was made of an ONNX file with nodes that are left to ONNX Runtime, which cannot be saved",
            hint="keep it as an ONNX file: export_onnx writes one",
        )


def _tensors_of(program: ExportedProgram) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Every tensor once, by a number, and what it is called where: weights that are shared stay shared."""
    stored: dict[str, Tensor] = {}
    known: dict[Any, str] = {}
    entries: list[dict[str, Any]] = []
    for table, found in (("state", program.state_dict), ("constants", program.constants)):
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor):
                raise ArchiveError(
                    f"the graph holds {name}, a {type(tensor).__name__}, which cannot be saved without pickling"
                )
            view = (
                tensor.untyped_storage().data_ptr(),
                tensor.storage_offset(),
                tuple(tensor.shape),
                tuple(tensor.stride()),
            )
            key = (*view, tensor.dtype) if tensor.numel() else (table, name)
            if key not in known:
                known[key] = f"t{len(stored)}"
                stored[known[key]] = tensor.detach().clone(memory_format=torch.contiguous_format)
            entries.append(
                {
                    "table": table,
                    "name": name,
                    "key": known[key],
                    "parameter": isinstance(tensor, torch.nn.Parameter),
                    "requires_grad": tensor.requires_grad,
                }
            )
    return stored, entries


@compiling()
def read(path: str | os.PathLike[str], classes: Iterable[type] = ()) -> tuple[fx.GraphModule, Origin]:
    """What ``save`` wrote to ``path``.  Raises ArchiveError; nothing that the files say is run.

    ``classes``: of the user's own, whose instances the model may return."""
    folder = Path(path)
    about = _read_about(folder)
    for name in (GRAPH, WEIGHTS):
        with _blamed(folder / name):
            _check_file(folder / name, about["sha256"][name])
    module, examples = _read_module(folder, about)
    with _blamed(folder / MARKER):
        report = Report.from_json(about["report"])
        signature = Signature.from_json(about["signature"])
        live = stored(module)
        sites = tuple(site_from_json(s, live) for s in about["sites"])
        trains_otherwise = bool(about["trains_otherwise"])
        form = None if about["form"] is None else form_from_json(about["form"], classes)
    return module, Origin(report, sites, signature, *examples, trains_otherwise=trains_otherwise, form=form)


@contextlib.contextmanager
def _blamed(file: Path, hint: str = "save the model again") -> Iterator[None]:
    """Whatever goes wrong inside is said of ``file``: a damaged or hostile one may make any part of its reader fail."""
    try:
        yield
    except ArchiveError:
        raise
    except Exception as e:
        raise ArchiveError(f"{file} cannot be read: {type(e).__name__}: {str(e)[:200]}", hint=hint) from e


def _check_file(file: Path, digest: str) -> None:
    """A plain file (no pipe or device, which could block or never end) with the bytes that were written."""
    if not file.is_file():
        raise ArchiveError(f"{file} is not there or is no plain file", hint="save the model again")
    if file.name == GRAPH:
        _check_size(file)
    if _digest_of_file(file) != digest:
        raise ArchiveError(f"{file} is damaged: it is not what was saved", hint="save the model again")


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / MARKER
    if not file.is_file():
        raise ArchiveError(f"{folder} holds no saved attnopt model", hint="give the folder that save was given")
    with _blamed(file):
        _check_size(file)
        about = json.loads(file.read_bytes())
        found = about.get("format") if isinstance(about, dict) else None
        if found != FORMAT:
            raise ArchiveError(
                f"{file} has format {found!r}, this version reads {FORMAT}", hint="save it again with this version"
            )
        if about.pop("self_sha256", None) != _digest(about):
            raise ArchiveError(f"{file} is damaged: it is not what was saved", hint="save the model again")
    return dict(about)


def _check_size(file: Path) -> None:
    if (size := file.stat().st_size) > LARGEST:
        raise ArchiveError(f"{file}: {size} bytes are too many for a description; at most {LARGEST} are read")


def _digest_of_file(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _read_module(folder: Path, about: Mapping[str, Any]) -> tuple[fx.GraphModule, Inputs]:
    """The graph, and inputs of the sizes that it was captured with."""
    from torch._export.serde.serialize import SerializedArtifact, deserialize

    file = folder / GRAPH
    with _blamed(file):
        graph = file.read_bytes()
        check_graph(json.loads(graph))
    _import_output_classes(graph)
    with _blamed(folder / WEIGHTS):
        state, constants = _read_tensors(folder / WEIGHTS, about)
    tables: tuple[Any, Any, Any] = (state, constants, ())  # dicts are taken as they are, bytes would be unpickled
    with _blamed(file), quiet():
        try:
            program = deserialize(SerializedArtifact(graph, *tables))
        except Exception as e:
            if "not registered" not in str(e):
                raise
            raise ArchiveError(
                f"{file} cannot be read: {str(e)[:200]}",
                hint="import the library whose classes the model takes or returns, then load",
            ) from e
        check_operators(program.graph_module)
        examples = program._example_inputs = _examples(program)
        module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module, examples


_LIBRARIES = ("transformers", "diffusers")  # whose output classes torch can rebuild once they are imported


def _import_output_classes(graph: bytes) -> None:
    """Import the modules of these libraries, and of no others, whose classes the model takes or returns."""
    pattern = rf"((?:{'|'.join(_LIBRARIES)})(?:\.\w+)+)\.\w+"
    for name in set(re.findall(pattern, graph.decode("utf-8", "replace"))):
        with contextlib.suppress(Exception):  # a library that does not import is missed where its class is needed
            importlib.import_module(name)


def _read_tensors(file: Path, about: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors.torch import load_file

    # Copied: a tensor that lies in the file at an odd address takes other kernels, and gives other bits.
    stored = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tables: dict[str, dict[str, Any]] = {"state": {}, "constants": {}}
    parameters: dict[str, torch.nn.Parameter] = {}
    for entry in about["tensors"]:
        key = entry["key"]
        tensor: Tensor = stored[key]
        if entry["parameter"]:
            made = torch.nn.Parameter(tensor, requires_grad=bool(entry["requires_grad"]))
            tensor = parameters.setdefault(key, made)
        tables[entry["table"]][entry["name"]] = tensor
    return tables["state"], tables["constants"]


def _examples(program: ExportedProgram) -> Inputs:
    """Inputs of the captured sizes, made anew: an archive holds none."""
    values = [n.meta.get("val") for n in user_inputs(program)]
    leaves = [
        _zeros(val) if isinstance(val, Tensor) else hint(val) if isinstance(val, torch.SymInt) else val
        for val in values
    ]
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def _zeros(val: Tensor) -> Tensor:
    """Zeros that take no memory before they are used: their number is the file's word."""
    sizes = [max(1, hint(s)) for s in val.shape]
    data = np.zeros(math.prod(sizes) * val.element_size(), dtype=np.uint8)
    return torch.from_numpy(data).view(val.dtype).view(sizes).to(val.device)
