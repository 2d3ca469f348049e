"""ONNX for ONNX Runtime: exported by torch, every attention in its fastest form, run and compared before it gets its name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnopt.archive import exported
from attnopt.capture import quiet
from attnopt.compiling import compiling
from attnopt.errors import ExportError
from attnopt.files import atomic_write
from attnopt.graph import ancestors, aten, is_call, is_state
from attnopt.operands import ROLES
from attnopt.origin import Origin
from attnopt.relations import relations
from attnopt.to_onnx.choice import Form, OnnxSite
from attnopt.to_onnx.grouped import grouped_products
from attnopt.to_onnx.pairs import in_pairs
from attnopt.to_onnx.promoting import promoted
from attnopt.to_onnx.sites import DOMAIN, OP, Marked, fastest, mark
from attnopt.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

    from attnopt.to_onnx.builder import Builder

Write = Callable[["Builder", OnnxSite, Form, "Mapping[str, ir.Value | None]"], "ir.Value"]
Flavor = Literal["onnxruntime", "standard"]
OPSETS = (23, 24, 25)  # below, there is no Attention; opset 26 is silently written wrong by torch 2.13
METADATA = "attnopt."  # how the names of the model's properties begin
ROOM_IN_FILE = 2**31 - 2**26  # protobuf holds 2 GiB, the graph included


@compiling()
def export_onnx(
    gm: fx.GraphModule,
    origin: Origin,
    path: str | os.PathLike[str],
    *,
    flavor: Flavor,
    opset: int | None,
    external_data: bool | Literal["auto"],
    verify: bool,
) -> None:
    """Write an optimized graph to ``path``.  Raises ExportError, and then leaves what was at ``path`` as it was."""
    if flavor not in get_args(Flavor):
        raise ExportError(f"there is no flavor {flavor!r}", hint=f"choose one of {', '.join(get_args(Flavor))}")
    if origin.file is None and opset is not None and opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported", hint=f"choose one of {', '.join(map(str, OPSETS))}")
    if external_data not in (True, False, "auto"):
        raise ExportError(f"external_data={external_data!r} is not possible", hint='give True, False or "auto"')
    if origin.file is not None:
        from attnopt.to_onnx.in_place import export_in_place

        options: dict[str, Any] = {"flavor": flavor, "external_data": external_data, "verify": verify}
        export_in_place(gm, origin, path, opset=opset, **options)
        return
    size = weights_size(gm)
    if external_data is False and size > ROOM_IN_FILE:
        raise ExportError(
            f"the model's {size / 2**30:.1f} GiB of weights do not fit into one ONNX file, which holds 2 GiB",
            hint='leave external_data at "auto"',
        )
    from attnopt.to_onnx.cache_names import with_names
    from attnopt.to_onnx.conditions import check_sizes
    from attnopt.to_onnx.forms import write
    from attnopt.to_onnx.neighbours import settle

    with written_to(path, size > ROOM_IN_FILE if external_data == "auto" else external_data) as (file, data):
        contrib = flavor == "onnxruntime"
        gm, names = with_names(gm, origin)
        marked_gm, marked = mark(gm, {s.name: s.spec.pattern for s in origin.sites}, fastest(contrib))
        model, held = translated(marked_gm, origin, opset or OPSETS[0])
        expand(model.graph, marked, write)
        settle(model, contrib)
        check_sizes(model.graph, held)
        if names is not None:
            names.give(model.graph)
        finish(model, origin, flavor, marked)
        save(model, file, data)
        if verify:
            from attnopt.to_onnx.verify import verify as run_and_compare

            run_and_compare(gm, origin, file, marked, {} if names is None else names.inputs)


def weights_size(gm: fx.GraphModule) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in (*gm.parameters(), *gm.buffers()))


def translated(gm: fx.GraphModule, origin: Origin, opset: int) -> tuple[ir.Model, tuple[str, ...]]:
    """torch's own export of a graph, which is changed to what torch can export, and the relations between the sizes of its
    inputs for which it was captured.  Raises ExportError."""
    from onnx_ir.passes.common import NameFixPass
    from onnxscript.optimizer import optimize_ir

    _drop_state(gm)
    try:
        with quiet():
            in_pairs(gm)
            promoted(gm)
            program = exported(gm, origin)
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                output_names=_output_names(gm),
                custom_translation_table=grouped_products(gm),
                optimize=False,  # its rotary fusion makes a node that refuses tables with a batch of one
                verbose=False,
            )
            assert made is not None
            model: ir.Model = made.model
            NameFixPass()(model)  # two values may have got one name, which the optimizer does not stand
            optimize_ir(model)
            return model, relations(program, gm.forward, origin.args, origin.kwargs)
    except Exception as e:
        if isinstance(e, OSError):
            raise
        raise ExportError(
            f"torch.onnx could not export the graph: {_first_cause(e)}",
            hint="the named operator has no ONNX form in this opset",
        ) from e


def _drop_state(gm: fx.GraphModule) -> None:
    """An ONNX file keeps nothing from one call to the next.  Raises ExportError where an output depends on that."""
    read = set(ancestors(gm.graph.output_node()))
    for node in list(gm.graph.nodes):
        if not is_state(node):
            continue
        if node in read:
            raise ExportError(
                f"the model writes {node.target} at each call and reads it at the next, which an ONNX file cannot",
                hint=f"let the model take {node.target} as an input and return it",
            )
        for writer in [u for u in node.users if is_call(u, aten.copy_.default)]:
            gm.graph.erase_node(writer)


def _output_names(gm: fx.GraphModule) -> list[str] | None:
    """What the model calls its outputs: the fields of what it returns; None where these have no names."""
    spec = getattr(gm, "_out_spec", None)
    if spec is None:
        return None
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(leaves)[0]]
    names = ["_".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in p) for p in paths]
    taken = {n.name for n in gm.graph.nodes if n.op == "placeholder"}
    is_named = all(re.fullmatch(r"[A-Za-z_]\w*", n) and n not in taken for n in names)
    return names if is_named and len(set(names)) == len(names) else None


def _first_cause(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    text = re.sub("\x1b\\[[0-9;]*m", "", str(e))
    return f"{type(e).__name__}: " + " | ".join(line.strip() for line in text.splitlines() if line.strip())[:300]


def expand(graph: ir.Graph, marked: Sequence[Marked], write: Write, opset: int = OPSETS[0]) -> None:
    """Put each attention's form, as ``write`` makes it, in the place of its placeholder."""
    from attnopt.to_onnx.builder import SWAPPED, Builder, before_swap, is_swap

    for node in [n for n in graph if (n.domain, n.op_type) == (DOMAIN, OP)]:
        number = node.attributes["site"].as_int()
        builder = Builder(graph, f"attention_{number}", opset=opset)
        out = node.outputs[0]
        made = write(builder, marked[number].site, marked[number].form, dict(zip(ROLES, node.inputs, strict=False)))
        made.name, made.shape, made.type = f"attention_{number}", out.shape, out.type
        graph.insert_before(node, builder.nodes)
        if (swapped := before_swap(made)) is not None:
            swapped.name = f"attention_{number}{SWAPPED}"
            for user in [n for n in out.consumers() if is_swap(n)]:
                _replace(graph, user.outputs[0], swapped)
        _replace(graph, out, made)
        graph.remove(node, safe=True)


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Use ``new`` everywhere; an output of the graph keeps its name."""
    import onnx_ir as ir

    maker = old.producer()
    if old.is_graph_output() and maker is not None:
        copy = ir.node("Identity", [new])
        named = copy.outputs[0]
        named.name, named.shape, named.type = old.name, old.shape, old.type
        graph.insert_after(maker, copy)
        new = named
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def finish(model: ir.Model, origin: Origin, flavor: str, marked: Sequence[Marked]) -> None:
    """Drop what nothing uses, and say in the model where it comes from."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    if any(node.domain == "com.microsoft" for node in model.graph.all_nodes()):
        model.opset_imports["com.microsoft"] = 1
    model.producer_name, model.producer_version = "attnopt", __version__
    report = origin.report.to_json()
    texts = {
        "version": __version__,
        "flavor": flavor,
        "policy": json.dumps(report["policy"]),
        "report": json.dumps(report),
        "attention": json.dumps([said(m.site, m.form) for m in marked]),
    }
    model.metadata_props.update({METADATA + key: text for key, text in texts.items()})


