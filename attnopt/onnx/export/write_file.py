"""Atomic writing of a model file with its metadata."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import fx

from attnopt.base.atomic_files import atomic_write
from attnopt.compiler.origin import Origin
from attnopt.errors import ExportError
from attnopt.onnx.export.choose_form import Form, OnnxSite
from attnopt.onnx.export.mark import Marked
from attnopt.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir


METADATA = "attnopt."  # how the names of the model's properties begin


ROOM_IN_FILE = 2**31 - 2**26  # the protobuf limit is 2 GiB, including the graph


@dataclass(frozen=True)
class Written:
    """What a file computes.  ``names``: the file's names of graph inputs, if they differ."""

    gm: fx.GraphModule
    names: Mapping[str, str]


def is_external(model: ir.Model, asked: bool | Literal["auto"] = "auto", whose: str = "the model's") -> bool:
    """Whether its weights are stored beside the file.  Raises ExportError where they do not fit in it and were to."""
    held = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    size = sum(
        tensor.nbytes for tensor in held if tensor is not None
    )  # more than the graph's, where constants were folded
    if asked is False and size > ROOM_IN_FILE:
        raise ExportError(
            f"{whose} {size / 2**30:.1f} GiB of weights exceed the 2 GiB limit of one ONNX file",
            hint='use external_data="auto"',
        )
    return size > ROOM_IN_FILE if asked == "auto" else asked


def finish(model: ir.Model, origin: Origin, flavor: str, marked: Sequence[Marked]) -> None:
    """Drop unused parts, and record the origin in the model."""
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


def note(file: Path, key: str, text: str) -> None:
    """Record what is known only of the written file in its metadata."""
    import onnx

    more = onnx.ModelProto()
    more.metadata_props.add(key=key, value=text)
    with file.open("ab") as end:  # messages of protocol buffers merge where they follow each other
        end.write(more.SerializeToString())


def said(site: OnnxSite, form: Form) -> dict[str, object]:
    return {"site": site.name, "form": form.kind, "pattern": repr(site.spec.pattern), "block": form.block or None}


def save(model: ir.Model, file: Path, data: Path | None) -> None:
    import onnx_ir as ir

    if data is None:
        ir.save(ir.external_data.load_to_model(model), str(file))
        return
    ir.save(model, str(file), external_data=data.name)
    with data.open("rb") as written:
        os.fsync(written.fileno())


@contextlib.contextmanager
def written_to(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """A file to write the model to and one that may be written for its weights; both are in place when the block ends well.

    The weight file gets a unique name each time, so an older model keeps its weights until the new
    one replaces it atomically; only then are the older weights removed.
    """
    target = Path(path).resolve()
    older = [file for file in target.parent.glob("*") if _is_data_of(file, target)]
    data = target.with_name(f"{target.name}.{secrets.token_hex(4)}.data")
    try:
        with atomic_write(path) as temporary:
            yield temporary, data
    except BaseException:
        data.unlink(missing_ok=True)
        raise
    for file in older:
        file.unlink(missing_ok=True)


def _is_data_of(file: Path, target: Path) -> bool:
    return re.fullmatch(re.escape(target.name) + r"\.[0-9a-f]{8}\.data", file.name) is not None
