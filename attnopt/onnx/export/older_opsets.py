"""Nodes as torch's exporter writes them, in the words of an older opset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnopt.errors import ExportError
from attnopt.onnx.export.builder import Array

if TYPE_CHECKING:
    import onnx

WRITTEN = 18  # the oldest opset that torch writes
OLDEST = 7  # before it, ONNX broadcasts otherwise


_Rule = Callable[["_Older", "onnx.NodeProto"], "list[onnx.NodeProto]"]


class _Older:
    def __init__(self, opset: int, constants: Mapping[str, Array]) -> None:
        self.opset, self.constants, self.count = opset, dict(constants), 0
        self.stored: dict[str, Array] = {}  # constants that had to be added

    def nodes(self, nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
        made: list[onnx.NodeProto] = []
        for node in nodes:
            self._remember(node)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    inner = self.nodes(attribute.g.node)
                    del attribute.g.node[:]
                    attribute.g.node.extend(inner)
            made += self._older(node)
        return made

    def _remember(self, node: onnx.NodeProto) -> None:
        import onnx

        if node.op_type == "Constant" and node.attribute[0].name == "value":
            self.constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)

    def _older(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        rule = _RULES.get(node.op_type) if not node.domain else None
        if rule is None or self.opset >= rule[0]:
            return iter([node])
        return iter(rule[1](self, node))

    def numbers(self, node: onnx.NodeProto, place: int) -> list[int]:
        """A constant operand."""
        found = self.constants.get(node.input[place])
        if found is None:
            raise _cannot(node, self.opset)
        return [int(n) for n in np.asarray(found).reshape(-1)]

    def number(self, value: int) -> str:
        """The name of a constant."""
        name = f"attnopt_int64_1_{value}"
        self.stored[name] = np.asarray([value], np.int64)
        return name

    def name(self, node: onnx.NodeProto) -> str:
        self.count += 1
        return f"{node.output[0]}_{self.count}"


def older(
    nodes: Iterable[onnx.NodeProto], stored: Sequence[onnx.TensorProto], opset: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The same nodes in ``opset``, and the constants that they need besides the ``stored`` ones.  Raises ExportError."""
    import onnx

    if opset < OLDEST:
        raise ExportError(
            f"the rewritten part of the file cannot be expressed in opset {opset}",
            hint=f"convert the file to opset {WRITTEN} or later with onnx.version_converter",
        )
    made = _Older(opset, {t.name: onnx.numpy_helper.to_array(t) for t in stored})
    found = made.nodes(nodes)
    return found, [onnx.numpy_helper.from_array(x, name) for name, x in made.stored.items()]


def _cannot(node: onnx.NodeProto, opset: int) -> ExportError:
    return ExportError(
        f"{node.op_type} in the rewritten part of the file is not available in opset {opset}",
        hint=f"convert the file to opset {WRITTEN} or later with onnx.version_converter",
    )


def _get(node: onnx.NodeProto, name: str, default: int | None = None) -> Any:
    import onnx

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _without(node: onnx.NodeProto, *names: str) -> onnx.NodeProto:
    kept = [a for a in node.attribute if a.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)
    return node


def _with(node: onnx.NodeProto, **attributes: Sequence[int]) -> onnx.NodeProto:
    import onnx

    node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in attributes.items())
    return node


def _axes_inside(o: _Older, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    if len(node.input) > 1:
        axes = o.numbers(node, 1)
        del node.input[1:]
        _with(node, axes=axes)
    return [_without(node, "noop_with_empty_axes")]


def _split(o: _Older, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    if o.opset < 13 and len(node.input) > 1:
        sizes = o.numbers(node, 1)
        del node.input[1:]
        _with(node, split=sizes)
    elif "num_outputs" in {a.name for a in node.attribute} and len(node.input) == 1:
        raise _cannot(node, o.opset)
    return [_without(node, "num_outputs")]


def _shape(o: _Older, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    import onnx

    start, end = _get(node, "start", 0), _get(node, "end")
    _without(node, "start", "end")
    if start == 0 and end is None:
        return [node]
    whole, out = o.name(node), node.output[0]
    node.output[0] = whole
    last = 2**62 if end is None else end
    if o.opset < 10:
        return [node, onnx.helper.make_node("Slice", [whole], [out], starts=[start], ends=[last], axes=[0])]
    return [node, onnx.helper.make_node("Slice", [whole, *map(o.number, (start, last, 0))], [out])]


def _reshape(_: _Older, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [_without(node, "allowzero")]


def _clip(o: _Older, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    raise _cannot(node, o.opset)


def _slice(o: _Older, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    starts, ends, *rest = (o.numbers(node, i) for i in range(1, len(node.input)) if node.input[i])
    if len(rest) > 1 and set(rest[1]) != {1}:
        raise _cannot(node, o.opset)
    del node.input[1:]
    return [_with(node, starts=starts, ends=ends, **({"axes": rest[0]} if rest else {}))]


def _negated(kind: str) -> _Rule:
    """As the inverse, in reverse order."""

    def rule(o: _Older, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        import onnx

        opposite, out = o.name(node), node.output[0]
        node.op_type, node.output[0] = kind, opposite
        return [node, onnx.helper.make_node("Not", [opposite], [out])]

    return rule


def _absent(o: _Older, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    raise _cannot(node, o.opset)


def _softmax(o: _Older, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    if _get(node, "axis", -1) != 3:  # ours; with four axes, the last is unambiguous
        raise _cannot(node, o.opset)
    return [node]


_RULES: dict[str, tuple[int, _Rule]] = {
    **{f"Reduce{k}": (18, _axes_inside) for k in ("Mean", "Max", "Min", "Prod", "L1", "L2", "LogSumExp", "SumSquare")},
    "ReduceSum": (13, _axes_inside),
    "Squeeze": (13, _axes_inside),
    "Unsqueeze": (13, _axes_inside),
    "Split": (18, _split),
    "Shape": (15, _shape),
    "Reshape": (14, _reshape),
    "Clip": (11, _clip),
    "Slice": (10, _slice),
    "Softmax": (13, _softmax),
    "GreaterOrEqual": (12, _negated("Less")),
    "LessOrEqual": (12, _negated("Greater")),
    **{k: (since, _absent) for k, since in (
        ("Where", 9), ("Expand", 8), ("IsNaN", 9), ("ConstantOfShape", 9), ("CastLike", 15), ("Trilu", 14), ("Range", 11),
        ("LayerNormalization", 17), ("CumSum", 11), ("Gelu", 20), ("Mod", 10), ("SequenceEmpty", 11), ("Einsum", 12),
        ("IsInf", 10), ("GatherND", 11),
    )},
}  # fmt: skip