def said(site: OnnxSite, form: Form) -> dict[str, object]:
    return {"site": site.name, "form": form.kind, "pattern": repr(site.pattern), "block": form.block or None}


def save(model: ir.Model, file: Path, data: Path | None) -> None:
    import onnx_ir as ir

    if data is None:
        ir.save(model, str(file))
        return
    ir.save(model, str(file), external_data=data.name)
    with data.open("rb") as written:
        os.fsync(written.fileno())


@contextlib.contextmanager
def written_to(path: str | os.PathLike[str], with_data: bool) -> Iterator[tuple[Path, Path | None]]:
    """A file to write the model to and, ``with_data``, one for its weights; both are there when the block ends well.

    The weights' file has a name of its own each time, so that an older model goes on finding its weights until the new
    one takes its place in one step; only then are the older weights removed.
    """
    target = Path(path).resolve()
    older = [file for file in target.parent.glob("*") if _is_data_of(file, target)]
    data = target.with_name(f"{target.name}.{secrets.token_hex(4)}.data") if with_data else None
    try:
        with atomic_write(path) as temporary:
            yield temporary, data
    except BaseException:
        if data is not None:
            data.unlink(missing_ok=True)
        raise
    for file in older:
        file.unlink(missing_ok=True)


def _is_data_of(file: Path, target: Path) -> bool:
    return re.fullmatch(re.escape(target.name) + r"\.[0-9a-f]{8}\.data", file.name) is not None
