"""The entry points: find the attentions of a model, and rewrite them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import fx, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import tensors
from attnopt.base.compile_lock import compiling
from attnopt.base.options import number
from attnopt.capture.added_inputs import taking
from attnopt.capture.calibration import Batch, Calibration
from attnopt.capture.capture import check_call, without_values
from attnopt.compiler.analyze import analyze
from attnopt.compiler.compile import carried_out
from attnopt.compiler.decide import standing_refusals
from attnopt.compiler.guidance import guided
from attnopt.compiler.job import Job, Options, backends_of
from attnopt.compiler.origin import Origin, is_file
from attnopt.compiler.policy import Policy
from attnopt.errors import CalibrationError, PolicyError, RewriteError
from attnopt.ir.interfaces import Backend
from attnopt.model import OptimizedModel
from attnopt.onnx.load.model_or_file import opened
from attnopt.report.inspection import Inspection
from attnopt.report.report import Report

if TYPE_CHECKING:
    from attnopt.onnx.load.module import OnnxModule


@compiling()
def inspect(
    model: nn.Module | str | os.PathLike[str],
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    dynamic_shapes: object = None,
) -> Inspection:
    """Find every attention that ``model(*args, **kwargs)`` runs, without changing anything.

    ``model`` may also be the path of an ONNX file.  Returns an ``Inspection``: ``.sites`` in execution order, each with
    the passes that cannot rewrite it in ``.refusals``, and ``.near_misses``, the rejected candidates.  It prints as a
    table.
    A model on the meta device needs no memory for weights: each site is verified with random values, and whatever
    depends on real ones (a mask in a buffer) stays unknown.  ``dynamic_shapes``: see ``optimize``.

    Raises CaptureError if the model cannot be captured.
    """
    inputs = CallInputs.of(args, kwargs)
    model = opened(model, inputs)
    findings = analyze(model, inputs, dynamic_shapes).findings
    if isinstance(model, nn.Module) and without_values(model) is None:
        check_call(model, inputs)
    sites = tuple(replace(f.site, refusals=standing_refusals(f)) for f in findings.found)
    return Inspection(sites, findings.near_misses, findings.candidates)


def optimize(
    model: nn.Module | torch.export.ExportedProgram | str | os.PathLike[str],
    policy: object = "fuse",
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    dynamic_shapes: object = None,
    calibration: Iterable[Batch] | Calibration | None = None,
    backend: str | Backend = "auto",
    tolerance: float | None = None,
    strict: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> OptimizedModel:
    """Rewrite the attentions of ``model`` according to ``policy`` and lower them to fused operators.

    The model itself is never changed; unchanged weights are shared with it.  ``model`` may also be an ONNX file or an
    ExportedProgram.

    ``policy``: a pass, a list of passes, a mapping from site-name globs or ``attnopt.where(...)`` to passes, a ``Policy``, a YAML
    or JSON file, or text such as ``"local-window(left=128)"``.  ``"fuse"`` only fuses, which is exact.
    ``args``, ``kwargs``: example inputs.  Without them, the model is captured at its first call.
    ``dynamic_shapes``: torch.export's notation, or ``"auto"``: every axis of every input that the model allows to vary.
    The report lists static axes and size constraints.  Free axes of an ONNX file stay dynamic; ``{}`` fixes them at the
    sizes of the example inputs.
    ``calibration``: batches (each a tensor, a tuple of args or a dict of kwargs), or a ``Calibration``.  Passes use
    them if they can; the error is measured on them as well.
    ``backend``: a name, a ``Backend``, or ``"auto"``: for each site the cheapest backend that supports it.
    ``tolerance``: largest accepted relative difference from the model; beyond it, VerificationError.
    ``strict``: turn a refusal into a RewriteError.  ``limit``: apply only the first ``limit`` rewrites.  ``seed``:
    random seed.

    Raises AttnoptError (CaptureError, PolicyError, RewriteError, VerificationError), in which case nothing was changed.
    """
    data = None if calibration is None else Calibration.of(calibration, shared=True)
    batches, peers = (None, None) if data is None else (data.batches, data.peers)
    with nullcontext() if peers is None else peers.working({}):  # then a mistake on one rank ends all
        chosen = Policy.of(policy).without_choices()
        options, backends = Options(tolerance, strict, limit, seed), backends_of(backend)
        inputs = CallInputs.of(args, kwargs)
        if peers is not None and not any(inputs):
            raise CalibrationError(
                "shared calibration data need example inputs", hint="pass the same args or kwargs on every rank"
            )
    if not any(inputs) and batches:
        inputs = batches[0]
    model = model.module() if isinstance(model, torch.export.ExportedProgram) else opened(model, inputs, chosen.inputs)
    own: CallInputs | None = None
    if is_file(model):
        from attnopt.onnx.load.free_axes import as_declared

        own = inputs
        inputs, dynamic_shapes = as_declared(cast("OnnxModule", model), inputs, dynamic_shapes)

    @compiling()
    def build(inputs: CallInputs) -> tuple[fx.GraphModule, Origin]:
        asked, shapes = taking(model, chosen.inputs, inputs.kwargs, dynamic_shapes)
        with nullcontext() if peers is None else peers.working(_given(model, chosen, inputs)):
            made = carried_out(Job(asked, chosen, inputs, shapes, batches or [], backends, options, own, peers))
        return made.module, replace(made.origin, report=_with_numbers(model, made.origin.report))

    if not any(inputs):
        return OptimizedModel.deferred(model, build)
    module, origin = build(inputs)
    return OptimizedModel(module, origin)


def _given(model: nn.Module, policy: Policy, inputs: CallInputs) -> dict[str, object]:
    """What processes that share calibration data have to agree on."""
    return {
        "the policy": policy.to_json(),
        "the weights": dict(model.named_parameters()),
        "the example inputs": dict(enumerate(tensors(inputs))),
    }


def _with_numbers(model: object, report: Report) -> Report:
    """``report`` with a note at each site whose heads have other numbers than in ``model``, an optimized one without some of
    them: a head that is named then is another one than it seems."""
    if not isinstance(model, OptimizedModel):
        return report
    known = {site.name: site.spec.heads for site in model.sites}
    sites = []
    for site in report.sites:
        before = known.get(site.name, ())
        if before and before != tuple(range(len(before))):
            listed = ", ".join(map(str, before))
            note = (
                f"heads {listed} of the optimized model have the numbers 0 to {len(before) - 1} here, also in policies"
            )
            site = replace(site, notes=(*site.notes, note))
        sites.append(site)
    return replace(report, sites=tuple(sites))


@compiling()
def guidance(
    model: nn.Module | torch.export.ExportedProgram,
    weak: object,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    scale: float,
    dynamic_shapes: object = None,
    calibration: Iterable[Batch] | Calibration | None = None,
    backend: str | Backend = "auto",
    strict: bool = False,
    seed: int = 0,
) -> OptimizedModel:
    """The model pushed away from a weaker form of itself: ``strong + scale * (strong - weak)``.

    This is perturbed-attention guidance (PAG, arXiv:2403.17377; by head in HeadHunter, arXiv:2506.10978) as one module, in which
    both branches share every layer before the first one that differs.
    ``weak``: a policy, as of ``optimize``, such as ``SoftPAG(heads=[0, 3], u=0.5)``; sites that it leaves alone are fused in
    both.  ``scale``: a finite number; 0 gives the model itself.  Outputs that are no tensors of real or complex numbers are the
    model's.  A model that draws random numbers or writes to its state is refused: two branches would do so twice.
    The other arguments are those of ``optimize``.

    The report is that of the weak branch; ``report.cpu_seconds`` has the measured time of the model alone ("before") and of
    both ("after").  Raises AttnoptError; RewriteError if the model takes or returns objects such as caches.
    """
    pushed = number("guidance", "scale", scale)
    if isinstance(model, (str, os.PathLike)):
        raise RewriteError(
            "guidance cannot be given an ONNX file", hint="pass the PyTorch model that it was exported from"
        )
    model = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    inputs = CallInputs.of(args, kwargs)
    batches = [] if calibration is None else Calibration.of(calibration).batches
    if not any(inputs):
        raise PolicyError("guidance needs example inputs", hint="pass args or kwargs")
    options = Options(strict=strict, seed=seed)
    chosen = Policy.of(weak).without_choices()
    asked, shapes = taking(model, chosen.inputs, inputs.kwargs, dynamic_shapes)
    made = guided(Job(asked, chosen, inputs, shapes, batches, backends_of(backend), options), pushed)
    return OptimizedModel(made.module, made.origin)
