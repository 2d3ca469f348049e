"""Capture: from a model and example inputs to a graph, by torch.export, otherwise by symbolic tracing."""

from __future__ import annotations

import copy
import inspect
import io
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import as_called, mode_of
from attnopt.base.quiet import quiet
from attnopt.base.split_weight import split_parameter
from attnopt.capture.attention_lengths import KeysAndValuesAlike
from attnopt.capture.auto_axes import Limited, captured_with_own, takes, with_most_dynamic_axes
from attnopt.capture.dynamic_axes import Auto, Axes, asked_shapes, axes_of_leaves, fixed_axes, outside, plain_signature
from attnopt.capture.flat_capture import Calls, shapes_for
from attnopt.capture.flex_attention import freshly_traced, write_out
from attnopt.capture.functionalize import expand_views, functional
from attnopt.capture.guards import relations
from attnopt.capture.program import Program
from attnopt.capture.run_unchanged import called, cloned, outputs_of
from attnopt.capture.stand_ins import StandIns
from attnopt.capture.tensor_lengths import lengths_vary
from attnopt.capture.valid_sizes import settle_sizes, without_pinned
from attnopt.errors import CaptureError
from attnopt.graph.nodes import get_attr, input_name, inputs_of, opname, source_line, written
from attnopt.graph.normalize import tidy
from attnopt.graph.value_names import number, unmark


def capture(
    model: nn.Module | ExportedProgram, inputs: CallInputs, dynamic_shapes: object = None, own: CallInputs | None = None
) -> Program:
    """Capture ``model`` on example inputs.

    ``dynamic_shapes``: None (all sizes static), torch.export's notation, or "auto" (every axis of every input that the
    model allows).  ``own``: the user's example, if ``inputs`` are a larger one.  Raises CaptureError, which says what stopped
    each way of capturing.
    """
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise CaptureError(
            f"expected an nn.Module or an ExportedProgram, found {type(model).__name__}", hint="pass the model itself"
        )
    if isinstance(model, ExportedProgram):
        return _finish(model, inputs, None, "exported program", StandIns())
    if (
        scripted := next((n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)), None)
    ) is not None:
        raise CaptureError(
            f"{scripted or 'the model'} is TorchScript, which has no Python code to capture",
            hint="pass the model that it was scripted from",
        )
    if (lazy := next((name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)) is not None:
        raise CaptureError(
            f"{lazy} is a lazy parameter: its size is set by the model's first call", hint="call the model once first"
        )
    _require_whole(model)
    _check_arguments(model, inputs)
    if dynamic_shapes == "auto" or isinstance(dynamic_shapes, Auto):
        auto = dynamic_shapes if isinstance(dynamic_shapes, Auto) else Auto()
        program = with_most_dynamic_axes(model, inputs, auto, partial(_captured, model, True))
    else:
        shapes = asked_shapes(model, *inputs, dynamic_shapes)
        program = captured_with_own(model, inputs, shapes, False, partial(_captured, model, False))
    if own is not None and takes(program, model, own):
        program = replace(program, own=own)
    return without_pinned(program, axes_of_leaves(model.forward, *inputs, program.shapes))


def _require_whole(model: nn.Module) -> None:
    """Raises CaptureError for weights of which each process has a part."""
    if (name := split_parameter(model)) is not None:
        raise CaptureError(
            f"{name} is split over several processes (a DTensor), and passes read whole weights",
            hint="optimize it before fully_shard or parallelize_module; attnopt.distributed.optimize takes a split model, and "
            "attnopt.distributed.gathered makes its result whole",
        )


def _captured(model: nn.Module, is_auto: bool, inputs: CallInputs, shapes: object, is_cheap: bool) -> Program:
    """``is_cheap``: try only the first way, and only while the sizes stay simple."""
    calls = _calls(model, inputs)
    shapes = shapes_for(calls, model, *inputs, shapes, is_auto)
    flat = calls.flat(inputs)
    stand_ins = StandIns()
    failures: list[str] = []
    validates = False

    def copied() -> nn.Module:
        return stand_ins.placed(structural_copy(model))

    ways: tuple[tuple[str, Callable[[], ExportedProgram]], ...] = (
        ("torch.export", lambda: _export(copied(), flat, shapes, calls)),
        ("torch.export (strict)", lambda: _export(copied(), flat, shapes)),
        (
            "torch.fx.symbolic_trace",
            lambda: _export(fx.symbolic_trace(copied()), flat, shapes, Calls()),
        ),
    )
    for route, way in ways[:1] if is_cheap or calls.has_objects else ways:
        try:
            with quiet(), as_called(), mode_of(model), Limited() if is_cheap else nullcontext():
                exported = _without_backward(way)
        except Exception as e:
            failures.append(f"{route}: {_condensed(e)}")
            validates = validates or _is_validation(e)
            continue
        return replace(
            _finish(exported, flat, shapes, route, stand_ins), form=calls.form if route == "torch.export" else None
        )
    check_call(model, inputs)
    raise CaptureError(
        "the model could not be captured\n  " + "\n  ".join(failures),
        hint="call torch.distributions.Distribution.set_default_validate_args(False) first: its checks depend on tensor values"
        if validates
        else "make the named operation independent of input values"
        + (", or remove the named axes from dynamic_shapes" if shapes else ""),
    )


def _is_validation(e: BaseException | None) -> bool:
    """torch.distributions checks its arguments' values, which no tracer knows."""
    while e is not None:
        if any("/torch/distributions/" in Path(f.filename).as_posix() for f in traceback.extract_tb(e.__traceback__)):
            return True
        e = e.__cause__ or e.__context__
    return False


def _without_backward(way: Callable[[], ExportedProgram]) -> ExportedProgram:
    """Some torch operators (flex_attention on a CPU) only run without gradients."""
    try:
        return way()
    except NotImplementedError as e:
        if "backward" not in str(e):
            raise
        with torch.no_grad():
            return way()


def _calls(model: nn.Module, inputs: CallInputs) -> Calls:
    run = None if without_values(model) is not None else lambda m, a, k: called(structural_copy(m), a, k)
    try:
        return Calls.of(model, *inputs, run)
    except CaptureError:
        raise
    except Exception:
        check_call(model, inputs)
        raise


def _check_arguments(model: nn.Module, inputs: CallInputs) -> None:
    """Report wrong inputs directly, not through a tracer."""
    try:
        inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except TypeError as e:
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}.forward: {e}",
            hint="pass args and kwargs that the model accepts",
        ) from None


