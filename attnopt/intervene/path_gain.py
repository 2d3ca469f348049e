"""The direct shares of paths in the readout of a model, re-weighted while later layers still see them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.options import number, numbers
from attnopt.base.user_warning import warn
from attnopt.capture.program import Program
from attnopt.compiler.analyze import analyze
from attnopt.compiler.check import Checker
from attnopt.compiler.chosen_sites import LISTED, matches
from attnopt.compiler.edited_graph import cleaned, origin_of, report_of
from attnopt.errors import CaptureError, PolicyError, RewriteError, VerificationError
from attnopt.intervene.path_sum import add_path_sum, drop_zeros
from attnopt.intervene.readout import Readout
from attnopt.model import OptimizedModel
from attnopt.onnx.load.model_or_file import opened

Gain = float | Sequence[float]


@compiling()
def path_gain(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    gains: Mapping[str, Gain],
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    dynamic_shapes: object = None,
) -> OptimizedModel:
    """The model with another readout: of ``sum_p gain_p * c_p`` in place of the stream ``sum_p c_p``.

    A path is what one attention, one MLP or the embedding adds to the residual stream; later layers still read the stream as it
    is.  What reads its end, the final norm first, reads the new sum (a transformer as an ensemble of paths, EnsembleScale).
    ``gains``: from names or globs of paths, those of ``attnopt.collect(model, ..., "contribution")``, to a number, or for an
    attention to one number for each head; the last that matches counts, 1 for all others.  A bias of an output
    projection belongs to its attention, and to no head.  0 cuts the direct share.

    Norms between layers, as in BERT, keep the scale that they have for the stream; those after its last addition are computed
    anew.  With gains of 1 the graph is the model's own.  ``args``, ``kwargs``, ``dynamic_shapes`` and the result are as of
    ``optimize``; nothing is fused, which ``optimize`` of the result does.

    Raises PolicyError for paths that there are not and invalid gains, RewriteError for a model without a residual stream and a
    path that does not reach the readout directly, CaptureError.
    """
    inputs = CallInputs.of(args, kwargs)
    if not any(inputs):
        raise PolicyError("path_gain needs example inputs", hint="pass args or kwargs")
    given = model.module() if isinstance(model, ExportedProgram) else opened(model, inputs)
    analyzed = analyze(given, inputs, dynamic_shapes)
    program, findings = analyzed.program, analyzed.findings
    if program.form is not None and program.form.results.has_state:
        raise CaptureError(
            "path_gain needs a model that changes none of its inputs, such as a cache",
            hint="call it without a cache, as with use_cache=False",
        )
    module, report = program.module, report_of(program, findings)
    readout = Readout(module.graph, findings.found)
    chosen = {name: gain for name, gain in chosen_gains(readout, gains).items() if not bool((gain == 1).all())}
    held = add_path_sum(module, readout, {name: torch.ones_like(gain) for name, gain in chosen.items()})
    cleaned(module)
    if held:
        warnings = _check(given, program, module)
        _set(module, held, chosen)
        drop_zeros(held, chosen)
        cleaned(module)
        report = replace(report, notes=(_told(chosen),), warnings=warnings)
    return OptimizedModel(module, origin_of(given, program, findings, module, report))


def chosen_gains(readout: Readout, gains: object) -> dict[str, Tensor]:
    """By path its gain, a number or one for each head, in double precision.  Raises PolicyError, RewriteError."""
    if not isinstance(gains, Mapping):
        raise PolicyError(
            f"path_gain: invalid value gains={gains!r}: expected a mapping from paths to numbers",
            hint='write it as {"layers.0.mlp": 0.5}',
        )
    found: dict[str, Tensor] = {}
    for glob, gain in gains.items():
        for name in paths_of("path_gain", readout, str(glob)):
            found[name] = _gain(readout, name, gain)
    for name in found:
        readout.require_alone(readout.shares[name])
    return found


def paths_of(owner: str, readout: Readout, glob: str) -> list[str]:
    """The paths of this name, or that match it and reach the readout directly.  Raises PolicyError, RewriteError."""
    names = [name for name in readout.shares if matches(glob, name)]
    if names:
        return names
    lost = next((name for name in readout.others if matches(glob, name)), None)
    if lost is not None:
        raise RewriteError(
            f"{owner}: {lost!r} does not reach the readout directly, through additions, layouts and norms alone",
            hint=f"the paths that do are {_listed(list(readout.shares))}",
        )
    near = difflib.get_close_matches(glob, [*readout.shares, *readout.others], n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"the paths are {_listed(list(readout.shares))}"
    raise PolicyError(f"{owner}: no path is named {glob!r}", hint=hint)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:LISTED])) + (", ..." if len(names) > LISTED else "")


def _gain(readout: Readout, name: str, gain: object) -> Tensor:
    option = f"gains[{name!r}]"
    given = gain.tolist() if isinstance(gain, Tensor) else gain
    if not isinstance(given, (list, tuple)):
        return torch.tensor(number("path_gain", option, given), dtype=torch.float64)
    share = readout.shares[name]
    if share.heads is None:
        raise PolicyError(
            f"path_gain: {option} has {len(given)} numbers, but no heads of {name!r} can be told apart",
            hint="give it one number",
        )
    heads = share.heads.site.num_heads
    if len(given) != heads:
        raise PolicyError(
            f"path_gain: {option} has {len(given)} numbers for {heads} heads", hint="give one for each head"
        )
    return torch.tensor(numbers("path_gain", option, given), dtype=torch.float64)


def _check(model: nn.Module, program: Program, module: fx.GraphModule) -> tuple[str, ...]:
    """With gains of 1 the sum is the stream, at the example's and at other sizes.  Returns warnings; raises VerificationError."""
    try:
        _, warnings = Checker(model, program, (), 0).check(module)
    except VerificationError as e:
        raise VerificationError(
            f"path_gain: the paths do not add up to the residual stream ({e.message})", hint="report the model"
        ) from e
    for text in warnings:
        warn(text)
    return warnings


def _set(module: fx.GraphModule, held: Mapping[str, fx.Node], gains: Mapping[str, Tensor]) -> None:
    for name, node in held.items():
        module.get_buffer(str(node.target)).copy_(gains[name])


def _told(gains: Mapping[str, Tensor]) -> str:
    each = (
        f"{name or '(root)'} x {float(gain):.4g}"
        if gain.dim() == 0
        else f"heads of {name or '(root)'} x {', '.join(f'{g:.4g}' for g in gain.tolist())}"
        for name, gain in gains.items()
    )
    return f"path-gain: direct shares in the readout: {'; '.join(each)}"
