"""Explanations: matching and the answers of passes, replayed down to the node that differs."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import networkx as nx
from torch import fx, nn

from attnopt.backends.reference import Reference
from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.capture.added_inputs import taking
from attnopt.compiler import plugins
from attnopt.compiler.analyze import analyze
from attnopt.compiler.decide import decide, standing_answers
from attnopt.compiler.job import Job, Options
from attnopt.compiler.policy import Policy
from attnopt.compiler.settle import Settled, settled
from attnopt.errors import AttnoptError, PluginError
from attnopt.graph.listing import code
from attnopt.graph.nodes import module_path, source_line
from attnopt.ir import plugin_calls
from attnopt.ir.interfaces import Backend
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.match.find import Found, Rejected

ROOT = "(root)"


@dataclass(frozen=True)
class Step:
    """One operation: ``code`` in the graph, ``where`` and ``source`` in the user's model."""

    code: str
    where: str
    source: str
    differs: bool = False


@dataclass(frozen=True)
class Explanation:
    """The outcome for one softmax or fused attention.

    ``kind``: "attention", "near miss" (it begins like an attention) or "no candidate".  ``steps``: for an attention its
    operations, otherwise those from the softmax anchor to the first difference.  ``refusals``: by matching, passes or backends.
    ``accepted``: passes and backends that do not refuse it.
    """

    name: str
    kind: str
    where: str
    spec: str = ""
    steps: tuple[Step, ...] = ()
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@compiling()
def explain(
    model: nn.Module,
    name: str,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    policy: Policy | None = None,
    *,
    dynamic_shapes: object = None,
) -> tuple[Explanation, ...]:
    """Every explanation for this name; a module may contain several.

    With a ``policy``, its passes are checked; otherwise all installed passes whose answer does not depend on options.
    Raises AttnoptError with the known names if there is none of this name.
    """
    if policy is not None:
        model, dynamic_shapes = taking(model, policy.inputs, kwargs, dynamic_shapes)
    inputs = CallInputs.of(args, kwargs)
    analyzed = analyze(model, inputs, dynamic_shapes)
    graph, findings = analyzed.program.module.graph, analyzed.findings
    rules = None
    if policy is not None:
        job = Job(model, policy, inputs, dynamic_shapes, (), (Reference(),), Options())
        rules = settled(job, analyzed.program, findings)
    made = [_of_site(f, rules) for f in findings.found]
    inside = {n for f in findings.found for n in (*f.raised.region.nodes, f.raised.region.anchor)}
    made += [_of_other(graph, r) for r in findings.rejected if r.anchor not in inside]
    chosen = tuple(e for e in made if e.name == (name if name != ROOT else ""))
    if chosen:
        return chosen
    names = list(dict.fromkeys(e.name or ROOT for e in made))
    close = difflib.get_close_matches(name, names, n=1)
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise AttnoptError(
        f"there is no attention {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
        hint=f"there are {listed}" if names else "this model has no softmax and no fused attention",
    )


def _of_site(found: Found, policy: Settled | None) -> Explanation:
    site, region = found.site, found.raised.region
    backends = _backends()
    if policy is None:
        answers = standing_answers(found)
        refusals = {name: refusal for name, refusal in answers.items() if refusal is not None}
        asked = list(answers)
    else:
        passes = policy.passes[site.name]
        refused = policy.refusals.get(site.name, {})
        refusals = {**refused, **decide(found, passes, (Reference(),)).refusals}
        asked = [*(p.name for p in passes), *refused]
    for backend in backends:
        if (refusal := _answer(backend, site)) is not None:
            refusals[f"backend {backend.name}"] = refusal
    asked += [f"backend {b.name}" for b in backends]
    return Explanation(
        name=site.name,
        kind="attention",
        where=site.where,
        spec=str(found.site.spec),
        steps=tuple(_step(n, n in region.escapes) for n in region.nodes),
        refusals=refusals,
        accepted=tuple(n for n in asked if n not in refusals),
        notes=(*site.notes, *(f"{role}: {p.why}" for role, p in site.projections.items() if p.rows is None and p.why)),
    )


def _backends() -> list[Backend]:
    """Every installed backend that can be constructed without arguments."""
    made: list[Backend] = []
    for name in plugins.backends():
        with contextlib.suppress(PluginError):
            made.append(plugins.make_backend(name))
    return made


def _answer(backend: Backend, site: Site) -> Refusal | None:
    try:
        return plugin_calls.accepts(backend, site)
    except PluginError as e:
        return plugin_calls.no_answer(site, e)


def _of_other(graph: fx.Graph, rejected: Rejected) -> Explanation:
    path = _path(graph, rejected.anchor, rejected.node)
    return Explanation(
        name=module_path(rejected.anchor),
        kind="near miss" if rejected.near else "no candidate",
        where=source_line(rejected.anchor),
        steps=tuple(_step(n, n is rejected.node) for n in path),
        refusals={"matching": rejected.refusal},
    )


def _path(graph: fx.Graph, anchor: fx.Node, node: fx.Node) -> list[fx.Node]:
    try:
        found: list[fx.Node] = nx.shortest_path(_undirected(graph), anchor, node)
    except nx.NetworkXNoPath:
        return [anchor, node]
    return found


def _undirected(graph: fx.Graph) -> nx.Graph[fx.Node]:
    """Operations and their operands; weights and inputs connect nothing, because everything uses them."""
    joined: nx.Graph[fx.Node] = nx.Graph()
    operations = [n for n in graph.nodes if n.op == "call_function"]
    joined.add_nodes_from(graph.nodes)
    joined.add_edges_from((n, i) for n in operations for i in n.all_input_nodes if i.op == "call_function")
    return joined


def _step(node: fx.Node, differs: bool) -> Step:
    return Step(code(node), source_line(node), source_text(node), differs)


def source_text(node: fx.Node) -> str:
    """The line of the user's model that created ``node``; "" if unknown."""
    frames = re.split(r"^\s*File ", node.meta.get("stack_trace") or "", flags=re.MULTILINE)[1:]
    own = [f for f in frames if "/torch/" not in f.partition("\n")[0]] or frames
    lines = own[-1].splitlines()[1:] if own else []
    return lines[0].strip() if lines else ""
