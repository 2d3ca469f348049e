"""``attnopt inspect``, ``optimize``, ``export`` and ``passes``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from attnopt.base.progress import watched, working
from attnopt.cli import data
from attnopt.cli.output import require_model, resolved, show
from attnopt.cli.ranks import first_alone, launched
from attnopt.errors import AttnoptError

if TYPE_CHECKING:
    from torch import nn

    from attnopt.cli.load_model import Named
    from attnopt.cli.ranks import Job
    from attnopt.model import OptimizedModel

ROUNDS = 15  # of --time


def inspect(arguments: argparse.Namespace) -> int:
    from attnopt.render.tables import inspection_json, report_table
    from attnopt.render.trees import inspection_tree

    named = resolved(arguments)
    if named.saved is not None:
        model: Any = named.model
        show(arguments, model.report.to_json(), report_table(model.report))
        return 0
    import attnopt

    require_model(arguments.model, named, "")
    with working("looking for attentions"):
        shapes = "auto" if arguments.dynamic else None
        found = attnopt.inspect(named.model, named.args, named.kwargs, dynamic_shapes=shapes)
    show(arguments, inspection_json(found), inspection_tree(found))
    return 0


def optimize(arguments: argparse.Namespace) -> int:
    if arguments.quantize and not arguments.onnx:
        raise AttnoptError("--quantize is for an ONNX file, and none is written", hint="add --onnx FILE")
    with launched() as job:
        named = resolved(arguments, needs_sizes=not arguments.dynamic)
        if named.saved is not None:
            raise AttnoptError(
                f"{arguments.model} is a saved model: it is already optimized",
                hint="optimize the original model; `attnopt export` exports a saved one to ONNX",
            )
        fast = optimized(arguments, named, _calibration(arguments, named, job))
        return first_alone(job, lambda: _written(arguments, _timed(arguments, named, fast)))


def export(arguments: argparse.Namespace) -> int:
    named = resolved(arguments, needs_sizes=not arguments.dynamic)
    model = named.model if named.saved is not None else optimized(arguments, named)
    return _written(arguments, model)


def _calibration(arguments: argparse.Namespace, named: Named, job: Job | None) -> Iterable[Any] | None:
    """What ``--data`` names; under torchrun, this process's share of it."""
    if arguments.data is None:
        return None
    source = data.Source(arguments.data, arguments.tokenizer, arguments.batch)

    def read() -> Iterable[Any]:
        return data.data_of(source, named).batches

    return read() if job is None else job.share(read, arguments.data)


def optimized(arguments: argparse.Namespace, named: Named, calibration: Iterable[Any] | None = None) -> OptimizedModel:
    """The model as the command line's options want it."""
    import attnopt

    require_model(arguments.model, named, "it is already optimized")
    with working("optimizing"):
        return attnopt.optimize(
            named.model,
            arguments.policy,
            named.args,
            named.kwargs,
            dynamic_shapes=shapes_of(arguments),
            calibration=calibration,
            backend=arguments.backend,
            tolerance=arguments.tolerance,
            strict=arguments.strict,
            limit=arguments.limit,
            seed=arguments.seed,
        )


def ignoring_inputs(named: Named, policy: str) -> nn.Module:
    """The model, which can be called with what only the policy reads."""
    from attnopt.capture.added_inputs import taking
    from attnopt.compiler.policy import Policy

    return taking(named.model, Policy.of(policy).inputs, named.kwargs, None)[0]


def shapes_of(arguments: argparse.Namespace) -> object:
    """``--dynamic``; without it a file's free axes are fixed too."""
    from attnopt.cli.onnx_inputs import is_onnx

    if arguments.dynamic:
        return "auto"
    return {} if is_onnx(arguments.model) else None


def _timed(arguments: argparse.Namespace, named: Named, fast: OptimizedModel) -> OptimizedModel:
    """The same model; with ``--time``, with the CPU time per call, before and after, in its report."""
    if not arguments.time:
        return fast
    from dataclasses import replace

    import torch

    from attnopt.base.cpu_timing import interleaved, one_thread
    from attnopt.model import OptimizedModel

    model = ignoring_inputs(named, arguments.policy)
    calls = {
        "before": lambda: model(*named.args, **named.kwargs),
        "after": lambda: fast(*named.args, **named.kwargs),
    }
    with torch.inference_mode(), one_thread():
        times = interleaved(calls, ROUNDS, 2, partial(watched, what="measuring"))
    report = replace(fast.report, cpu_seconds={name: times.median(name) for name in calls})
    return OptimizedModel(fast.graph_module, replace(fast.origin, report=report))


def _written(arguments: argparse.Namespace, model: Any) -> int:
    """Write the requested files, then show the report and their paths."""
    from attnopt.render.tables import report_table

    report, written, quantized = model.report, {}, None
    if out := getattr(arguments, "out", None):
        with working(f"saving {out}"):
            model.save(out)
        written["saved"] = out
    if arguments.onnx:
        with working(f"exporting {arguments.onnx} and checking it in ONNX Runtime"):
            quantized = model.export_onnx(arguments.onnx, quantize=arguments.quantize)
        written["onnx"] = arguments.onnx
    if arguments.html:
        report.to_html(arguments.html)
        written["html"] = arguments.html
    data = {"report": report.to_json(), "written": written}
    if quantized is not None:
        data["quantization"] = quantized.to_json()
    show(arguments, data, report_table(report))
    if arguments.json:
        return 0
    if report.cpu_seconds:
        before, after = report.cpu_seconds["before"], report.cpu_seconds["after"]
        print(f"CPU time per call: {1e3 * before:.2f} ms before, {1e3 * after:.2f} ms after")
    for kind, path in written.items():
        print(f"{kind}: {path}")
    if quantized is not None:
        print(quantized)
    return 0


def passes(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from attnopt.compiler import plugins
    from attnopt.render.tables import plugin_table

    found = plugins.describe()
    show(arguments, [asdict(one) for one in found], plugin_table(found))
    return 0
