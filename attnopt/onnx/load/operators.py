"""ONNX's operators in torch, as the specification words them (https://onnx.ai/onnx/operators)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.onnx.load.layout_operators import LAYOUT, Attributes, Operator, torch_dtype
from attnopt.onnx.load.values import Known, Value, is_known, numbers, operand, tensor

SAFE_SOFTMAX = "attnopt.SafeSoftmax"  # zeros for fully masked rows; not in any file


def _both(on_tensors: Callable[..., Any], on_known: Callable[..., Any] | None = None) -> Operator:
    """An elementwise operator of two or more inputs."""

    def run(_: Attributes, *inputs: Value) -> Value:
        if all(map(is_known, inputs)) and on_known is not None:
            return np.asarray(reduce(on_known, inputs))
        made: Value = reduce(lambda a, b: on_tensors(*_pair(a, b)), inputs)
        return made

    return run


def _pair(a: Value, b: Value) -> tuple[Any, Any]:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        left, right = operand(a, b), operand(b, a)
        return left, right
    return tensor(a), tensor(b)


def _one(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda _, x: function(tensor(x))


def _divide(a: Any, b: Any) -> Any:
    """Integers are divided as in C."""
    whole = not any((isinstance(x, Tensor) and x.is_floating_point()) or isinstance(x, float) for x in (a, b))
    return torch.div(a, b, rounding_mode="trunc") if whole else a / b


def _divide_known(a: Known, b: Known) -> Known:
    if "f" in (a.dtype.kind, b.dtype.kind):
        return a / b
    if not np.all(b):
        raise ZeroDivisionError("integers are divided by zero")  # which ends ONNX Runtime's process
    if "O" in (a.dtype.kind, b.dtype.kind):
        return a // b  # sizes, which are not negative
    return np.sign(a) * np.sign(b) * (abs(a) // abs(b))


def _remainder(a: Known, b: Known) -> Known:
    if not np.all(b):
        raise ZeroDivisionError("integers are divided by zero")
    return np.asarray(a % b)


def _power(_: Attributes, a: Value, b: Value) -> Value:
    if _is_float(a) and _is_float(b):
        return np.asarray(np.power(a, b))
    made: Tensor = torch.pow(*_pair(a, b))
    return made


def _root(_: Attributes, x: Value) -> Value:
    return np.asarray(np.sqrt(x)) if _is_float(x) else torch.sqrt(tensor(x))


def _is_float(x: Value) -> TypeGuard[Known]:
    """A known number that stays one: a scale may be the root of a head size."""
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def _where(_: Attributes, condition: Value, a: Value, b: Value) -> Value:
    if all(map(is_known, (condition, a, b))):
        return np.where(np.asarray(condition, bool), a, b)
    return torch.where(tensor(condition), tensor(a), tensor(b))


def _extreme(a: Attributes, function: Any, inputs: tuple[Value, ...]) -> Tensor:
    made: Tensor = reduce(function, (tensor(x) for x in inputs))
    return made


def _clip(a: Attributes, x: Value, low: Value | None = None, high: Value | None = None) -> Value:
    bounds: Any = [None if b is None else operand(b, x) for b in (low, high)]
    bounds = [a.get(name) if b is None else b for name, b in zip(("min", "max"), bounds, strict=True)]
    if bounds == [None, None]:
        return x
    made: Tensor = torch.clamp(tensor(x), *bounds)
    return made


def _cast(a: Attributes, x: Value) -> Value:
    import onnx

    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(a["to"]))
    if isinstance(x, Tensor):
        return x.to(torch_dtype(kind))
    if x.dtype == object:  # symbolic sizes
        return x if kind.kind == "i" else tensor(x).to(torch_dtype(kind))
    return x.astype(kind)


def _gelu(a: Attributes, x: Value) -> Value:
    return F.gelu(tensor(x), approximate=a.get("approximate", "none"))


def _gemm(a: Attributes, x: Value, w: Value, c: Value | None = None) -> Value:
    x, w = tensor(x), tensor(w)
    x, w = (x.mT if a.get("transA") else x), (w.mT if not a.get("transB") else w)
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    if c is not None and alpha == beta == 1.0 and tensor(c).dim() == 1:
        return F.linear(x, w, tensor(c))
    made: Tensor = F.linear(x, w) * alpha
    return made if c is None else made + beta * tensor(c)


def _matmul(_: Attributes, x: Value, y: Value) -> Value:
    return torch.matmul(tensor(x), tensor(y))


def _softmax(a: Attributes, x: Value) -> Value:
    return torch.softmax(tensor(x), a.get("axis", -1))


def _log_softmax(a: Attributes, x: Value) -> Value:
    return torch.log_softmax(tensor(x), a.get("axis", -1))


def _over_the_rest(function: Callable[..., Tensor]) -> Operator:
    """Before opset 13: over all axes from the given one on, flattened."""

    def run(a: Attributes, x: Value) -> Value:
        x = tensor(x)
        axis = a.get("axis", 1) % x.dim()
        return function(x, -1) if axis == x.dim() - 1 else function(x.flatten(axis), -1).reshape(x.shape)

    return run


def _safe_softmax(a: Attributes, x: Value) -> Value:
    made: Tensor = torch.ops.aten._safe_softmax.default(tensor(x), a.get("axis", -1))
    return made


def _layer_norm(a: Attributes, x: Value, scale: Value, bias: Value | None = None) -> Value:
    x, axis = tensor(x), a.get("axis", -1)
    shape = x.shape[axis:]
    return F.layer_norm(x, shape, tensor(scale), None if bias is None else tensor(bias), a.get("epsilon", 1e-5))


def rms_norm(a: Attributes, x: Value, weight: Value) -> Value:
    """In single precision at least, as ONNX Runtime computes it."""
    given, axis = tensor(x), a.get("axis", -1)
    wide = given.float()
    axes = list(range(axis % given.dim(), given.dim()))
    made = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + (a.get("epsilon") or 1e-5))
    return made.to(given.dtype) * tensor(weight)


def _lp_norm(a: Attributes, x: Value) -> Value:
    return F.normalize(tensor(x), p=a.get("p", 2), dim=a.get("axis", -1), eps=1e-30)


def _batch_norm(a: Attributes, x: Value, *given: Value) -> Value:
    if a.get("training_mode") or not a.get("spatial", 1):
        raise NotImplementedError("a normalization in training mode")
    scale, bias, mean, variance = map(tensor, given)
    epsilon = float(a["epsilon"]) if "epsilon" in a else 1e-5
    return F.batch_norm(tensor(x), mean.detach(), variance.detach(), scale, bias, False, 0.0, epsilon)


def _attention(a: Attributes, q: Value, k: Value, v: Value, mask: Value | None = None, *past: Value | None) -> Value:
    """Of opset 23, without a past: [B, H, L, D], or [B, L, H * D]."""
    if any(x is not None for x in past) or a.get("softcap") or (mask is not None and a.get("is_causal")):
        raise NotImplementedError("an attention with a past, a soft cap or two masks")
    operands = [tensor(x) for x in (q, k, v)]
    is_flat, heads = operands[0].dim() == 3, (a.get("q_num_heads", 1), *[a.get("kv_num_heads", 1)] * 2)
    if is_flat:
        operands = [x.reshape(*x.shape[:2], n, -1).transpose(1, 2) for x, n in zip(operands, heads, strict=True)]
    given = None if mask is None else tensor(mask)
    is_shared = operands[0].shape[1] != operands[1].shape[1]
    options = {"is_causal": bool(a.get("is_causal")), "scale": a.get("scale"), "enable_gqa": is_shared}
    made: Tensor = F.scaled_dot_product_attention(operands[0], operands[1], operands[2], given, **options)  # type: ignore[arg-type]
    return made.transpose(1, 2).flatten(2) if is_flat else made


def _hard_sigmoid(a: Attributes, x: Value) -> Value:
    made: Tensor = torch.clamp(tensor(x) * a.get("alpha", 0.2) + a.get("beta", 0.5), 0.0, 1.0)
    return made


def _hard_swish(_: Attributes, x: Value) -> Value:
    return tensor(x) * torch.clamp(tensor(x) / 6 + 0.5, 0.0, 1.0)


def _parametric_relu(_: Attributes, x: Value, slope: Value) -> Value:
    return torch.where(tensor(x) < 0, tensor(x) * tensor(slope), tensor(x))


def _mean(a: Attributes, *inputs: Value) -> Value:
    return tensor(OPERATORS["Sum"](a, *inputs)) / len(inputs)


def _mean_over_places(_: Attributes, x: Value) -> Value:
    x = tensor(x)
    return x.mean(list(range(2, x.dim())), keepdim=True)


def _conv(a: Attributes, x: Value, w: Value, b: Value | None = None) -> Value:
    x, w = tensor(x), tensor(w)
    axes = x.dim() - 2
    pads = a.get("pads", [0] * 2 * axes)
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or axes not in (1, 2, 3):
        raise NotImplementedError("this padding")
    if pads[:axes] != pads[axes:]:
        order = [p for i in reversed(range(axes)) for p in (pads[i], pads[axes + i])]
        x, pads = F.pad(x, order), [0] * 2 * axes
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    stride, dilation = a.get("strides", [1] * axes), a.get("dilations", [1] * axes)
    return convolve(x, w, None if b is None else tensor(b), stride, pads[:axes], dilation, a.get("group", 1))


def _keeps(a: Attributes) -> bool:
    return bool(a.get("keepdims", 1))


def _reduced(function: Callable[..., Tensor]) -> Operator:
    def run(a: Attributes, x: Value, axes: Value | None = None) -> Value:
        x = tensor(x)
        given = numbers(axes) if axes is not None else a.get("axes")
        if not given and a.get("noop_with_empty_axes"):
            return x
        return function(x, list(given or range(x.dim())), _keeps(a))

    return run


def _product(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((n % x.dim() for n in axes), reverse=True):
        x = x.prod(axis, keepdim)
    return x


def _reduced_product(a: Attributes, x: Value, *axes: Value) -> Value:
    """Of sizes, too: how many elements there are."""
    if isinstance(x, Tensor) or axes or a.get("axes", [0]) not in ([0], [-1]):
        return _reduced(_product)(a, x, *axes)
    return np.asarray(np.prod(x, keepdims=_keeps(a)))


def _trilu(a: Attributes, x: Value, k: Value | None = None) -> Value:
    diagonal = 0 if k is None else numbers(k)[0]
    return torch.triu(tensor(x), diagonal) if a.get("upper", 1) else torch.tril(tensor(x), diagonal)


def _cumsum(a: Attributes, x: Value, axis: Value) -> Value:
    if a.get("exclusive") or a.get("reverse"):
        raise NotImplementedError("an exclusive or reversed sum")
    return torch.cumsum(tensor(x), numbers(axis)[0])


def _as_it_is(_: Attributes, x: Value, *others: Any) -> Value:
    return x


OPERATORS: dict[str, Operator] = LAYOUT | {
    "Add": _both(operator.add, operator.add),
    "Sub": _both(operator.sub, operator.sub),
    "Mul": _both(operator.mul, operator.mul),
    "Div": _both(_divide, _divide_known),
    "Pow": _power,
    "Sum": _both(operator.add, operator.add),
    "Mod": lambda a, *x: _both(torch.fmod)(a, *x) if a.get("fmod") else _both(torch.remainder, _remainder)(a, *x),
    "Equal": _both(torch.eq, operator.eq),
    "Greater": _both(torch.gt),
    "Less": _both(torch.lt),
    "GreaterOrEqual": _both(torch.ge),
    "LessOrEqual": _both(torch.le),
    "And": _both(torch.logical_and),
    "Or": _both(torch.logical_or),
    "Xor": _both(torch.logical_xor),
    "Mean": _mean,
    "Max": lambda a, *x: _extreme(a, torch.maximum, x),
    "Min": lambda a, *x: _extreme(a, torch.minimum, x),
    "Where": _where,
    "Clip": _clip,
    "Cast": _cast,
    "Gelu": _gelu,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "Softmax-1": _over_the_rest(torch.softmax),
    "LogSoftmax-1": _over_the_rest(torch.log_softmax),
    "BatchNormalization": _batch_norm,
    "Attention": _attention,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Elu": lambda a, x: F.elu(tensor(x), a.get("alpha", 1.0)),
    "Celu": lambda a, x: F.celu(tensor(x), a.get("alpha", 1.0)),
    "LeakyRelu": lambda a, x: F.leaky_relu(tensor(x), a.get("alpha", 0.01)),
    "PRelu": _parametric_relu,
    "GlobalAveragePool": _mean_over_places,
    SAFE_SOFTMAX: _safe_softmax,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": lambda a, *xs: torch.einsum(a["equation"], *map(tensor, xs)),
    "Conv": _conv,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": rms_norm,
    "LpNormalization": _lp_norm,
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMin": _reduced(torch.amin),
    "ReduceProd": _reduced_product,
    "ReduceL1": _reduced(lambda x, *over: x.abs().sum(*over)),
    "ReduceL2": _reduced(lambda x, *over: x.square().sum(*over).sqrt()),
    "ReduceSumSquare": _reduced(lambda x, *over: x.square().sum(*over)),
    "ReduceLogSum": _reduced(lambda x, *over: x.sum(*over).log()),
    "ReduceLogSumExp": _reduced(torch.logsumexp),
    "GatherElements": lambda a, x, i: torch.gather(tensor(x), a.get("axis", 0), tensor(i)),
    "Trilu": _trilu,
    "CumSum": _cumsum,
    "Identity": _as_it_is,
    "Dropout": _as_it_is,
    "Not": _one(torch.logical_not),
    "Neg": lambda _, x: -x,
    "Abs": _one(torch.abs),
    "Exp": _one(torch.exp),
    "Log": _one(torch.log),
    "Sqrt": _root,
    "Reciprocal": _one(torch.reciprocal),
    "Erf": _one(torch.erf),
    "Tanh": _one(torch.tanh),
    "Sigmoid": _one(torch.sigmoid),
    "Relu": _one(torch.relu),
    "Softplus": _one(F.softplus),
    "Softsign": _one(F.softsign),
    "Mish": _one(F.mish),
    "Sign": _one(torch.sign),
    "Floor": _one(torch.floor),
    "Ceil": _one(torch.ceil),
    "Round": _one(torch.round),
    "Sin": _one(torch.sin),
    "Cos": _one(torch.cos),
    "IsNaN": _one(torch.isnan),
}
_CHANGED = {"Softmax": 13, "LogSoftmax": 13}  # the opset since which their semantics are unchanged


def meant(kind: str, opset: int) -> str:
    """The name in ``OPERATORS`` for ``kind`` in this opset."""
    return f"{kind}-1" if opset < _CHANGED.get(kind, 0) else kind
