"""Saving and loading: a folder with a torch.export archive and a JSON file, in which nothing is pickled."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from attnopt.calling import Signature
from attnopt.capture import quiet
from attnopt.errors import ArchiveError
from attnopt.files import MARKER, atomic_folder
from attnopt.patterns import Pattern
from attnopt.report import Report
from attnopt.site import Projection, Site
from attnopt.spec import AttentionSpec

if TYPE_CHECKING:
    from attnopt.model import OptimizedModel

FORMAT = 1
PROGRAM = "model.pt2"


def exported(fast: OptimizedModel) -> ExportedProgram:
    """The optimized graph as an ExportedProgram, dynamic where it was captured so."""
    origin, module = fast.origin, fast.graph_module
    with quiet():
        return torch.export.export(
            module, origin.args, dict(origin.kwargs), dynamic_shapes=_shapes_of(module, origin.args, origin.kwargs), strict=False
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


def save(fast: OptimizedModel, path: str | os.PathLike[str]) -> None:
    """Write ``fast`` to the folder ``path``; an older save there is replaced only once the new one is complete."""
    program = exported(fast)
    program._example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    origin = fast.origin
    about = {
        "format": FORMAT,
        "report": origin.report.to_json(),
        "signature": origin.signature.to_json(),
        "sites": [_site_to_json(s) for s in origin.sites],
    }
    with atomic_folder(path) as folder:
        (folder / PROGRAM).write_bytes(buffer.getvalue())
        (folder / MARKER).write_text(json.dumps(about, indent=1), encoding="utf-8")


def load(path: str | os.PathLike[str]) -> OptimizedModel:
    """The model that ``save`` wrote to ``path``, giving the same bits.  Raises ArchiveError; runs nothing that it reads."""
    from attnopt.model import Origin, OptimizedModel

    folder = Path(path)
    about = _read_about(folder)
    program = _read_program(folder / PROGRAM)
    try:
        report = Report.from_json(about["report"])
        signature = Signature.from_json(about["signature"])
        module = program.module()
        assert isinstance(module, fx.GraphModule)
        live = {**dict(module.named_buffers()), **dict(module.named_parameters(remove_duplicate=False))}
        sites = tuple(_site_from_json(s, live) for s in about["sites"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ArchiveError(f"{folder / MARKER} is damaged: {type(e).__name__}: {e}", hint="save the model again") from e
    return OptimizedModel(module, Origin(report, sites, signature, *_examples(module)))


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
        raise ArchiveError(f"{file} has format {found!r}, this version reads {FORMAT}", hint="save it again with this version")
    return dict(about)


def _read_program(file: Path) -> ExportedProgram:
    if not file.is_file():
        raise ArchiveError(f"{file} is missing", hint="save the model again")
    _refuse_pickles(file)
    try:
        with quiet():
            return torch.export.load(file)
    except Exception as e:  # noqa: BLE001  a damaged archive fails in many ways inside torch
        raise ArchiveError(f"{file} cannot be read: {type(e).__name__}: {str(e)[:200]}", hint="save the model again") from e


def _refuse_pickles(file: Path) -> None:
    """torch would unpickle what an archive marks as pickled: such an archive is none of ours."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            configs = [n for n in names if n.endswith("_config.json")]
            marked = any(_marks_pickle(json.loads(archive.read(n))) for n in configs)
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        raise ArchiveError(f"{file} is no archive: {e}", hint="save the model again") from e
    if marked or any("/sample_inputs/" in n or n.endswith((".pkl", ".pickle")) for n in names):
        raise ArchiveError(f"{file} holds pickled data, which attnopt neither writes nor reads", hint="do not trust this file")


def _marks_pickle(config: Any) -> bool:
    if isinstance(config, dict):
        return bool(config.get("use_pickle")) or any(map(_marks_pickle, config.values()))
    return any(map(_marks_pickle, config)) if isinstance(config, list) else False


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
        "name": site.name, "where": site.where, "notes": list(site.notes), "q_len": site.q_len, "kv_len": site.kv_len,
        "projections": {
            role: {"weight": p.weight, "bias": p.bias, "transposed": p.transposed, "why": p.why,
                   "rows": None if p.rows is None else [list(r) for r in p.rows]}
            for role, p in site.projections.items()
        },
        "spec": {
            "heads": list(spec.heads), "kv_heads": list(spec.kv_heads), "kv_of_head": list(spec.kv_of_head),
            "head_dim": spec.head_dim, "value_dim": spec.value_dim, "scale": spec.scale, "pattern": spec.pattern.to_json(),
            "has_bias": spec.has_bias, "has_mask": spec.has_mask, "has_sinks": spec.has_sinks, "softcap": spec.softcap,
            "gains": None if spec.gains is None else list(spec.gains), "is_cross": spec.is_cross,
            "seen_as": None if spec.seen_as is None else spec.seen_as.to_json(), "positions": list(spec.positions),
        },
    }  # fmt: skip


def _site_from_json(data: Mapping[str, Any], live: Mapping[str, Tensor]) -> Site:
    spec = dict(data["spec"])
    for key in ("heads", "kv_heads", "kv_of_head", "positions"):
        spec[key] = tuple(spec[key])
    spec["gains"] = None if spec["gains"] is None else tuple(spec["gains"])
    spec["pattern"] = Pattern.from_json(spec["pattern"])
    spec["seen_as"] = None if spec["seen_as"] is None else Pattern.from_json(spec["seen_as"])
    projections = {
        role: Projection(p["weight"], p["bias"], p["transposed"],
                         None if p["rows"] is None else tuple(tuple(r) for r in p["rows"]), p["why"])
        for role, p in data["projections"].items()
    }  # fmt: skip
    return Site(
        data["name"], AttentionSpec(**spec), projections, data["where"], tuple(data["notes"]), parameters=live,
        q_len=data["q_len"], kv_len=data["kv_len"],
    )  # fmt: skip
