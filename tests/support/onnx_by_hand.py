"""ONNX files as people have them, made by hand: odd names, old opsets, operators that are not read, packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

DIM, HEADS = 32, 4
Weights = dict[str, Any]


class Parts:
    """Nodes and weights of a graph in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: Weights = {}
        self.random = np.random.default_rng(0)

    def node(self, kind: str, inputs: Sequence[str], output: str, **options: Any) -> str:
        self.nodes.append(
            helper.make_node(kind, list(inputs), [output], options.pop("name", f"{output}/{kind}"), **options)
        )
        return output

    def weight(self, name: str, *shape: int) -> str:
        self.weights[name] = (self.random.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)
        return name

    def constant(self, name: str, value: Any) -> str:
        self.weights[name] = np.asarray(value)
        return name

    def linear(self, x: str, name: str, packing: str = "") -> str:
        """``x`` times a weight plus a bias; ``packing``: how the weight is stored."""
        product = self.node("MatMul", [x, packed(self, f"{name}.weight", packing)], f"{name}_m")
        return self.node("Add", [product, self.weight(f"{name}.bias", DIM)], f"{name}_o")

    def attention(self, name: str, x: str, bias: str | None = None, packing: str = "") -> str:
        heads = self.constant(f"{name}/heads", [0, 0, HEADS, DIM // HEADS])
        laid: dict[str, str] = {}
        for role in "qkv":
            split = self.node("Reshape", [self.linear(x, f"{name}/{role}", packing), heads], f"{name}/{role}_r")
            laid[role] = self.node(
                "Transpose", [split], f"{name}/{role}_t", perm=[0, 2, 3, 1] if role == "k" else [0, 2, 1, 3]
            )
        scores = self.node("MatMul", [laid["q"], laid["k"]], f"{name}/scores")
        scores = self.node("Mul", [scores, self.constant(f"{name}/scale", np.float32(8**-0.5))], f"{name}/scaled")
        if bias is not None:
            scores = self.node("Add", [scores, bias], f"{name}/masked")
        weights = self.node("Softmax", [scores], f"{name}/weights", axis=3)
        context = self.node("MatMul", [weights, laid["v"]], f"{name}/context")
        context = self.node("Transpose", [context], f"{name}/by_token", perm=[0, 2, 1, 3])
        flat = self.node("Reshape", [context, self.constant(f"{name}/flat", [0, 0, DIM])], f"{name}/joined")
        return self.linear(flat, f"{name}/o", packing)

    def save(
        self,
        path: Path,
        inputs: dict[str, list[Any]],
        outputs: dict[str, Any],
        opset: int = 13,
        ir: int = 8,
        types: Any = None,
    ) -> Path:
        kinds = types or {}

        def declared(sizes: dict[str, Any]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, s in sizes.items()]

        stored = [
            x if isinstance(x, onnx.TensorProto) else numpy_helper.from_array(x, n) for n, x in self.weights.items()
        ]
        graph = helper.make_graph(self.nodes, "by hand", declared(inputs), declared(outputs), stored)
        domains = sorted({n.domain for n in self.nodes if n.domain})
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=ir, producer_name="by hand", doc_string="a file"
        )
        model.metadata_props.add(key="author", value="somebody")
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
        return path


def packed(parts: Parts, name: str, packing: str) -> str:
    """A weight [DIM, DIM]: as it is, or as int8 behind the nodes that people write."""
    weight = parts.weights[parts.weight(name, DIM, DIM)]
    if not packing:
        return name
    del parts.weights[name]
    axis = 0 if packing.endswith("by row") else 1
    scale = np.abs(weight).max(axis=None if packing.endswith("per tensor") else 1 - axis) / np.float32(127)
    whole = scale if scale.ndim == 0 else np.expand_dims(scale, 1 - axis)
    stored = parts.constant(f"{name}_quantized", np.round(weight / whole).astype(np.int8))
    if packing.startswith("cast"):
        cast = parts.node("Cast", [stored], f"{name}_cast", to=TensorProto.FLOAT)
        return parts.node("Mul", [cast, parts.constant(f"{name}_scale", whole.astype(np.float32))], f"{name}_whole")
    options = {} if scale.ndim == 0 else {"axis": axis}
    scales = parts.constant(f"{name}_scale", scale.astype(np.float32))
    zeros = parts.constant(f"{name}_zero", np.zeros(scale.shape, np.int8))
    return parts.node("DequantizeLinear", [stored, scales, zeros], f"{name}_whole", **options)


def in_runtime(path: Path, *inputs: Tensor) -> list[Tensor]:
    """As the file says: by itself ONNX Runtime joins quantized operators into others, which round otherwise."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(np.asarray(o)) for o in session.run(None, feed)]


# ---------------------------------------------------------------- files
def contrib(path: Path) -> Path:
    """Operators of ONNX Runtime between two attentions, names that Python has no like of."""
    p = Parts()
    gelu = p.node("Gelu", [p.attention("layer.0/attn", "InputIds:0")], "lambda", domain="com.microsoft")
    scale, bias = p.constant("ln.w", np.ones(DIM, np.float32)), p.weight("ln.b", DIM)
    skip = p.node(
        "SkipLayerNormalization", [gelu, "InputIds:0", scale, bias], "skip", domain="com.microsoft", epsilon=1e-5
    )
    out = p.attention("layer.1/attn", skip)
    p.node("FusedMatMul", [out, p.weight("head", DIM, 8)], "class", domain="com.microsoft", alpha=0.5)
    p.node("Identity", [skip], "A.b/c:0")
    free = ["Batch Size", "seq-len"]
    return p.save(path, {"InputIds:0": [*free, DIM]}, {"class": [*free, 8], "A.b/c:0": [*free, DIM]})


def control(path: Path) -> Path:
    """A branch and a loop between two attentions, and an output whose size depends on values."""
    p = Parts()
    first = p.attention("a", "x")
    total = p.node("ReduceSum", ["x"], "total", keepdims=0)
    positive = p.node("Greater", [total, p.constant("zero", np.float32(0))], "positive")
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("then", "else", "v", "w")]
    ways = [
        helper.make_graph([helper.make_node("Mul", [first, first], ["then"])], "t", [], [value[0]]),
        helper.make_graph([helper.make_node("Neg", [first], ["else"])], "e", [], [value[1]]),
    ]
    either = p.node("If", [positive], "either", then_branch=ways[0], else_branch=ways[1])
    going = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("go", "gone")]
    turn = helper.make_tensor_value_info("turn", TensorProto.INT64, [])
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["gone"]),
            helper.make_node("Tanh", ["v"], ["t"]),
            helper.make_node("Add", ["t", "x"], ["w"]),
        ],
        "body",
        [turn, going[0], value[2]],
        [going[1], value[3]],
    )
    looped = p.node("Loop", [p.constant("three", 3), p.constant("true", True), either], "looped", body=body)
    last = p.attention("b", looped)
    p.node("Transpose", [p.node("NonZero", [last], "places")], "rows")
    return p.save(
        path,
        {"x": ["batch", "tokens", DIM]},
        {"rows": [None, 3], last: ["batch", "tokens", DIM]},
        types={"rows": TensorProto.INT64},
    )


def recurrent(path: Path) -> Path:
    """An LSTM before an attention, in opset 11; inputs and outputs named by words of Python."""
    p = Parts()
    steps = p.node("Transpose", ["from"], "steps", perm=[1, 0, 2])
    weights = [p.weight(n, 1, 4 * DIM, DIM) for n in ("w", "r")]
    hidden = p.node("LSTM", [steps, *weights], "hidden", hidden_size=DIM)
    back = p.node("Transpose", [p.node("Squeeze", [hidden], "one", axes=[1])], "back", perm=[1, 0, 2])
    p.node("Mul", [p.attention("enc", back, "bias"), "from"], "import")
    return p.save(
        path, {"from": ["N", "T", DIM], "bias": ["N", 1, 1, "T"]}, {"import": ["N", "T", DIM]}, opset=11, ir=6
    )


def plain(
    path: Path, opset: int = 13, packing: str = "", sizes: Sequence[Any] = ("b", "t"), masked: bool = False
) -> Path:
    """One attention and nothing else."""
    p = Parts()
    out = p.attention("a", "x", "bias" if masked else None, packing)
    inputs: dict[str, Any] = {"x": [*sizes, DIM]} | ({"bias": [sizes[0], 1, 1, sizes[1]]} if masked else {})
    return p.save(path, inputs, {out: [*sizes, DIM]}, opset=opset, ir=8 if opset > 9 else 4)
