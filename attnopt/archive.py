"""Saving and loading: a folder with two JSON files and one of weights, in which nothing is pickled.

``graph.json`` is torch.export's own serialized program, ``weights.safetensors`` its tensors, ``attnopt.json`` the rest.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from attnopt.calling import Signature
from attnopt.capture import quiet
from attnopt.dynamic_blocks import DynamicBlocks
from attnopt.errors import ArchiveError
from attnopt.files import MARKER, atomic_folder
from attnopt.head_routes import edit_from_json
from attnopt.origin import Origin
from attnopt.patterns import Pattern
from attnopt.report import Report
from attnopt.site import Projection, Site
from attnopt.spec import AttentionSpec

FORMAT = 1
GRAPH, WEIGHTS = "graph.json", "weights.safetensors"


def exported(module: fx.GraphModule, origin: Origin) -> ExportedProgram:
    """An optimized graph as an ExportedProgram, dynamic where it was captured so."""
    with quiet():
        return torch.export.export(
            module,
            origin.args,
            dict(origin.kwargs),
            dynamic_shapes=_shapes_of(module, origin.args, origin.kwargs),
            strict=False,
        )


def _shapes_of(module: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Dynamic shapes read from the graph itself: an axis with a symbol is dynamic, and may turn out fixed no more."""
    nodes = iter([n for n in module.graph.nodes if n.op == "placeholder"])

    def of(_: Any) -> Any:
        val = next(nodes).meta.get("val")
        if not isinstance(val, Tensor):
            return None
        return {i: Dim.AUTO for i, s in enumerate(val.shape) if not isinstance(s, int)} or None

    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    shapes = [of(leaf) for leaf in leaves]
    if not any(shapes):
        return None
    positional, keywords = pytree.tree_unflatten(shapes, spec)
    from torch.export._trace import _get_forward_arg_names

    names = _get_forward_arg_names(module, args, dict(kwargs))
    return dict(zip(names, (*positional, *keywords.values()), strict=True))


def save(module: fx.GraphModule, origin: Origin, path: str | os.PathLike[str]) -> None:
    """Write an optimized graph to the folder ``path``; an older save there is replaced only once the new one is complete."""
    from safetensors.torch import save_file
    from torch._export.serde.serialize import serialize

    program = exported(module, origin)
    tensors, about_tensors = _tensors_of(program)
    empty = {
        name: type(t)(torch.empty(0)) if isinstance(t, torch.nn.Parameter) else torch.empty(0)
        for name, t in program.state_dict.items()
    }
    program._example_inputs, program._state_dict, program._constants = None, empty, {}
    with quiet():
        graph = serialize(program).exported_program
    about = {
        "format": FORMAT,
        "report": origin.report.to_json(),
        "signature": origin.signature.to_json(),
        "sites": [_site_to_json(s) for s in origin.sites],
        "tensors": about_tensors,
    }
    with atomic_folder(path) as folder:
        (folder / GRAPH).write_bytes(graph)
        try:
            save_file(tensors, folder / WEIGHTS)
        except Exception as e:
            raise OSError(f"{type(e).__name__}: {e}") from e
        (folder / MARKER).write_text(json.dumps(about, indent=1), encoding="utf-8")


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