def check_call(model: nn.Module, inputs: CallInputs) -> None:
    """A model that fails on its own cannot be captured; the error should not blame tracing."""
    try:
        outputs_of(structural_copy(model), inputs)
    except Exception as e:
        raise CaptureError(
            f"{type(model).__name__} itself fails on the example inputs: {type(e).__name__}: {str(e)[:300]}",
            hint=_remedy(inputs),
        ) from e


def _remedy(inputs: CallInputs) -> str:
    """What beginners pass: a list in the place of the tuple of arguments, and arrays of numpy."""
    given = [*inputs.args, *inputs.kwargs.values()]
    if len(given) == 1 and isinstance(given[0], list) and any(isinstance(x, torch.Tensor) for x in given[0]):
        return "args is a tuple: pass (x, ...) instead of [x, ...]"
    if any(type(x).__module__ == "numpy" for x in given):
        return "pass tensors: torch.from_numpy(array)"
    return "pass inputs that the model accepts"


def without_values(model: nn.Module | ExportedProgram) -> str | None:
    """The first weight on the meta device, which has shapes but no values."""
    return next((name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta), None)


def require_values(model: nn.Module | ExportedProgram) -> None:
    """Raises CaptureError for a model without weights: its result could neither run nor be verified."""
    if isinstance(model, (nn.Module, ExportedProgram)) and (name := without_values(model)) is not None:
        raise CaptureError(
            f"{name} is on the meta device and has no values, so nothing can be verified",
            hint="load the weights first; attnopt.inspect works without them",
        )


def _export(model: nn.Module, inputs: CallInputs, shapes: Any, calls: Calls | None = None) -> ExportedProgram:
    """``calls``: wraps the calls of the model; strict if absent."""
    given = cloned(inputs)
    with (
        _without_partial_graph(),
        freshly_traced(),
        lengths_vary(model) if calls is not None else nullcontext(),
        KeysAndValuesAlike() if calls is not None else nullcontext(),
        _with_its_names(model),
        Calls().traced(model) if calls is None else calls.traced(model) as traced,
        nullcontext() if shapes is None else plain_signature(traced, *given),
    ):
        exported = torch.export.export(traced, *given, dynamic_shapes=shapes, strict=calls is None)
    return functional(exported)


