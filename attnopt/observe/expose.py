"""Taps as further outputs of a model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from attnopt.base.bit_table import indices
from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.options import choice
from attnopt.compiler.analyze import analyze
from attnopt.compiler.chosen_sites import between_tokens, chosen_places, site_names
from attnopt.compiler.edited_graph import cleaned, origin_of, report_of
from attnopt.errors import CaptureError, PolicyError
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import shape, value
from attnopt.match.find import Findings
from attnopt.model import OptimizedModel
from attnopt.observe import chosen, maps
from attnopt.observe.collect import original_numbers
from attnopt.observe.contribution import contribution, read_for, require_projection
from attnopt.observe.residual import Residual
from attnopt.observe.taps import Question, Tap
from attnopt.onnx.load.model_or_file import opened


@dataclass(frozen=True)
class Exposed:
    """One kind of values of attentions, as of ``attnopt.collect``, of these queries, keys and heads."""

    kind: str
    rows: Any = None
    columns: Any = None
    heads: Any = None


def Rows(positions: Any, heads: Any = None) -> Exposed:  # noqa: N802
    """The weights of these queries, [B, H, R, S]: r rows cost what r queries cost."""
    return Exposed("weights", rows=positions, heads=heads)


def Columns(positions: Any, heads: Any = None) -> Exposed:  # noqa: N802
    """The weights that these keys get, [B, H, L, C]."""
    return Exposed("weights", columns=positions, heads=heads)


def Outputs(heads: Any = None) -> Exposed:  # noqa: N802
    """The outputs of heads, [B, H, L, Dv]."""
    return Exposed("outputs", heads=heads)


@compiling()
def expose(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    taps: Mapping[str, object],
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    dynamic_shapes: object = None,
) -> OptimizedModel:
    """The model with taps as further outputs: called like it, it returns ``(its own output, {"layers.0.attn.weights": tensor})``.

    ``taps``: from names or globs of attentions to what is wanted of them, one or several of ``Rows``, ``Columns``, ``Outputs``,
    ``Exposed``, and the kinds of ``attnopt.collect`` as text, such as ``"q"``.  Positions below 0 count from the end.
    The model's own output stays the same, bit for bit: nothing is fused.  The result has ``save``, ``export_onnx`` and a report
    as of ``optimize``, and so are ``args``, ``kwargs`` and ``dynamic_shapes``.

    Raises PolicyError for names, heads or positions that there are not, CaptureError.
    """
    inputs = CallInputs.of(args, kwargs)
    if not any(inputs):
        raise PolicyError("expose needs example inputs", hint="pass args or kwargs")
    wanted = _wanted(taps)
    given = model.module() if isinstance(model, ExportedProgram) else opened(model, inputs)
    analyzed = analyze(given, inputs, dynamic_shapes)
    program, findings = analyzed.program, analyzed.findings
    if program.form is not None and program.form.results.has_state:
        raise CaptureError(
            "expose needs a model that changes none of its inputs, such as a cache",
            hint="call it without a cache, as with use_cache=False",
        )
    module = program.module
    report = report_of(program, findings)
    _add_outputs(module, dict(_nodes(given, module, findings, wanted)))
    cleaned(module)
    return OptimizedModel(module, origin_of(given, program, findings, module, report))


def _wanted(taps: object) -> list[tuple[str, tuple[Exposed, ...]]]:
    if not isinstance(taps, Mapping) or not taps:
        raise PolicyError(
            f"expose: invalid value taps={taps!r}: expected a mapping from names of attentions to what is wanted",
            hint='write it as {"*": attnopt.Rows([-1])}',
        )
    found: list[tuple[str, tuple[Exposed, ...]]] = []
    for glob, given in taps.items():
        listed = list(given) if isinstance(given, (list, tuple)) else [given]
        found.append((str(glob), tuple(_exposed(x) for x in listed)))
    return found


def _exposed(x: object) -> Exposed:
    if isinstance(x, Exposed):
        choice("expose", "kind", x.kind, chosen.KINDS)
        return x
    return Exposed(choice("expose", "kind", x, chosen.KINDS))


def _nodes(
    model: nn.Module, gm: fx.GraphModule, findings: Findings, wanted: Sequence[tuple[str, tuple[Exposed, ...]]]
) -> Iterator[tuple[str, fx.Node]]:
    """The name and the node of each further output, by attention in the order in which they run."""
    found = between_tokens("expose", [glob for glob, _ in wanted], findings.found)
    names = [f.site.name for f in found]
    matched = [(set(site_names("expose", [glob], names)), asked) for glob, asked in wanted]
    streams = Residual(gm.graph, findings.found)
    taken: dict[str, int] = {}
    for f in found:
        emit = Emitter(gm.graph, gm.graph.output_node(), {"site": f.site.name})
        for asked in (x for glob, listed in matched if f.site.name in glob for x in listed):
            name = f"{f.site.name}.{asked.kind}".lstrip(".")
            taken[name] = taken.get(name, 0) + 1
            branch = streams.of_site.get(f.site.name) if asked.kind == "contribution" else None
            question = Question(
                "expose",
                (asked.kind,),
                chosen.numbers_of("expose", "rows", asked.rows),
                chosen.numbers_of("expose", "columns", asked.columns),
            )
            places = chosen_places("expose", asked.heads, f.site.name, original_numbers(model, f)[0])
            tap = Tap(question, f, places, branch)
            _check_positions(tap)
            yield name if taken[name] == 1 else f"{name}#{taken[name]}", _node(gm, emit, tap)


def _check_positions(tap: Tap) -> None:
    """At the sizes of the example."""
    operands, q = tap.found.raised.operands, tap.question
    for option, wanted, node in (("rows", q.rows, operands.q), ("columns", q.columns, operands.k)):
        if wanted is not None:
            chosen.at("expose", option, wanted, shape(node)[2], tap.name, torch.device("cpu"))


def _node(gm: fx.GraphModule, emit: Emitter, tap: Tap) -> fx.Node:
    """The node of the one kind of the tap."""
    (kind,) = tap.question.kinds
    if kind == "input":
        return emit.inline(lambda x: _at(x, 1, tap.question.rows), _tokens(tap))
    if kind == "contribution":
        require_projection("expose", tap.found, tap.branch)
        others = list(dict.fromkeys(read_for(tap.branch)))

        def contributed(out: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
            known = dict(zip(others, rest, strict=True))
            rows = _places(tap.question.rows, out.shape[2], out.device)
            own = _heads(out, tap)
            return contribution(tap.found, tap.branch, own, weight, tap.places, known.__getitem__, rows)

        return emit.inline(contributed, tap.out, _parameter(gm, tap), *others)
    if kind == "outputs":
        return emit.inline(lambda out: _at(_heads(out, tap), 2, tap.question.rows), tap.out)
    given = tap.operands_of(kind)

    def computed(*tensors: Tensor) -> Tensor:
        t = tap.of_heads(dict(zip(given, tensors, strict=True)))
        rows = _places(tap.question.rows, t.q.shape[2], t.q.device)
        columns = tap.question.columns
        match kind:
            case "q":
                return _at(t.q, 2, tap.question.rows)
            case "k" | "v":
                return _at(t.k if kind == "k" else t.v, 2, columns)
            case "lse":
                return maps.log_sum_exp(tap.spec, t, rows)
            case "scores":
                return _at(maps.scores(tap.spec, t, rows), 3, columns)
        return _at(maps.weights(tap.spec, t, rows), 3, columns)

    return emit.inline(computed, *given.values())


def _heads(out: Tensor, tap: Tap) -> Tensor:
    return out if tap.has_all_heads else out.index_select(1, indices(tap.places, out.device))


def _places(wanted: Sequence[int] | None, length: int, device: torch.device) -> Tensor | None:
    """These positions, with a length that may be symbolic.  One that a shorter sequence does not have is beyond its end, where
    ONNX fails as torch does: below 0, it would count from the end once more."""
    if wanted is None:
        return None
    found = indices(wanted, device)
    if min(wanted) >= 0:
        return found
    found = torch.where(found < 0, found + length, found)
    return torch.where(found < 0, length, found)


def _at(x: Tensor, axis: int, wanted: Sequence[int] | None) -> Tensor:
    places = _places(wanted, x.shape[axis], x.device)
    return x.clone() if places is None else x.index_select(axis, places)


def _tokens(tap: Tap) -> fx.Node:
    """The input of the query projection, if it is [B, L, C] as it is.  Raises PolicyError."""
    node, q = tap.input, value(tap.found.raised.operands.q)
    sizes = value(node).shape
    if len(sizes) == 3 and sizes[0] == q.shape[0] and sizes[1] == q.shape[2] and shape(node)[0] != shape(node)[1]:
        return node
    raise PolicyError(
        f"expose: the input of {tap.name or '(root)'} has the sizes {shape(node)}, which are not told to be [B, L, C]",
        hint='expose "q" instead, or collect the input',
    )


def _parameter(gm: fx.GraphModule, tap: Tap) -> fx.Node:
    name = tap.found.site.projections["out"].weight
    found: fx.Node = next(n for n in gm.graph.nodes if n.op == "get_attr" and str(n.target) == name)
    return found


def _add_outputs(gm: fx.GraphModule, made: Mapping[str, fx.Node]) -> None:
    """The graph returns (what it returned, these)."""
    output, codegen = gm.graph.output_node(), gm.graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    flat = pytree.tree_leaves(output.args[0])
    info = codegen.pytree_info
    assert info.out_spec is not None
    own: Any = pytree.tree_unflatten(list(range(info.out_spec.num_leaves)), info.out_spec)
    spec = pytree.tree_structure((own, dict.fromkeys(made, 0)))
    output.args = ((*flat, *made.values()),)
    output.meta.pop("val", None)
    changed = copy.copy(codegen)
    changed.pytree_info = info._replace(out_spec=spec)
    gm.graph.set_codegen(changed)
    if hasattr(gm, "_out_spec"):
        gm._out_spec = spec