def read(path: str | os.PathLike[str]) -> tuple[fx.GraphModule, Origin]:
    """What ``save`` wrote to ``path``.  Raises ArchiveError."""
    folder = Path(path)
    about = _read_about(folder)
    program = _read_program(folder, about)
    try:
        report = Report.from_json(about["report"])
        signature = Signature.from_json(about["signature"])
        module = program.module()
        assert isinstance(module, fx.GraphModule)
        live = {**dict(module.named_buffers()), **dict(module.named_parameters(remove_duplicate=False))}
        sites = tuple(_site_from_json(s, live) for s in about["sites"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ArchiveError(f"{folder / MARKER} is damaged: {type(e).__name__}: {e}", hint="save the model again") from e
    return module, Origin(report, sites, signature, *_examples(module))


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / MARKER
    if not file.is_file():
        raise ArchiveError(f"{folder} holds no saved attnopt model", hint="give the folder that save was given")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ArchiveError(f"{file} cannot be read: {e}", hint="save the model again") from e
    found = about.get("format") if isinstance(about, dict) else None
    if found != FORMAT:
        raise ArchiveError(
            f"{file} has format {found!r}, this version reads {FORMAT}", hint="save it again with this version"
        )
    return dict(about)


def _read_program(folder: Path, about: Mapping[str, Any]) -> ExportedProgram:
    from torch._export.serde.serialize import SerializedArtifact, deserialize

    graph = _read_graph(folder / GRAPH)
    _import_output_classes(graph)
    state, constants = _read_tensors(folder / WEIGHTS, about)
    tables: tuple[Any, Any, Any] = (state, constants, ())  # dicts are taken as they are, bytes would be unpickled
    artifact = SerializedArtifact(graph, *tables)
    try:
        with quiet():
            return deserialize(artifact)
    except Exception as e:
        hint = "save the model again"
        if "not registered" in str(e):
            hint = "import the library whose classes the model takes or returns, then load"
        raise ArchiveError(f"{folder / GRAPH} cannot be read: {type(e).__name__}: {str(e)[:200]}", hint=hint) from e


_LIBRARIES = ("transformers", "diffusers")  # whose output classes torch can rebuild once they are imported


def _import_output_classes(graph: bytes) -> None:
    """Import the modules of these libraries, and of no others, whose classes the model takes or returns."""
    pattern = rf"((?:{'|'.join(_LIBRARIES)})(?:\.\w+)+)\.\w+"
    for name in set(re.findall(pattern, graph.decode("utf-8", "replace"))):
        with contextlib.suppress(Exception):  # a library that does not import is missed where its class is needed
            importlib.import_module(name)


_ARITHMETIC = re.compile(r"(?:[\w\s+\-*/(),.<>=&|!~]|'\w+')*")  # a quoted word is the name of a Symbol


def _read_graph(file: Path) -> bytes:
    """The serialized graph; its size expressions, which torch hands to sympy, may hold nothing but arithmetic."""
    try:
        data = file.read_bytes()
        parsed = json.loads(data)
    except (OSError, ValueError, RecursionError) as e:
        raise ArchiveError(f"{file} cannot be read: {e}", hint="save the model again") from e
    stack: list[Any] = [parsed]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(item)
        elif isinstance(item, dict):
            text = item.get("expr_str")
            if isinstance(text, str) and ("__" in text or not _ARITHMETIC.fullmatch(text)):
                raise ArchiveError(f"{file} holds {text[:60]!r} where a size belongs", hint="do not trust this file")
            stack.extend(item.values())
    return data


def _read_tensors(file: Path, about: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors.torch import load_file

    try:
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
    except Exception as e:
        raise ArchiveError(f"{file} cannot be read: {type(e).__name__}: {e}", hint="save the model again") from e
    return tables["state"], tables["constants"]


def _examples(module: fx.GraphModule) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the captured sizes, made anew: an archive holds none."""
    leaves: list[Any] = []
    for node in module.graph.nodes:
        if node.op != "placeholder":
            continue
        val = node.meta.get("val")
        leaves.append(_zeros(val) if isinstance(val, Tensor) else val)
    spec = getattr(module, "_in_spec", None)
    if spec is None:
        return tuple(leaves), {}
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return tuple(args), dict(kwargs)


def _zeros(val: Tensor) -> Tensor:
    from attnopt.graph import hint

    return torch.zeros([max(1, hint(s)) for s in val.shape], dtype=val.dtype, device=val.device)


def _site_to_json(site: Site) -> dict[str, Any]:
    spec = site.spec
    return {
        "name": site.name,
        "where": site.where,
        "notes": list(site.notes),
        "q_len": site.q_len,
        "kv_len": site.kv_len,
        "is_dynamic": site.is_dynamic,
        "projections": {
            role: {
                "weight": p.weight,
                "bias": p.bias,
                "transposed": p.transposed,
                "why": p.why,
                "direct": p.direct,
                "rows": None if p.rows is None else [list(r) for r in p.rows],
            }
            for role, p in site.projections.items()
        },
        "spec": {
            "heads": list(spec.heads),
            "kv_heads": list(spec.kv_heads),
            "kv_of_head": list(spec.kv_of_head),
            "head_dim": spec.head_dim,
            "value_dim": spec.value_dim,
            "scale": spec.scale,
            "pattern": spec.pattern.to_json(),
            "has_bias": spec.has_bias,
            "has_mask": spec.has_mask,
            "has_sinks": spec.has_sinks,
            "softcap": spec.softcap,
            "selection": None if spec.selection is None else spec.selection.to_json(),
            "gains": None if spec.gains is None else list(spec.gains),
            "is_cross": spec.is_cross,
            "seen_as": None if spec.seen_as is None else spec.seen_as.to_json(),
            "positions": list(spec.positions),
            "after": [edit.to_json() for edit in spec.after],
        },
    }


def _site_from_json(data: Mapping[str, Any], live: Mapping[str, Tensor]) -> Site:
    spec = dict(data["spec"])
    for key in ("heads", "kv_heads", "kv_of_head", "positions"):
        spec[key] = tuple(spec[key])
    spec["gains"] = None if spec["gains"] is None else tuple(spec["gains"])
    spec["pattern"] = Pattern.from_json(spec["pattern"])
    spec["seen_as"] = None if spec["seen_as"] is None else Pattern.from_json(spec["seen_as"])
    spec["selection"] = None if spec["selection"] is None else DynamicBlocks.from_json(spec["selection"])
    spec["after"] = tuple(edit_from_json(edit) for edit in spec.get("after", ()))
    projections = {
        role: Projection(
            p["weight"],
            p["bias"],
            p["transposed"],
            None if p["rows"] is None else tuple(tuple(r) for r in p["rows"]),
            p["why"],
            p.get("direct", True),
        )
        for role, p in data["projections"].items()
    }
    return Site(
        data["name"],
        AttentionSpec(**spec),
        projections,
        data["where"],
        tuple(data["notes"]),
        parameters=live,
        q_len=data["q_len"],
        kv_len=data["kv_len"],
        is_dynamic=data["is_dynamic"],
    )