@contextmanager
def _with_its_names(model: nn.Module) -> Iterator[None]:
    """An already captured graph, as in an optimized model, records the module and line of each operator."""
    graph = model if isinstance(model, fx.GraphModule) else getattr(model, "module", None)
    if not isinstance(graph, fx.GraphModule) or not isinstance(graph.graph._codegen, _PyTreeCodeGen):
        yield
        return
    run = fx.Interpreter(graph).run

    def named(*args: object, **kwargs: object) -> object:
        leaves = pytree.tree_leaves((args, kwargs))
        return graph.graph.process_outputs(run(*leaves, enable_io_processing=False))

    named.__signature__ = inspect.signature(graph.forward)  # type: ignore[attr-defined]
    graph.forward = named
    try:
        with fx.traceback.preserve_node_meta():
            yield
    finally:
        del graph.forward


@contextmanager
def _without_partial_graph() -> Iterator[None]:
    """torch.export prints partial graphs that it abandons; other stderr output is kept."""
    written, unwanted = io.StringIO(), ""
    try:
        with redirect_stderr(written):
            yield
    except Exception as e:
        unwanted = f"{e.partial_fx_graph}\n" if hasattr(e, "partial_fx_graph") else ""
        raise
    finally:
        sys.stderr.write(written.getvalue().replace(unwanted, "") if unwanted else written.getvalue())


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy with shared parameters and buffers, so attributes set by tracing do not affect the user's model."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared)
    except Exception:
        return model


def _finish(exported: ExportedProgram, inputs: CallInputs, shapes: object, route: str, stand_ins: StandIns) -> Program:
    if route == "exported program":
        exported = functional(exported)
    with quiet():
        module = exported.module()
    assert isinstance(module, fx.GraphModule)
    stand_ins.restore(module)
    unmark(module)
    _refuse_own_generator(module)
    _own_state(module)
    settle_sizes(module)
    expand_views(module)
    tidy(module)
    if write_out(module):
        tidy(module)
    number(module)
    asked = outside(axes_of_leaves(module.forward, *inputs, shapes))
    declared = _declared(module, asked)
    held = [r for r in relations(exported, module.forward, *inputs) if r not in declared]
    return Program(module, inputs, shapes, (*fixed_axes(inputs_of(module.graph), asked), *held), route)


def _refuse_own_generator(module: fx.GraphModule) -> None:
    """The graph contains the generator in its state at tracing and would continue where the model restarts."""
    drawing = next((n for n in module.graph.nodes if n.kwargs.get("generator") is not None), None)
    if drawing is not None:
        raise CaptureError(
            f"{opname(drawing)} at {source_line(drawing)} draws from the model's own torch.Generator",
            hint="use torch's default generator, or pass the random numbers to the model as an input",
        )


def _condensed(e: BaseException) -> str:
    """The relevant lines of a tracer's message: the cause, and the user's line."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    telling = [
        x
        for x in lines
        if any(w in x for w in ("Error", "Could not", "cannot", "specializ", "constraint", "Dim", "guard", "L["))
    ]
    user = [x for x in lines if x.startswith("File ") and "/torch/" not in x]
    chosen = list(dict.fromkeys([*lines[:1], *telling[:3], *user[-1:]]))
    return f"{type(e).__name__}: " + " | ".join(chosen)[:600]


def _own_state(module: fx.GraphModule) -> None:
    """State that the graph writes is a copy: the user's model keeps its own."""
    for name in written(module):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, get_attr(module, name).detach().clone())


def _declared(module: fx.GraphModule, asked: list[Axes]) -> set[str]:
    """The bounds of the user's named Dims."""
    names = map(input_name, inputs_of(module.graph))
    dims = [
        (f"{name}[{axis}]", dim)
        for name, axes in zip(names, asked, strict=False)
        for axis, dim in axes.items()
        if isinstance(dim, Dim)
    ]
    return {text for axis, dim in dims for text in (f"{axis} >= {dim.min}", f"{axis} <= {dim.max}")}
