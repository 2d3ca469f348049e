"""Verification of an exported file: ONNX Runtime must agree with torch, at the sizes of the example and at others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import ROOM, difference, tensors, tolerance
from attnopt.base.ort_session import cpu_session
from attnopt.capture.flat_call import Form
from attnopt.capture.run_unchanged import outputs_of
from attnopt.compiler.check import coarsest
from attnopt.compiler.origin import Origin
from attnopt.compiler.resized_inputs import inputs_that_run
from attnopt.errors import ExportError
from attnopt.graph.nodes import inputs_of
from attnopt.graph.record import recorded
from attnopt.onnx.export.builder import SWAPPED, Array
from attnopt.onnx.export.deviation import Deviation, deviation
from attnopt.onnx.export.mark import Marked
from attnopt.onnx.export.pieces import Piece, agree
from attnopt.onnx.export.quantizer import Quantization
from attnopt.onnx.export.write_file import Written

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

QUANTIZED_SIZES = 3  # at which a quantized file is compared, if the graph has that many


def verify(gm: fx.GraphModule, origin: Origin, file: Path, marked: Sequence[Marked], named: Mapping[str, str]) -> None:
    """Raises ExportError with the first differing attention if ONNX Runtime does not agree with ``gm``.

    ``named``: the file's names of graph inputs, if they differ."""
    _check_valid(file, "exported model")
    _Comparison(gm, file, named, origin.form, marked=marked).at_sizes(origin)


def _check_valid(file: Path, what: str) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(file))
    except Exception as e:
        raise ExportError(f"the {what} is not valid ONNX: {str(e)[:300]}") from e


def in_bfloat16(gm: fx.GraphModule) -> str:
    """The hint if ONNX Runtime on CPU lacks operators for this type."""
    found = (n.meta.get("val") for n in gm.graph.nodes)
    if not any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in found):
        return ""
    return (
        "ONNX Runtime supports few bfloat16 operators on CPU: optimize and export model.float(), "
        "or use verify=False for a machine that supports them"
    )


def verify_file(
    gm: fx.GraphModule, origin: Origin, file: Path, named: Mapping[str, str], pieces: Sequence[Piece] = ()
) -> None:
    """Like ``verify``, for a file rewritten in place: its inputs and outputs have the names of the file.

    ``pieces``: all that is new, where agreement piece by piece is enough."""
    _check_valid(file, "rewritten file")
    _Comparison(gm, file, named, origin.form, pieces=pieces).at_sizes(origin)


def deviation_of(written: Written, origin: Origin, file: Path, how: Quantization) -> Deviation:
    """Of a quantized file, which runs as its users will run it, at the sizes of the example and at others.

    Raises ExportError if it is too large."""
    _check_valid(file, f"{how} file")
    session = open_session(file, exact=False)
    worst = Deviation(1.0, 0.0, 0)
    for inputs in islice(_inputs(written.gm, origin, written.names), QUANTIZED_SIZES):
        want = outputs_of(written.gm, inputs, form=origin.form)
        feed = feed_of([i.name for i in session.get_inputs()], written.gm, inputs, written.names)
        got = _run(session, feed)
        names, when = [o.name for o in session.get_outputs()], f"for inputs of {_sizes(inputs)}"
        worst = worst.joined(deviation(got, want, names, how, when, "verify=False writes it unchecked"))
    return worst


def open_session(model: Path | bytes, hint: str = "", exact: bool = True, threads: int = 0) -> InferenceSession:
    """ONNX Runtime's session on a CPU; not ``exact``, as users run quantized operators.  ``threads``: 0 lets it choose.

    Raises ExportError."""
    try:
        return cpu_session(model, threads, exact=exact)
    except Exception as e:
        raise ExportError(f"ONNX Runtime cannot load the exported model: {str(e)[:300]}", hint=hint or None) from e


def _inputs(gm: fx.GraphModule, origin: Origin, named: Mapping[str, str]) -> Iterator[CallInputs]:
    """The example inputs, and others in which axes of one name in the user's file have one size.

    ONNX Runtime uses memory again by these names, even where an operator takes other sizes."""
    found = inputs_that_run(gm, origin.inputs, origin.report.fixed_axes)
    yield next(found)
    free = () if origin.file is None else origin.file.model.source.free
    for inputs in found:
        feed = feed_of([name for name, _, _ in free], gm, inputs, named)
        sizes = {(label, feed[name].shape[axis]) for name, axis, label in free if label}
        if len(sizes) == len({label for label, _ in sizes}):
            yield inputs


