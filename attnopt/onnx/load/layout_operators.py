"""ONNX layout operators, on tensors and on values known during tracing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.onnx.load.values import LARGEST, Value, is_known, known, numbers, tensor

Attributes = Mapping[str, Any]
Operator = Callable[..., Value]  # (attributes, *inputs), an input that is left out being None


def torch_dtype(kind: object) -> torch.dtype:
    """torch's name for a type of numpy."""
    made: torch.dtype = getattr(torch, str(kind))
    return made


def _shape(a: Attributes, x: Value) -> Value:
    return known(x.shape[a.get("start", 0) : a.get("end")])


def _size(_: Attributes, x: Value) -> Value:
    return known([x.numel() if isinstance(x, Tensor) else x.size]).reshape(())


def _reshape(a: Attributes, x: Value, shape: Value) -> Value:
    wanted = numbers(shape)
    if not a.get("allowzero"):
        wanted = [x.shape[i] if isinstance(n, int) and n == 0 else n for i, n in enumerate(wanted)]
    return x.reshape(wanted)


def _transpose(a: Attributes, x: Value) -> Value:
    axes = a.get("perm") or list(reversed(range(x.ndim)))
    return x.permute(axes) if isinstance(x, Tensor) else x.transpose(axes)


def _unsqueeze(a: Attributes, x: Value, axes: Value | None = None) -> Value:
    given = numbers(axes) if axes is not None else a["axes"]
    rank = x.ndim + len(given)
    for axis in sorted(n % rank for n in given):
        x = x.unsqueeze(axis) if isinstance(x, Tensor) else np.expand_dims(x, axis)
    return x


def _squeeze(a: Attributes, x: Value, axes: Value | None = None) -> Value:
    given = numbers(axes) if axes is not None else a.get("axes")
    given = [i for i, n in enumerate(x.shape) if n == 1] if given is None else [n % x.ndim for n in given]
    return x.squeeze(given) if isinstance(x, Tensor) else np.squeeze(x, tuple(given))


def _flatten(a: Attributes, x: Value) -> Value:
    x, axis = tensor(x), a.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _concat(a: Attributes, *inputs: Value) -> Value:
    if all(map(is_known, inputs)):
        return np.concatenate([np.asarray(x) for x in inputs], a["axis"])
    return torch.cat([tensor(x) for x in inputs], a["axis"])


def split(a: Attributes, outputs: int, x: Value, sizes: Value | None = None) -> Sequence[Value]:
    """The one operator with several outputs."""
    axis = a.get("axis", 0)
    given = numbers(sizes) if sizes is not None else a.get("split")
    if given is None:
        count = a.get("num_outputs", outputs)
        step = -(-x.shape[axis] // count)
        given = [step] * (count - 1) + [x.shape[axis] - step * (count - 1)]
    if isinstance(x, Tensor):
        return torch.split(x, given, axis)
    return np.split(x, np.cumsum(given)[:-1], axis)


def _slice(a: Attributes, x: Value, *given: Value) -> Value:
    if given:
        starts, ends, *rest = map(numbers, given)
        axes = rest[0] if rest else list(range(len(starts)))
        steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    else:
        starts, ends = a["starts"], a["ends"]
        axes, steps = a.get("axes", list(range(len(starts)))), [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step <= 0 and isinstance(x, Tensor):
            raise NotImplementedError("a step backwards")
        index = [slice(None)] * x.ndim
        index[axis] = slice(start, None if isinstance(end, int) and end > 2**31 - 2 else end, step)
        x = x[tuple(index)]
    return x


def _gather(a: Attributes, x: Value, index: Value) -> Value:
    axis = a.get("axis", 0)
    if isinstance(x, np.ndarray) and isinstance(index, np.ndarray):
        return np.asarray(np.take(x, index.astype(np.int64), axis))
    x = tensor(x)
    if isinstance(index, np.ndarray) and index.size == 1 and index.dtype != object:
        chosen = x.select(axis, int(index.item()))
        return chosen if index.ndim == 0 else chosen.unsqueeze(axis)
    at = tensor(index)
    at = torch.where(at < 0, at + x.shape[axis], at)  # counted from the end
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(at, x)
    flat = x.index_select(axis, at.reshape(-1))
    return flat.reshape(*x.shape[:axis], *at.shape, *x.shape[axis:][1:])


def _gather_nd(a: Attributes, x: Value, index: Value) -> Value:
    if a.get("batch_dims"):
        raise NotImplementedError("batch_dims")
    return tensor(x)[tensor(index).unbind(-1)]


def _expand(_: Attributes, x: Value, shape: Value) -> Value:
    x, wanted = tensor(x), numbers(shape)
    rank = max(x.dim(), len(wanted))
    here, there = [1] * (rank - x.dim()) + list(x.shape), [1] * (rank - len(wanted)) + wanted
    return x.expand([b if a == 1 else a for a, b in zip(here, there, strict=True)])


def _tile(_: Attributes, x: Value, repeats: Value) -> Value:
    return tensor(x).repeat(numbers(repeats))


def _pad(
    a: Attributes, x: Value, pads: Value | None = None, value: Value | None = None, axes: Value | None = None
) -> Value:
    if a.get("mode", "constant") != "constant":
        raise NotImplementedError("padding with what is there")
    x, given = tensor(x), numbers(pads) if pads is not None else a["pads"]
    along = [n % x.dim() for n in numbers(axes)] if axes is not None else list(range(x.dim()))
    before, after = (dict(zip(along, half, strict=True)) for half in (given[: len(along)], given[len(along) :]))
    order = [side.get(axis, 0) for axis in reversed(range(x.dim())) for side in (before, after)]
    return F.pad(x, order, value=a.get("value", 0.0) if value is None else tensor(value).item())


def _scatter_elements(a: Attributes, x: Value, index: Value, updates: Value) -> Value:
    if a.get("reduction", "none") != "none":
        raise NotImplementedError("updates that are joined")
    x, at, axis = tensor(x), tensor(index), a.get("axis", 0)
    return x.scatter(axis, torch.where(at < 0, at + x.shape[axis], at), tensor(updates))


def _scatter_nd(a: Attributes, x: Value, index: Value, updates: Value) -> Value:
    if a.get("reduction", "none") not in ("none", "add"):
        raise NotImplementedError("updates that are joined")
    return tensor(x).index_put(tensor(index).unbind(-1), tensor(updates), accumulate=a.get("reduction") == "add")


def _filled(a: Attributes, shape: Value) -> Value:
    value = a["value"].reshape(-1)[0] if "value" in a else np.float32(0)
    sizes = numbers(shape)
    if len(sizes) <= 1 and value.dtype.kind == "i" and all(isinstance(n, int) and n <= LARGEST for n in sizes):
        return np.full(sizes, value)
    return torch.full(sizes, value.item(), dtype=torch_dtype(value.dtype))


def _range(_: Attributes, start: Value, end: Value, step: Value) -> Value:
    first, last, by = (numbers(x)[0] for x in (start, end, step))
    return torch.arange(first, last, by)


LAYOUT: dict[str, Operator] = {
    "Shape": _shape,
    "Size": _size,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Flatten": _flatten,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Pad": _pad,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Expand": _expand,
    "Tile": _tile,
    "ConstantOfShape": _filled,
    "Range": _range,
}
