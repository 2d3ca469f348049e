"""Two runs of one model, and which of its heads are meant."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.calibration import Batch, Calibration, as_inputs
from attnopt.compiler.analyze import Analyzed
from attnopt.compiler.analyze_batches import analyze_batches
from attnopt.compiler.chosen_sites import chosen_places, site_globs, site_names
from attnopt.errors import CalibrationError, PolicyError, RewriteError
from attnopt.graph.cleanup import draws
from attnopt.match.find import Found

DIRECTIONS = ("denoising", "noising")


def two_runs(model: nn.Module, clean: Batch, corrupted: Batch) -> tuple[Analyzed, CallInputs, CallInputs]:
    """The captured model, and both inputs in the form of its graph.  Raises AttnoptError."""
    both = as_inputs(clean, "clean"), as_inputs(corrupted, "corrupted")
    _refuse_other_shapes(*both)
    analyzed, batches = analyze_batches(model, Calibration(both))
    called = (n for n in analyzed.program.module.graph.nodes if n.op == "call_function")
    if (drawing := next((n for n in called if draws(n)), None)) is not None:
        raise RewriteError(
            f"the model draws random numbers ({drawing.name}), and every run would draw different ones",
            hint="put it in evaluation mode, or give it its noise as an input",
        )
    if not analyzed.findings.found:
        raise CalibrationError("no attention was found", hint="attnopt.inspect says what came near")
    return analyzed, batches[0], batches[1]


def _refuse_other_shapes(clean: CallInputs, corrupted: CallInputs) -> None:
    (ours, form), (theirs, other) = map(pytree.tree_flatten_with_path, (_named(clean), _named(corrupted)))
    if form != other:
        raise CalibrationError(
            "clean and corrupted have different arguments", hint="pass both the same way, with the same names"
        )
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or (x.shape == y.shape and x.dtype == y.dtype):
            continue
        what = f"{list(x.shape)} {x.dtype}", f"{list(y.shape)} {y.dtype}"
        raise CalibrationError(
            f"input {pytree.keystr(path)} is {what[0]} in the clean run and {what[1]} in the corrupted run",
            hint="choose inputs of the same number of sequences and tokens: each position is patched with its counterpart",
        )


def _named(inputs: CallInputs) -> dict[str, object]:
    return {**{str(i): x for i, x in enumerate(inputs.args)}, **inputs.kwargs}


def chosen_heads(owner: str, found: Sequence[Found], sites: object, heads: object) -> dict[str, tuple[int, ...]]:
    """The chosen heads by site, in the order of ``found``.  Raises PolicyError for what is not there."""
    globs = site_globs(owner, sites)
    if not found:
        raise PolicyError(f"{owner}: no attention was found", hint="attnopt.inspect says what came near")
    names = site_names(owner, globs, [f.site.name for f in found])
    there = {f.site.name: f.site.spec.heads for f in found if f.site.name in names}
    return {name: tuple(own[i] for i in chosen_places(owner, heads, name, own)) for name, own in there.items()}
