"""Replaces nodes of a file by new ones; everything else stays unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from attnopt.errors import ExportError
from attnopt.onnx.load.grouping import in_order, used_by

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Insert:
    """``nodes`` compute values of the file, named in ``made``, from other values and from their own ``weights``."""

    nodes: Sequence[onnx.NodeProto]
    weights: Sequence[onnx.TensorProto]
    made: frozenset[str]
    reshaped: frozenset[str] = frozenset()  # those with changed shapes
    infos: Sequence[onnx.ValueInfoProto] = ()  # of new values: tools cannot infer it from ONNX Runtime's operators
    inputs: Sequence[onnx.ValueInfoProto] = ()  # further ones, which the nodes may read
    opsets: Mapping[str, int] = field(default_factory=dict)


def spliced(model: onnx.ModelProto, insert: Insert) -> onnx.ModelProto:
    """A copy of ``model`` with the nodes of ``insert``, without the nodes and weights that are now unused."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    old = list(graph.node)
    before = _live(old, graph)
    kept = [n for n in old if not _is_replaced(n, insert)]
    place = next((i for i, n in enumerate(old) if _is_replaced(n, insert)), len(old))
    together = [*kept[:place], *insert.nodes, *kept[place:]]  # the replaced nodes come after ``place``
    after = _live(together, graph)
    dead = before - after
    nodes = [n for n in together if id(n) not in dead]
    used, was_used = _used(nodes, graph), _used(old, graph)
    gone = {o for n in old for o in n.output} - {o for n in nodes for o in n.output}
    try:
        nodes = in_order(nodes, used_by, lambda n: n.output)
    except ValueError:
        raise ExportError("the rewritten part of the file would depend on its own output") from None
    copies = [_copied(n) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    unused = was_used - used
    _drop(graph.initializer, lambda t: t.name in unused)
    _drop(graph.sparse_initializer, lambda t: t.values.name in unused)
    stored = {t.name for t in graph.initializer}
    _drop(
        graph.input,
        lambda i: i.name in unused and i.name in {t.name for t in model.graph.initializer} and i.name not in stored,
    )
    _drop(graph.value_info, lambda v: v.name in gone or v.name in insert.reshaped)
    _drop(graph.quantization_annotation, lambda q: q.tensor_name in gone)
    known = {v.name for v in (*graph.value_info, *graph.output)}
    graph.value_info.extend(v for v in insert.infos if v.name not in known)
    graph.initializer.extend(insert.weights)
    graph.input.extend(i for i in insert.inputs if i.name in used)
    if insert.weights and made.ir_version < 4:
        made.ir_version = 4  # before, each weight is an input too
    domains = {o.domain for o in made.opset_import}
    for domain, version in insert.opsets.items():
        if domain not in domains and any(n.domain == domain for n in _all(graph.node)):
            made.opset_import.append(onnx.helper.make_opsetid(domain, version))
    return made


def _is_replaced(node: onnx.NodeProto, insert: Insert) -> bool:
    return bool(set(node.output) & insert.made)


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    import onnx

    made = onnx.NodeProto()
    made.CopyFrom(node)
    return made


def _live(nodes: Iterable[onnx.NodeProto], graph: onnx.GraphProto) -> set[int]:
    """The nodes on which an output depends, by identity."""
    made_by = {o: n for n in nodes for o in n.output if o}
    stack = [made_by[o.name] for o in graph.output if o.name in made_by]
    live: set[int] = set()
    while stack:
        node = stack.pop()
        if id(node) in live:
            continue
        live.add(id(node))
        stack += [made_by[name] for name in used_by(node) if name in made_by]
    return live


def _used(nodes: Iterable[onnx.NodeProto], graph: onnx.GraphProto) -> set[str]:
    return {name for n in nodes for name in used_by(n)} | {o.name for o in graph.output}


def _all(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _all(graph.node)


def _drop(items: object, unwanted: object) -> None:
    kept = [x for x in items if not unwanted(x)]  # type: ignore[operator, attr-defined]
    del items[:]  # type: ignore[attr-defined]
    items.extend(kept)  # type: ignore[attr-defined]


def renamed(nodes: Sequence[onnx.NodeProto], names: Mapping[str, str], prefix: str) -> list[onnx.NodeProto]:
    """The nodes with values renamed by ``names``, and every other value to ``prefix`` with a number."""

    known = dict(names)

    def of(name: str) -> str:
        return known.setdefault(name, f"{prefix}{len(known)}") if name else ""

    def walk(found: Iterable[onnx.NodeProto]) -> None:
        for node in found:
            node.name = ""
            node.ClearField("metadata_props")  # torch's source annotations are longer than the node
            node.ClearField("doc_string")
            for values in (node.input, node.output):
                said = [of(v) for v in values]
                del values[:]
                values.extend(said)
            for attribute in node.attribute:
                for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
                        value.name = of(value.name)
                    walk(graph.node)

    copies = [_copied(n) for n in nodes]
    walk(copies)
    return copies
