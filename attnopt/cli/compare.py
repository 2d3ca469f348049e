"""``attnopt explain``, ``diff`` and ``bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.base.call_inputs import CallInputs
from attnopt.base.progress import watched, working
from attnopt.cli.optimize import ignoring_inputs, optimized
from attnopt.cli.output import require_model, resolved, show
from attnopt.errors import AttnoptError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnopt.cli.load_model import Named
    from attnopt.cli.onnx_inputs import Given
    from attnopt.graph.listing import Hunk


def explain(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from attnopt.compiler.explain import explain as explained
    from attnopt.compiler.policy import Policy
    from attnopt.render.trees import explanation_text

    named = resolved(arguments)
    require_model(
        arguments.model, named, "`explain` needs the original model; `attnopt inspect` shows the saved report"
    )
    policy = None if arguments.policy is None else Policy.of(arguments.policy)
    with working("replaying"):
        shapes = "auto" if arguments.dynamic else None
        found = explained(named.model, arguments.site, named.args, named.kwargs, policy, dynamic_shapes=shapes)
    show(arguments, [asdict(one) for one in found], explanation_text(found))
    return 0


def diff(arguments: argparse.Namespace) -> int:
    from attnopt.base.compile_lock import compiling
    from attnopt.capture.capture import capture
    from attnopt.graph.listing import differences, listing
    from attnopt.render.trees import hunks_text

    if arguments.file is not None:
        from attnopt.cli import audit

        return audit.run(arguments)
    named = resolved(arguments, needs_sizes=not arguments.dynamic)
    require_model(arguments.model, named, "it does not contain the original graph")
    model = ignoring_inputs(named, arguments.policy)
    with working("capturing"), compiling():
        shapes = "auto" if arguments.dynamic else None
        before = listing(capture(model, CallInputs.of(named.args, named.kwargs), shapes).module.graph)
    after = listing(optimized(arguments, named).graph_module.graph)
    hunks = [h for h in differences(before, after) if arguments.site is None or h.site == arguments.site]
    if arguments.site is not None and not hunks:
        raise AttnoptError(
            f"no change belongs to an attention {arguments.site!r}", hint="`attnopt inspect` lists the names"
        )
    show(arguments, [_hunk_json(h) for h in hunks], hunks_text(hunks))
    return 0


def _hunk_json(hunk: Hunk) -> dict[str, object]:
    return {
        "site": hunk.site,
        "passes": hunk.passes,
        "module": hunk.module,
        "where": hunk.where,
        "lines": [f"{sign} {line.text}" for sign, line in hunk.lines],
    }


def bench(arguments: argparse.Namespace) -> int:
    import torch

    from attnopt.base.closeness import difference, tensors
    from attnopt.base.cpu_timing import interleaved, one_thread
    from attnopt.cli.onnx_inputs import Given, require_onnx

    if arguments.first == arguments.second:
        raise AttnoptError("the two models have the same name", hint="give two models to compare")
    names, given = (arguments.first, arguments.second), Given.of(arguments, needs_sizes=True)
    require_onnx(given, *names)
    models = {name: _loaded(name, given) for name in names}
    args, kwargs, told = _inputs(models, given)
    calls = {name: _call(named, args, kwargs) for name, named in models.items()}
    with torch.inference_mode(), one_thread():
        outputs = [tensors(_answer(name, call)) for name, call in calls.items()]
        times = interleaved(calls, arguments.rounds, 2, partial(watched, what="measuring"))
    low, high = times.spread(arguments.second, arguments.first)
    measured = {
        "models": {name: {"cpu_ms": 1e3 * times.median(name), "rounds_ms": _ms(times.of[name])} for name in calls},
        "ratio": times.ratio(arguments.second, arguments.first),
        "quartiles": [low, high],
        "difference": difference(outputs[1], outputs[0]),
        "inputs": told,
        "rounds": arguments.rounds,
    }
    show(arguments, measured, _bench_table(measured))
    return 0


def _loaded(name: str, given: Given) -> Named:
    """An ONNX file runs in ONNX Runtime."""
    from attnopt.cli.load_model import Named, resolve
    from attnopt.cli.onnx_inputs import InRuntime, is_onnx

    with working(f"loading {name}"):
        return Named(InRuntime(Path(name))) if is_onnx(name) else resolve(name, given)


def _ms(seconds: tuple[float, ...]) -> list[float]:
    return [1e3 * s for s in seconds]


def _inputs(models: Mapping[str, Named], given: Given) -> tuple[tuple[object, ...], dict[str, object], str]:
    """The inputs of the command line, or the example inputs of the first model that has some.

    Otherwise zeros of the captured sizes, or synthetic values for a file without free axes.
    """
    from attnopt.cli.onnx_inputs import example_inputs, is_onnx

    file = next(filter(is_onnx, models), None)
    if file is not None and given:
        return *_fed(models, example_inputs(Path(file), given)), "the given inputs"
    for name, named in models.items():
        if named.args or named.kwargs:
            return named.args, named.kwargs, f"the example inputs of {name}"
    for name, named in models.items():
        if named.saved is not None:
            model: Any = named.model
            return *model.origin.inputs, f"zeros of the sizes that {name} was captured with"
    if file is not None:
        return *_fed(models, example_inputs(Path(file), given)), f"synthetic inputs for {file}"
    raise AttnoptError("neither model has example inputs", hint="make one of the factories return (model, args)")


def _fed(models: Mapping[str, Named], inputs: Mapping[str, object]) -> tuple[tuple[object, ...], dict[str, object]]:
    """By name if all models are files with these inputs, in any order; otherwise by position."""
    from attnopt.cli.onnx_inputs import InRuntime

    files = [named.model for named in models.values() if isinstance(named.model, InRuntime)]
    if len(files) == len(models) and all(set(inputs) == set(file.names) for file in files):
        return (), dict(inputs)
    return tuple(inputs.values()), {}


def _call(named: Named, args: tuple[object, ...], kwargs: dict[str, object]) -> Callable[[], object]:
    return lambda: named.model(*args, **kwargs)


def _answer(name: str, call: Callable[[], object]) -> object:
    try:
        return call()
    except AttnoptError:
        raise
    except Exception as error:
        raise AttnoptError(
            f"{name} fails on the inputs: {type(error).__name__}: {str(error)[:300]}",
            hint="compare models that take the same inputs",
        ) from error


def _bench_table(measured: Mapping[str, Any]) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    (first, a), (second, b) = measured["models"].items()
    low, high = measured["quartiles"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for head in ("model", "CPU ms per call", "ratio", "quartiles"):
        table.add_column(head, justify="left" if head == "model" else "right")
    table.add_row(Text(first), f"{a['cpu_ms']:.3f}", "1", "")
    table.add_row(Text(second), f"{b['cpu_ms']:.3f}", f"{measured['ratio']:.3f}", f"{low:.3f}-{high:.3f}")
    about = f"medians of {measured['rounds']} interleaved rounds, one thread, {measured['inputs']}"
    return Group(Text(about), table, Text(f"largest relative difference of the outputs: {measured['difference']:.1e}"))
