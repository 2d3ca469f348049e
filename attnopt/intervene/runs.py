"""Two runs of one model, and which of its heads are meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.options import wholes
from attnopt.capture.calibration import Batch, Calibration, as_inputs
from attnopt.compiler.analyze import Analyzed
from attnopt.compiler.analyze_batches import analyze_batches
from attnopt.errors import CalibrationError, PolicyError, RewriteError
from attnopt.graph.cleanup import draws
from attnopt.ir.site import Site
from attnopt.match.find import Found

DIRECTIONS = ("denoising", "noising")
Sites = str | Site | Sequence[str | Site]


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


def chosen_heads(
    owner: str, found: Sequence[Found], sites: Sites, heads: Iterable[int] | None
) -> dict[str, tuple[int, ...]]:
    """The chosen heads by site, in the order of ``found``.  Raises PolicyError for what is not there."""
    listed = [sites] if isinstance(sites, (str, Site)) else list(sites)
    globs = [s.name if isinstance(s, Site) else s for s in listed]
    names = [f.site.name for f in found]
    if not names:
        raise PolicyError(f"{owner}: no attention was found", hint="attnopt.inspect says what came near")
    for glob in globs:
        if not isinstance(glob, str) or not any(_fits(n, glob) for n in names):
            raise no_such_site(owner, glob, names)
    wanted = None if heads is None else wholes(owner, "heads", heads)
    chosen: dict[str, tuple[int, ...]] = {}
    for f in found:
        if any(_fits(f.site.name, glob) for glob in globs):
            chosen[f.site.name] = f.site.spec.heads if wanted is None else wanted
            require_heads(owner, f, chosen[f.site.name])
    if not any(chosen.values()):
        raise PolicyError(f"{owner}: no head is chosen", hint="name sites and heads, or omit them for all")
    return chosen


def no_such_site(owner: str, name: object, names: Collection[str]) -> PolicyError:
    near = difflib.get_close_matches(name, names, n=2) if isinstance(name, str) else []
    listed = ", ".join(map(repr, list(names)[:6])) + (", ..." if len(names) > 6 else "")
    told = f"did you mean {' or '.join(map(repr, near))}?" if near else f"the sites are {listed}"
    return PolicyError(f"{owner}: no attention is named {name!r}", hint=told)


def require_heads(owner: str, found: Found, heads: Iterable[int]) -> None:
    """Raises PolicyError for heads that the site lacks."""
    there = found.site.spec.heads
    unknown = [h for h in heads if h not in there]
    if unknown:
        told = ", ".join(map(str, unknown))
        raise PolicyError(
            f"{owner}: {found.site.name} has no head {told}", hint=f"its heads are {there[0]} to {there[-1]}"
        )


def _fits(name: str, glob: str) -> bool:
    return glob == name or fnmatchcase(name, glob)
