"""ONNX files as older exporters write them, and files of single operators."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

SHAPES = {"ids": {0: "batch", 1: "length"}, "padding": {0: "batch", 1: "length"}}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (f(x).view(B, L, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / 8**0.5 + mask).softmax(-1)
        x = self.norm(x + self.o((weights @ v).transpose(1, 2).reshape(B, L, 32)))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Layer() for _ in "ab")

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        mask = (1.0 - padding[:, None, None, :].float()) * -1e9
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval()


def inputs(batch: int = 2, length: int = 10) -> dict[str, Tensor]:
    padding = torch.ones(batch, length, dtype=torch.long)
    padding[0, -2:] = 0
    return {"ids": torch.randint(0, 50, (batch, length)), "padding": padding}


def written(path: Path, is_new: bool = False, opset: int = 14) -> Path:
    """By torch's present exporter or by the one before it."""
    x = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"dynamic_shapes": {n: dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for n in x}} if is_new else {}
        older = {} if is_new else {"dynamic_axes": SHAPES, "input_names": list(x), "output_names": ["hidden"]}
        model = encoder()
        torch.onnx.export(
            model, tuple(x.values()), str(path), dynamo=is_new, opset_version=opset, verbose=False, **axes, **older
        )
    return path


# ---------------------------------------------------------------- single operators
def graph(nodes: list[Any], given: dict[str, list[Any]], constants: dict[str, Any], opset: int = 17) -> Any:
    sizes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in given.items()]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "g", sizes, out, stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


f32 = np.float32


CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "integers are divided towards zero": (["Cast:to=7", "Div:c", "Cast:to=1"], {"c": np.array([3, -2, 5, 7])}),
    "the sign of a remainder": (["Mod:c,fmod=1"], {"c": np.array([2, -2, 0.3, 1], f32)}),
    "the sign of a whole remainder": (["Cast:to=7", "Mod:c", "Cast:to=1"], {"c": np.array([2, -2, 3, 1])}),
    "a constant of another rank": (["Add:c"], {"c": np.ones((1, 1, 1, 1), f32)}),
    "gather of negative places": (["Gather:c,axis=2"], {"c": np.array([-1, 0, 2])}),
    "gather of one place": (["Gather:c,axis=1"], {"c": np.array(-1)}),
    "slice to the end": (["Slice:s,e,a,t"], {"s": [1], "e": [2**63 - 1], "a": [-1], "t": [2]}),
    "expand both ways": (["Expand:c"], {"c": np.array([2, 1, 1, 4])}),
    "reduce without axes": (["ReduceMean:keepdims=0"], {}),
    "reduce without attributes": (["ReduceMean:"], {}),
    "sum over axes without attributes": (["ReduceSum:c"], {"c": np.array([1])}),
    "reduce over axes": (["ReduceSum:c,keepdims=0"], {"c": np.array([0, -1])}),
    "reshape keeps and fills": (["Reshape:c"], {"c": np.array([0, -1])}),
    "split without an axis": (["Split:c"], {"c": np.array([1, 1])}),
    "split in unequal parts": (["Split:c,axis=2"], {"c": np.array([1, 3])}),
    "clip from below": (["Clip:c"], {"c": np.array(0.1, f32)}),
    "softmax over tokens": (["Softmax:axis=1"], {}),
    "softmax without an axis": (["Softmax:"], {}),
    "power": (["Pow:c"], {"c": np.array(2.0, f32)}),
    "the lower triangle": (["Trilu:upper=0"], {}),
    "the upper triangle": (["Trilu:"], {}),
    "normalized over features": (
        ["Mul:s", "LayerNormalization:w"],
        {"s": np.array(1e-2, f32), "w": np.arange(4, dtype=f32)},
    ),
    "normalized over all but the batch": (
        ["LayerNormalization:w,b,axis=1"],
        {"w": np.ones((3, 4), f32), "b": np.ones((3, 4), f32)},
    ),
    "gather without an axis": (["Gather:c"], {"c": np.array([1, 0])}),
    "gather elements without an axis": (["GatherElements:c"], {"c": np.array([[[1, 0, 1, 0]]])}),
    "transposed without axes": (["Transpose:"], {}),
    "flattened": (["Flatten:axis=2"], {}),
    "flattened without an axis": (["Flatten:"], {}),
    "tiled": (["Tile:c"], {"c": np.array([1, 2, 1])}),
    "gemm with all options": (
        ["Reshape:s", "Gemm:w,b,alpha=0.5,beta=2.0,transB=1"],
        {"s": [-1, 4], "w": np.arange(12, dtype=f32).reshape(3, 4), "b": np.arange(3, dtype=f32)},
    ),
    "gemm without options": (["Reshape:s", "Gemm:w"], {"s": [-1, 4], "w": np.arange(12, dtype=f32).reshape(4, 3)}),
    "an einsum": (["Einsum:w,equation='b i d; f d -> b f i'"], {"w": np.arange(8, dtype=f32).reshape(2, 4)}),
    "an einsum that names no result": (["Einsum:w,equation='zid;df'"], {"w": np.arange(8, dtype=f32).reshape(4, 2)}),
    "an einsum over what is not named": (["Einsum:w,equation='...d;d->...'"], {"w": np.arange(4, dtype=f32)}),
    "an einsum of one": (["Einsum:equation='bij->jb'"], {}),
    "padded with a number": (["Pad:c,v"], {"c": np.array([0, 1, 0, 0, 0, 2]), "v": np.array(3.0, f32)}),
    "padded and cut": (["Pad:c"], {"c": np.array([1, 0, -1, 0, 2, 0])}),
    "written at places": (
        ["ScatterND:c,u"],
        {"c": np.array([[0, 1], [-1, 2]]), "u": np.arange(8, dtype=f32).reshape(2, 4)},
    ),
    "added at places": (
        ["ScatterND:c,u,reduction='add'"],
        {"c": np.array([[1], [1]]), "u": np.arange(24, dtype=f32).reshape(2, 3, 4)},
    ),
    "elements written": (
        ["ScatterElements:c,u,axis=2"],
        {"c": np.array([[[1, -1]]]), "u": np.array([[[5, 6]]], f32)},
    ),
    "elements written in the first axis": (
        ["ScatterElements:c,u"],
        {"c": np.array([[[1]]]), "u": np.array([[[5]]], f32)},
    ),
    "a norm": (["ReduceL2:axes=[-1]"], {}),
    "a norm of all": (["ReduceL2:keepdims=0"], {}),
    "absolute numbers summed": (["ReduceL1:axes=[1],keepdims=0"], {}),
    "squares summed": (["ReduceSumSquare:axes=[0;2]"], {}),
    "exponentials summed": (["ReduceLogSumExp:axes=[2]"], {}),
    "a sum's logarithm": (["Abs:", "ReduceLogSum:axes=[2]"], {}),
    "a product": (["ReduceProd:axes=[-1;0],keepdims=0"], {}),
    "a product of all": (["ReduceProd:"], {}),
    "of length one": (["LpNormalization:"], {}),
    "of absolute sum one": (["LpNormalization:axis=1,p=1"], {}),
    "zeros of length one": (["Mul:c", "LpNormalization:"], {"c": np.array(0, f32)}),
    "activations": (
        ["HardSwish:", "Elu:", "Celu:alpha=2.0", "LeakyRelu:", "Softplus:", "Softsign:", "Elu:alpha=0.5"],
        {},
    ),
    "a slope for each feature": (["PRelu:c"], {"c": np.array([0.1, 2, -1, 0], f32)}),
    "whole numbers": (
        ["Mul:c", "Round:", "Mul:c", "Round:", "Mul:c", "Floor:", "Mul:c", "Ceil:", "Sub:d", "Sign:"],
        {"c": np.array(1.5, f32), "d": np.array(1.0, f32)},
    ),
    "a mean of two": (["Mean:c"], {"c": np.arange(4, dtype=f32)}),
    "a convolution without attributes": (["Conv:w"], {"w": np.arange(18, dtype=f32).reshape(2, 3, 3)}),
    "a convolution with uneven padding": (
        ["Conv:w,pads=[2;0],strides=[2]"],
        {"w": np.arange(18, dtype=f32).reshape(2, 3, 3)},
    ),
}

NEWER: dict[str, tuple[list[Any], dict[str, Any]]] = {  # of opset 23
    "by the root of the mean square": (["RMSNormalization:w"], {"w": np.arange(4, dtype=f32)}),
    "by that of two axes": (["RMSNormalization:w,axis=1,epsilon=0.1"], {"w": np.ones((3, 4), f32)}),
    "an activation": (["Mish:"], {}),
    "padded along an axis": (["Pad:c,,a"], {"c": np.array([1, 2]), "a": np.array([-2])}),
    "lengths of rows": (["ReduceL2:c"], {"c": np.array([-1])}),
}


def chain(steps: list[str]) -> list[Any]:
    """``Kind:inputs,attributes``, each on what the one before it gave."""
    nodes, last = [], "x"
    for i, step in enumerate(steps):
        kind, _, rest = step.partition(":")
        rest, _, equation = rest.partition("equation=")
        parts = rest.removesuffix(",").split(",") if rest else []
        given = {"equation": eval(equation).replace(";", ",")} if equation else {}
        options = given | {k: eval(v.replace(";", ",")) for k, _, v in (p.partition("=") for p in parts if "=" in p)}
        out = "y" if i == len(steps) - 1 else f"h{i}"
        outputs = [out, "other"] if kind == "Split" else [out]
        nodes.append(helper.make_node(kind, [last, *(p for p in parts if "=" not in p)], outputs, f"n{i}", **options))
        last = out
    return nodes