@dataclass(frozen=True)
class _Comparison:
    """Of a file with what it was made of."""

    gm: fx.GraphModule
    file: Path
    named: Mapping[str, str]
    form: Form | None
    marked: Sequence[Marked] = ()
    pieces: Sequence[Piece] = ()

    def at_sizes(self, origin: Origin) -> None:
        """Those of the example, and others.  Raises ExportError."""
        session = open_session(self.file, in_bfloat16(self.gm))
        for inputs in islice(_inputs(self.gm, origin, self.named), 2):
            self._on(inputs, session)

    def _on(self, inputs: CallInputs, session: InferenceSession) -> None:
        want = outputs_of(self.gm, inputs, form=self.form)
        feed = feed_of([i.name for i in session.get_inputs()], self.gm, inputs, self.named)
        got = _run(session, feed)
        error = difference([g.to(w.dtype) for g, w in zip(got, want, strict=False)], want)
        if len(got) == len(want) and error <= ROOM * max(tolerance(want), coarsest(self.gm)):
            return
        if self.pieces and agree(self.pieces, self.file, feed):
            return
        raise ExportError(
            f"ONNX Runtime and torch disagree (relative difference {error:.2g}, inputs of {_sizes(inputs)}), so nothing was "
            "written",
            hint="please report the model; another opset may work",
            site=_first_that_differs(self.gm, inputs, self.file, self.marked, feed),
        )


def _run(session: InferenceSession, feed: Mapping[str, Array]) -> list[Tensor]:
    try:
        return [torch.from_numpy(o) for o in session.run(None, dict(feed))]
    except Exception as e:
        raise ExportError(f"ONNX Runtime cannot run the exported model: {str(e)[:300]}") from e


def _sizes(inputs: CallInputs) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors(inputs))


def feed_of(names: list[str], gm: fx.GraphModule, inputs: CallInputs, named: Mapping[str, str]) -> dict[str, Array]:
    """The session's inputs; an input that the graph does not use may be missing from it."""
    placeholders = inputs_of(gm.graph)
    values = [
        (n, x if isinstance(x, Tensor) else torch.tensor(x))
        for n, x in zip(placeholders, pytree.tree_leaves(inputs), strict=True)
        if isinstance(x, Tensor) or isinstance(n.meta.get("val"), torch.SymInt)
    ]
    if len(names) == len(values) and not named:
        return {name: _array(v) for name, (_, v) in zip(names, values, strict=True)}
    by_name = {named.get(n.name, n.name): v for n, v in values}
    if not set(names) <= set(by_name):
        raise ExportError(f"the exported model has inputs {names}, but the model has {sorted(by_name)}")
    return {n: _array(by_name[n]) for n in names}


def _array(value: Tensor) -> Array:
    try:
        made: Array = value.detach().cpu().numpy()
        return made
    except TypeError as e:
        raise ExportError(
            f"the exported model cannot be checked: numpy has no {value.dtype}",
            hint="convert the model to float32 before optimizing it",
        ) from e


def _first_that_differs(
    gm: fx.GraphModule, inputs: CallInputs, file: Path, marked: Sequence[Marked], feed: Mapping[str, Array]
) -> str | None:
    """The name of the first attention whose output differs from torch; None if all agree."""
    import onnx_ir as ir

    model = ir.load(str(file))
    values = {v.name: v for node in model.graph for v in node.outputs}
    there = {name: m for i, m in enumerate(marked) for name in _names(i) if name in values}
    if not there:
        return None  # asked for no output, ONNX Runtime gives all
    model.graph.outputs.extend(values[name] for name in there if not values[name].is_graph_output())
    probe = file.with_name(file.name + ".probe")
    try:
        ir.save(model, str(probe))
        got = open_session(probe).run(list(there), dict(feed))
    finally:
        probe.unlink(missing_ok=True)
    want = recorded(gm, {m.node for m in marked}, inputs)
    for (name, m), o in zip(there.items(), got, strict=True):
        w = want[m.node]
        g = torch.from_numpy(o).transpose(1, 2) if name.endswith(SWAPPED) else torch.from_numpy(o)
        if not difference([g.reshape(w.shape).to(w.dtype)], [w]) <= ROOM * tolerance([w]):
            return m.site.name
    return None


def _names(number: int) -> tuple[str, str]:
    return f"attention_{number}", f"attention_{number}{SWAPPED}"
