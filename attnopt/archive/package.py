"""A graph compiled ahead of time by torch's AOTInductor: one file, for Python and C++ without attnopt."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import torch
from torch import fx

from attnopt.base.atomic_files import atomic_write
from attnopt.base.closeness import ROOM, difference, tensors, tolerance
from attnopt.base.compile_lock import compiling
from attnopt.base.quiet import quiet
from attnopt.base.user_warning import warn
from attnopt.capture.exported_program import exported
from attnopt.capture.run_unchanged import outputs_of
from attnopt.compiler.origin import Origin
from attnopt.compiler.resized_inputs import inputs_that_run
from attnopt.errors import ExportError
from attnopt.graph.cleanup import remove_unused_nodes
from attnopt.graph.copies import copy_program
from attnopt.lower.operator_calls import write_out
from attnopt.lower.received_calls import write_out_received

SIZES = 2  # at which the package is compared, if the graph has that many


@compiling()
def export_package(gm: fx.GraphModule, origin: Origin, path: str | os.PathLike[str]) -> None:
    """Write the package ``path``, whole or not at all.  Raises ExportError."""
    if Path(path).suffix != ".pt2":
        raise ExportError(f"torch loads packages whose name ends in .pt2, not {Path(path).name!r}")
    plain = in_torch(gm)
    with atomic_write(path) as made:
        file = made.with_name(f"{made.name}.pt2")  # the only ending that torch writes
        try:
            _compile(plain, origin, file)
            _verify(gm, origin, file)
            os.replace(file, made)
        finally:
            file.unlink(missing_ok=True)


def in_torch(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph without attnopt's own operators: a program that loads the package does not know them."""
    plain, _ = copy_program(gm)
    dense = write_out(plain.graph)
    write_out_received(plain.graph)
    remove_unused_nodes(plain)
    if dense:
        warn(
            f"all pairs are computed under a mask in {dense} {'attention' if dense == 1 else 'attentions'} of the package: the "
            "lengths vary, and attnopt's kernel is no part of it"
        )
    return plain


def _compile(gm: fx.GraphModule, origin: Origin, file: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    program = exported(gm, origin.inputs)
    try:
        with quiet(), torch.no_grad():
            aoti_compile_and_package(program, package_path=str(file))
    except Exception as e:
        raise ExportError(
            f"AOTInductor cannot compile the model: {type(e).__name__}: {str(e)[:300]}",
            hint="AOTInductor needs a C++ compiler; fast.save and fast.export_onnx need none",
        ) from e


def _verify(gm: fx.GraphModule, origin: Origin, file: Path) -> None:
    from torch._inductor import aoti_load_package

    with quiet():
        loaded = aoti_load_package(str(file))
    for inputs in islice(inputs_that_run(gm, origin.inputs, origin.report.fixed_axes), SIZES):
        want = outputs_of(gm, inputs)
        with torch.no_grad():
            got = tensors(loaded(*inputs.args, **inputs.kwargs))
        error = difference(got, want)
        if not error <= ROOM * tolerance(want):
            raise ExportError(
                f"the package and the model differ (relative difference {error:.2g}), so nothing was written"
            )
