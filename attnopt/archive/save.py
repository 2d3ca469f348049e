"""Saving: a folder with two JSON files and one weight file, without pickling.

``graph.json`` is torch.export's own serialized program, ``weights.safetensors`` its tensors, ``attnopt.json`` the rest, with
the digests that detect damage.
"""

from __future__ import annotations

import json
import os

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from attnopt.archive.folder import FORMAT, GRAPH, WEIGHTS, digest, digest_of_file
from attnopt.archive.form_json import form_to_json
from attnopt.archive.site_json import site_to_json, spec_to_json
from attnopt.archive.untrusted_graph import NotAGraphError, check_graph
from attnopt.base.atomic_files import MARKER, atomic_folder
from attnopt.base.compile_lock import compiling
from attnopt.base.quiet import quiet
from attnopt.capture.exported_program import exported
from attnopt.compiler.origin import Origin
from attnopt.errors import ArchiveError
from attnopt.lower.attention_calls import Lowered, attention_calls, lowered_at


@compiling()
def save(module: fx.GraphModule, origin: Origin, path: str | os.PathLike[str]) -> None:
    """Write an optimized graph to the folder ``path``; an older save there is replaced only once the new one is complete."""
    from safetensors.torch import save_file
    from torch._export.serde.serialize import serialize

    _refuse_unread(module)
    form = None if origin.form is None else form_to_json(origin.form)
    program = exported(module, origin.inputs)
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
            f"torch cannot serialize the graph: {type(e).__name__}: {str(e)[:300]}",
            hint="make the model take and return plain tuples, lists and dicts of tensors",
        ) from e
    try:
        check_graph(json.loads(graph))
    except NotAGraphError as e:
        raise ArchiveError(f"cannot save: {e}, which load() would reject") from e
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
            "attentions": [_call_to_json(lowered_at(call)) for call in attention_calls(module.graph)],
            "tensors": about_tensors,
            "sha256": {name: digest_of_file(folder / name) for name in (GRAPH, WEIGHTS)},
        }
        about["self_sha256"] = digest(json.loads(json.dumps(about)))
        (folder / MARKER).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _call_to_json(computed: Lowered | None) -> dict[str, object] | None:
    return None if computed is None else {"site": computed.site, "spec": spec_to_json(computed.spec)}


def _refuse_unread(module: fx.GraphModule) -> None:
    if any(n.op == "call_function" and str(n.target).startswith("attnopt.onnx_nodes") for n in module.graph.nodes):
        raise ArchiveError(
            "cannot save: the model comes from an ONNX file, and some of its nodes run in ONNX Runtime",
            hint="write it as an ONNX file with export_onnx()",
        )


def _tensors_of(program: ExportedProgram) -> tuple[dict[str, Tensor], list[dict[str, object]]]:
    """Every tensor once, by number, and its names: shared weights stay shared."""
    stored: dict[str, Tensor] = {}
    known: dict[object, str] = {}
    entries: list[dict[str, object]] = []
    for table, found in (("state", program.state_dict), ("constants", program.constants)):
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor):
                raise ArchiveError(
                    f"the graph contains {name}, a {type(tensor).__name__}, which cannot be saved without pickling"
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
