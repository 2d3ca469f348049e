"""Products with constant weights, in the form in which ONNX Runtime's quantizers take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnx_ir.convenience as irc
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from attnopt.onnx.export.builder import is_a, made_by


@dataclass(frozen=True)
class WeightProducts:
    """``chosen``: names of the nodes to quantize; ``others``: of the products that stay in float."""

    chosen: tuple[str, ...]
    others: tuple[str, ...]


def prepared(model: ir.Model) -> WeightProducts:
    """Make every product with a constant float32 matrix a MatMul whose weight nothing else reads, and name all products.

    onnxruntime's quantizers skip transposed weights and constants in nodes, transpose a shared weight of two Gemm twice, and
    choose nodes by their names.  Biases are written as ONNX Runtime joins them with quantized products.
    """
    LiftConstantsToInitializersPass()(model)
    weights = _Weights(model.graph)
    for node in list(model.graph):
        if is_a(node, "Gemm"):
            _as_matmul(model.graph, weights, node)
    chosen = set()
    for node in model.graph:
        if is_a(node, "MatMul") and (weight := weights.of(node.inputs[1])) is not None:
            node.replace_input_with(1, weight)
            chosen.add(node)
            _bias_first(model.graph, node)
    products = [n for n in model.graph.all_nodes() if is_a(n, "MatMul", "Gemm")]
    _named_apart(products, [n for n in model.graph.all_nodes() if n not in set(products)])
    return WeightProducts(
        tuple(str(n.name) for n in products if n in chosen), tuple(str(n.name) for n in products if n not in chosen)
    )


@dataclass
class _Weights:
    """Initializers that only products read, by what they are made of."""

    graph: ir.Graph
    made: dict[tuple[ir.Value, bool], ir.Value] = field(default_factory=dict)

    def of(self, value: ir.Value | None, transposed: bool = False) -> ir.Value | None:
        """None if it is no constant float32 matrix."""
        swap = made_by(value, "Transpose")
        if swap is not None and list(swap.attributes.get_ints("perm", [1, 0])) == [1, 0]:
            return self.of(swap.inputs[0], not transposed)
        if value is None or value.is_graph_input():  # a caller may bring another weight
            return None
        stored = value.const_value
        if stored is None or stored.dtype != ir.DataType.FLOAT or len(stored.shape) != 2:
            return None
        if not transposed and value.is_initializer() and value.graph is self.graph and _is_weight_only(value):
            return value
        if (value, transposed) not in self.made:
            self.made[value, transposed] = self._stored(value, stored.numpy(), transposed)
        return self.made[value, transposed]

    def _stored(self, value: ir.Value, array: np.ndarray, transposed: bool) -> ir.Value:
        name = f"{value.name}/{'transposed' if transposed else 'weight'}"
        while name in self.graph.initializers:
            name += "_"
        array = np.ascontiguousarray(array.T if transposed else array)
        made = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(array, name=name),
        )
        self.graph.register_initializer(made)
        return made


def _is_weight_only(value: ir.Value) -> bool:
    users = value.uses()
    return not value.is_graph_output() and all(is_a(node, "MatMul") and place == 1 for node, place in users)


def _as_matmul(graph: ir.Graph, weights: _Weights, node: ir.Node) -> None:
    """A Gemm that scales nothing, with constant weights, as a product and a sum."""
    of = node.attributes
    if of.get_float("alpha", 1.0) != 1.0 or of.get_float("beta", 1.0) != 1.0 or of.get_int("transA", 0) != 0:
        return
    weight = weights.of(node.inputs[1], of.get_int("transB", 0) != 0)
    if weight is None:
        return
    product = ir.node("MatMul", [node.inputs[0], weight], name=node.name)
    new, out = [product], node.outputs[0]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        product.outputs[0].name = f"{out.name}/product"
        product.outputs[0].type = out.type
        new.append(ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{node.name}/sum" if node.name else None))
    irc.replace_nodes_and_values(graph, node, [node], new, [out], [new[-1].outputs[0]])


def _bias_first(graph: ir.Graph, product: ir.Node) -> None:
    """Sum(product, bias, ...) as Sum(Add(product, bias), ...): the same additions in the same order."""
    made = product.outputs[0]
    if made.is_graph_output() or len(made.uses()) != 1:
        return
    ((node, place),) = made.uses()
    if not is_a(node, "Sum") or node.graph is not graph or place > 1 or len(node.inputs) < 2:
        return
    bias = node.inputs[1 - place]
    if bias is None or bias.const_value is None or bias.is_graph_input() or len(bias.const_value.shape) != 1:
        return
    added = ir.node("Add", [made, bias], name=f"{node.name}/bias" if node.name else None)
    new, out = [added], node.outputs[0]
    if len(node.inputs) > 2:
        added.outputs[0].name = f"{out.name}/bias"
        added.outputs[0].type = out.type
        new.append(ir.node("Sum", [added.outputs[0], *node.inputs[2:]], name=node.name))
    irc.replace_nodes_and_values(graph, node, [node], new, [out], [new[-1].outputs[0]])


def _named_apart(products: Sequence[ir.Node], others: Sequence[ir.Node]) -> None:
    taken = {n.name for n in others}
    for number, node in enumerate(products):
        if not node.name or node.name in taken:
            name = f"product_{number}"
            while name in taken:
                name += "_"
            node.name = name
        taken.add(node.name)
