"""Reading a saved model without executing any of it."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnopt.archive.folder import FORMAT, GRAPH, WEIGHTS, digest, digest_of_file
from attnopt.archive.form_json import form_from_json
from attnopt.archive.site_json import site_from_json, spec_from_json
from attnopt.archive.untrusted_graph import check_graph, check_operators
from attnopt.base.atomic_files import MARKER
from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.quiet import quiet
from attnopt.base.sizes import hint
from attnopt.capture.guards import user_inputs
from attnopt.capture.signature import Signature
from attnopt.compiler.origin import Origin
from attnopt.errors import ArchiveError
from attnopt.graph.nodes import stored
from attnopt.lower.attention_calls import Lowered, attention_calls, note
from attnopt.report.report import Report

LARGEST = 1 << 28  # bytes of a description or of a graph


@compiling()
def read(path: str | os.PathLike[str], classes: Iterable[type] = ()) -> tuple[fx.GraphModule, Origin]:
    """What ``save`` wrote to ``path``.  Raises ArchiveError; nothing in the files is executed.

    ``classes``: the user's own, whose instances the model may return."""
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
        _note_attentions(module, about["attentions"])
        trains_otherwise = bool(about["trains_otherwise"])
        form = None if about["form"] is None else form_from_json(about["form"], classes)
    return module, Origin(report, sites, signature, examples, trains_otherwise=trains_otherwise, form=form)


def _note_attentions(module: fx.GraphModule, noted: Sequence[Mapping[str, Any] | None]) -> None:
    """What each attention call computes: a serialized graph keeps its calls in their order, and nothing that is noted there."""
    for call, computed in zip(attention_calls(module.graph), noted, strict=True):
        if computed is not None:
            note(call, Lowered(str(computed["site"]), spec_from_json(computed["spec"])))


@contextlib.contextmanager
def _blamed(file: Path, hint: str = "save the model again") -> Iterator[None]:
    """Attribute any failure inside to ``file``: a damaged or hostile one may make any part of its reader fail."""
    try:
        yield
    except ArchiveError:
        raise
    except Exception as e:
        raise ArchiveError(f"{file} cannot be read: {type(e).__name__}: {str(e)[:200]}", hint=hint) from e


def _check_file(file: Path, digest: str) -> None:
    """A plain file (no pipe or device, which could block or never end) with the bytes that were written."""
    if not file.is_file():
        raise ArchiveError(f"{file} is missing or not a regular file", hint="save the model again")
    if file.name == GRAPH:
        _check_size(file)
    if digest_of_file(file) != digest:
        raise ArchiveError(
            f"{file}: checksum mismatch: the file changed after it was saved", hint="save the model again"
        )


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / MARKER
    if not file.is_file():
        raise ArchiveError(f"{folder} does not contain a saved attnopt model", hint="pass the folder that save() wrote")
    with _blamed(file):
        _check_size(file)
        about = json.loads(file.read_bytes())
        found = about.get("format") if isinstance(about, dict) else None
        if found != FORMAT:
            raise ArchiveError(
                f"{file} has format {found!r}; this version reads format {FORMAT}",
                hint="save it again with this version",
            )
        if about.pop("self_sha256", None) != digest(about):
            raise ArchiveError(
                f"{file}: checksum mismatch: the file changed after it was saved", hint="save the model again"
            )
    return dict(about)


def _check_size(file: Path) -> None:
    if (size := file.stat().st_size) > LARGEST:
        raise ArchiveError(f"{file} is too large: {size} bytes, at most {LARGEST} are read")


def _read_module(folder: Path, about: Mapping[str, Any]) -> tuple[fx.GraphModule, CallInputs]:
    """The graph, and inputs of the sizes that it was captured with."""
    from torch._export.serde.serialize import SerializedArtifact, deserialize

    file = folder / GRAPH
    with _blamed(file):
        graph = file.read_bytes()
        check_graph(json.loads(graph))
    _import_output_classes(graph)
    with _blamed(folder / WEIGHTS):
        state, constants = _read_tensors(folder / WEIGHTS, about)
    tables: tuple[Any, Any, Any] = (state, constants, ())  # dicts are used directly, bytes would be unpickled
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
    """Import the modules that define the input and output classes of the model, from these libraries only."""
    pattern = rf"((?:{'|'.join(_LIBRARIES)})(?:\.\w+)+)\.\w+"
    for name in set(re.findall(pattern, graph.decode("utf-8", "replace"))):
        with contextlib.suppress(Exception):  # a failed import is reported where the class is needed
            importlib.import_module(name)


def _read_tensors(file: Path, about: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from safetensors.torch import load_file

    # Copied: a tensor at an unaligned address in the file would use other kernels and give other bits.
    stored = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tables: dict[str, dict[str, Tensor]] = {"state": {}, "constants": {}}
    parameters: dict[str, torch.nn.Parameter] = {}
    for entry in about["tensors"]:
        key = entry["key"]
        tensor: Tensor = stored[key]
        if entry["parameter"]:
            made = torch.nn.Parameter(tensor, requires_grad=bool(entry["requires_grad"]))
            tensor = parameters.setdefault(key, made)
        tables[entry["table"]][entry["name"]] = tensor
    return tables["state"], tables["constants"]


def _examples(program: ExportedProgram) -> CallInputs:
    """New inputs of the captured sizes: an archive contains none."""
    values = [n.meta.get("val") for n in user_inputs(program)]
    leaves = [
        _zeros(val) if isinstance(val, Tensor) else hint(val) if isinstance(val, torch.SymInt) else val
        for val in values
    ]
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return CallInputs(tuple(args), dict(kwargs))


def _zeros(val: Tensor) -> Tensor:
    """Zeros that use no memory until touched: their number comes from the untrusted file."""
    sizes = [max(1, hint(s)) for s in val.shape]
    data = np.zeros(math.prod(sizes) * val.element_size(), dtype=np.uint8)
    return torch.from_numpy(data).view(val.dtype).view(sizes).to(val.device)
