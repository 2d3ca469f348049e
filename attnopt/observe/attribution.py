"""Direct logit attribution: how much each head and each MLP adds to an output through the residual stream."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.progress import working
from attnopt.capture.calibration import Batch, Calibration, shapes_of
from attnopt.capture.program import Program
from attnopt.capture.signature import Signature
from attnopt.compiler.analyze import analyze_in_eval
from attnopt.compiler.check import fitting
from attnopt.errors import CalibrationError
from attnopt.graph.interpreter import Interpreter, Schedule
from attnopt.graph.nodes import source_line
from attnopt.match.find import Found
from attnopt.match.prove import example_values
from attnopt.observe.collect import original_numbers
from attnopt.observe.linear_path import BIAS, LinearPath, LinearRun
from attnopt.observe.residual import Residual
from attnopt.observe.taps import outputs_node
from attnopt.onnx.load.model_or_file import opened
from attnopt.report.attribution import Attribution

Target = Callable[[Any], Tensor]
NOT_LINEAR = 1e-3  # difference, relative to the sizes of the parts, between their sum and the target

Parts = dict[fx.Node, Tensor]


@compiling()
def logit_attribution(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    batches: Iterable[Batch] | Calibration,
    target: Target,
) -> Attribution:
    """How much each head and each MLP adds to ``target``, directly, not through later layers.

    ``target``: from the model's output to one number for each sequence, [B], or one for the batch, linear in the output: a
    logit or a difference of logits, such as ``lambda out: out.logits[:, -1, 7] - out.logits[:, -1, 9]``.
    Norms are taken at their actual scales, as is usual (arXiv:2211.00593), also those between layers (post-norm).  Parts of
    heads, MLPs, embedding and biases add up to the target.

    Raises CalibrationError if there is no batch, the target is not linear, or the output does not depend linearly on any
    attention, CaptureError.
    """
    listed = Calibration.of(batches).batches
    first = listed[0]
    model = model.module() if isinstance(model, ExportedProgram) else opened(model, first)
    analyzed = analyze_in_eval(model, first, "auto" if len({*map(shapes_of, listed)}) > 1 else None)
    program, found = analyzed.program, analyzed.findings.found
    gm = program.module
    taps = {f.site.name: outputs_node(f) for f in found}
    path = LinearPath(gm.graph, found, Residual(gm.graph, found))
    reached = [f for f in found if f.raised.region.out.node in path.ends]
    if not reached:
        raise _unreachable(path)
    output = gm.graph.output_node()
    schedule = Schedule(gm.graph, {output: output.all_input_nodes})
    signature = Signature.of(model.forward, *first)
    heads: dict[str, list[Tensor]] = defaultdict(list)
    others: dict[str, list[Tensor]] = defaultdict(list)
    targets: list[Tensor] = []
    rest: dict[str, list[fx.Node]] = defaultdict(list)
    for node, name in path.ends.items():
        if node not in path.sites:
            rest[name].append(node)
    with working("attributing the output to heads", len(listed)) as step:
        for number, batch in enumerate(listed):
            given = fitting(gm, signature, batch, number, program.form, program.fixed_axes)
            run = LinearRun(gm, example_values(gm, *given), schedule, path)
            run.up_to(output)
            with torch.enable_grad():
                wanted = _target(program, run, target, signature, batch)
            parts = _parts(run, wanted)
            for f in reached:
                heads[f.site.name].append(
                    _of_heads(gm, f, taps[f.site.name], [p[f.raised.region.out.node] for p in parts])
                )
            for name, nodes in rest.items():
                others[name].append(torch.stack([_sum_of([p[n] for n in nodes]) for p in parts]))
            targets.append(wanted.detach().double().cpu())
            _check_sum(heads, others, targets[-1])
            step()
    return Attribution(
        {name: torch.cat(x).float() for name, x in heads.items()},
        {name: torch.cat(others[name]).float() for name in _in_order(gm, path, others)},
        torch.cat(targets).float(),
        {f.site.name: original_numbers(model, f)[0] for f in reached},
    )


def _sum_of(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.double().sum().cpu() for x in parts]).sum()


def _target(program: Program, run: LinearRun, target: Target, signature: Signature, batch: CallInputs) -> Tensor:
    gm = program.module
    leaves = [
        run.values[n] if isinstance(n, fx.Node) else n for n in pytree.tree_leaves(gm.graph.output_node().args[0])
    ]
    out = gm.graph.process_outputs(leaves)
    if program.form is not None:
        out = program.form.give(out, program.form.take(*signature.arrange(*batch)))
    made = target(out)
    if not isinstance(made, Tensor) or made.dim() > 1 or not made.is_floating_point():
        told = f"a tensor {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise CalibrationError(
            f"logit_attribution: target returned {told}, expected one number for each sequence",
            hint="index the output down to [B], as in lambda out: out.logits[:, -1, 7]",
        )
    if not made.requires_grad:
        raise CalibrationError(
            "logit_attribution: the target does not depend on any head or MLP through linear operations",
            hint="read the logits themselves, before a softmax, a softcap or an argmax",
        )
    return made.reshape(-1)


def _parts(run: LinearRun, wanted: Tensor) -> list[Parts]:
    """For each target the part of every entry of every leaf: its value times the gradient there."""
    found: list[Parts] = []
    leaves = list(run.leaves.items())
    for i in range(len(wanted)):
        grads = torch.autograd.grad(
            wanted[i], [x for _, x in leaves], retain_graph=i + 1 < len(wanted), allow_unused=True
        )
        given = zip(leaves, grads, strict=True)
        found.append({n: torch.zeros_like(x) if g is None else (x * g).detach() for (n, x), g in given})
    return found


def _of_heads(gm: fx.GraphModule, f: Found, tap: fx.Node, parts: Sequence[Tensor]) -> Tensor:
    """[N, H]"""
    made = []
    for part in parts:
        by_head: Tensor = Interpreter(gm, {f.raised.region.out.node: part})(tap)
        made.append(by_head.double().sum((0, 2, 3)).cpu())
    return torch.stack(made)


def _check_sum(heads: Mapping[str, list[Tensor]], others: Mapping[str, list[Tensor]], wanted: Tensor) -> None:
    every = [*(x[-1].T for x in heads.values()), *(x[-1].unsqueeze(0) for x in others.values())]
    parts = torch.cat(every)
    apart = (parts.sum(0) - wanted).abs()
    if bool((apart > NOT_LINEAR * parts.abs().sum(0).clamp(min=1e-6)).any()):
        raise CalibrationError(
            f"logit_attribution: the parts add up to {parts.sum(0)[0]:.4g}, but the target is {wanted[0]:.4g}: it is not linear "
            "in the output",
            hint="return a logit or a difference of logits, not a probability or a loss",
        )


def _unreachable(path: LinearPath) -> CalibrationError:
    last = next(iter(path.ends), None)
    where = "" if last is None else f": it ends at {last.name} ({source_line(last)})"
    return CalibrationError(
        f"logit_attribution: no attention leads to the output through linear operations alone{where}",
        hint="call a model, or a part of one, that returns its logits before anything nonlinear",
    )


def _in_order(gm: fx.GraphModule, path: LinearPath, names: Mapping[str, object]) -> list[str]:
    """The biases last."""
    place = {n: i for i, n in enumerate(gm.graph.nodes)}
    first: dict[str, int] = {}
    for node, name in path.ends.items():
        first[name] = min(first.get(name, len(place)), place[node])
    return sorted(names, key=lambda name: (name == BIAS, first[name]))
