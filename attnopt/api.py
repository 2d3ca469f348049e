"""The two doors: find the attentions of a model, and rewrite them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

from attnopt.base.compile_lock import compiling
from attnopt.capture.calibration import Batch, Calibration
from attnopt.capture.capture import check_call, without_values
from attnopt.compiler.analyze import analyze
from attnopt.compiler.compile import carried_out
from attnopt.compiler.decide import standing_refusals
from attnopt.compiler.job import Job, Options, backends_of
from attnopt.compiler.origin import Origin, is_file
from attnopt.compiler.policy import Policy
from attnopt.ir.interfaces import Backend
from attnopt.model import OptimizedModel
from attnopt.report.inspection import Inspection

if TYPE_CHECKING:
    from attnopt.onnx.load.module import OnnxModule


@compiling()
def inspect(
    model: nn.Module | str | os.PathLike[str],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Inspection:
    """Find every attention that ``model(*args, **kwargs)`` runs, without changing anything.  An ONNX file is a model too.

    Returns an ``Inspection``: ``.sites`` in the order in which they run, each with the passes that cannot rewrite it in
    ``.refusals``; ``.near_misses``; it prints as a table.  A model on the meta device needs no memory for its weights: each
    site is proved with random values in place of them, and what only they could tell (a mask in a buffer) stays unknown.
    ``dynamic_shapes``: as of ``optimize``.  Raises CaptureError if the model cannot be captured.
    """
    inputs = _inputs(args, kwargs)
    model = _opened(model, *inputs)
    findings = analyze(model, *inputs, dynamic_shapes).findings
    if isinstance(model, nn.Module) and without_values(model) is None:
        check_call(model, *inputs)
    sites = tuple(replace(f.site, refusals=standing_refusals(f)) for f in findings.found)
    return Inspection(sites, findings.near_misses, findings.candidates)


def optimize(
    model: nn.Module | torch.export.ExportedProgram | str | os.PathLike[str],
    policy: Any = "fuse",
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    calibration: Iterable[Batch] | Calibration | None = None,
    backend: str | Backend = "auto",
    tolerance: float | None = None,
    strict: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> OptimizedModel:
    """Rewrite the attentions of ``model`` as ``policy`` says and lower them to fused operators.

    The model itself is never changed; weights that stay the same are shared with it.  An ONNX file and an
    ExportedProgram are models too.

    ``policy``: a pass, a list of passes, a mapping from site-name globs to those, a ``Policy``, a YAML or JSON file, or text
    such as ``"local-window(left=128)"``.  ``"fuse"`` only fuses, which is exact.
    ``args``, ``kwargs``: example inputs.  Without any, the model is captured at its first call.
    ``dynamic_shapes``: torch.export's notation, or ``"auto"``: every axis of every input that the model lets vary.  The
    report tells which do not, and what has to hold between sizes.  The axes that an ONNX file leaves open stay open; ``{}``
    fixes them as the example inputs have them.
    ``calibration``: batches (a tensor, a tuple of args or a dict of kwargs each), or a ``Calibration``.  Passes that can
    learn from them do; the change is measured on them as well.
    ``backend``: a name, a ``Backend``, or ``"auto"``: for each site the cheapest one that can compute it.
    ``tolerance``: largest relative difference from the model that is accepted, else VerificationError.
    ``strict``: a refusal is a RewriteError.  ``limit``: carry out only the first so many rewrites.  ``seed``: of every
    random choice.

    Raises AttnoptError (CaptureError, PolicyError, RewriteError, VerificationError) and then has changed nothing.
    """
    chosen = Policy.of(policy)
    options, backends = Options(tolerance, strict, limit, seed), backends_of(backend)
    batches = None if calibration is None else Calibration.of(calibration).batches
    args, given = _inputs(args, kwargs)
    if not args and not given and batches:
        args, given = batches[0]
    model = model.module() if isinstance(model, torch.export.ExportedProgram) else _opened(model, args, given)
    if is_file(model):
        from attnopt.onnx.load.free_axes import as_declared

        args, given, dynamic_shapes = as_declared(cast("OnnxModule", model), args, given, dynamic_shapes)

    @compiling()
    def build(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.GraphModule, Origin]:
        made = carried_out(Job(model, chosen, args, kwargs, dynamic_shapes, batches or [], backends, options))
        return made.module, made.origin

    if not args and not given:
        return OptimizedModel.deferred(model, build)
    module, origin = build(args, given)
    return OptimizedModel(module, origin)


def _opened(model: nn.Module | str | os.PathLike[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    if not isinstance(model, (str, os.PathLike)):
        return model
    from attnopt.onnx.load.load import opened

    return opened(model, args, kwargs)


def _inputs(args: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (args if isinstance(args, tuple) else (args,)), dict(kwargs or {})
