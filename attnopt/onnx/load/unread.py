"""Unsupported nodes of a file, and the interface of their groups in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attnopt.base.ort_session import cpu_session
from attnopt.errors import CaptureError
from attnopt.onnx.load.error_text import quoted
from attnopt.onnx.load.fused_operators import FUSED, kind_of
from attnopt.onnx.load.grouping import Group, between, groups, used_by
from attnopt.onnx.load.layout_operators import torch_dtype
from attnopt.onnx.load.module import Unread
from attnopt.onnx.load.operators import OPERATORS, SAFE_SOFTMAX
from attnopt.onnx.load.sizes import UNKNOWN, Sized, names, number
from attnopt.onnx.load.source import Source
from attnopt.onnx.load.values import Known

if TYPE_CHECKING:
    import onnx
    from onnxruntime import InferenceSession

READ = {*(k for k in OPERATORS if k != SAFE_SOFTMAX and "-" not in k), "Split", "Constant"}
ROUNDS = 12  # users of a value-dependent size become unsupported, and so on

Feed = Mapping[str, Known]


def never_read(source: Source) -> set[int]:
    """The nodes with operators, outputs or types that have no form in torch."""
    types = _types(source)
    used = {name for node in source.nodes for name in used_by(node)} | set(source.outputs)
    return {
        i
        for i, node in enumerate(source.nodes)
        if not (source.opens_fused and _is_fused(node, types)) and _is_unread(node, types, used)
    }


def _is_fused(node: onnx.NodeProto, types: Mapping[str, int]) -> bool:
    return kind_of(node.domain, node.op_type) in FUSED and _has_plain_types(node, types)


def _is_unread(node: onnx.NodeProto, types: Mapping[str, int], used: Collection[str]) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type not in READ:
        return True
    if node.op_type != "Split" and any(name in used for name in node.output[1:]):
        return True
    if node.op_type == "Constant" and node.attribute[0].name not in _PLAIN:
        return True
    return not _has_plain_types(node, types)


def _has_plain_types(node: onnx.NodeProto, types: Mapping[str, int]) -> bool:
    return all(types.get(name, 1) in _tensors() for name in (*node.input, *node.output) if name)


_PLAIN = ("value", "value_float", "value_floats", "value_int", "value_ints")


def _tensors() -> frozenset[int]:
    """The types of elements that ONNX, numpy and torch have alike."""
    from onnx import TensorProto as T

    return frozenset(
        (T.FLOAT, T.UINT8, T.INT8, T.UINT16, T.INT16, T.INT32, T.INT64, T.BOOL, T.FLOAT16, T.DOUBLE, T.UINT32, T.UINT64)
    )


def is_half(source: Source) -> bool:
    """The file computes in float16 somewhere."""
    from onnx import TensorProto

    return TensorProto.FLOAT16 in _types(source).values()


def rounds(source: Source) -> bool:
    """The file rounds activations to few bits: a difference that rounding makes may come out as a whole step, and grow."""
    kinds = {node.op_type for node in source.nodes}
    return any(k.startswith("DynamicQuantize") or k == "QuantizeLinear" for k in kinds)


def _types(source: Source) -> dict[str, int]:
    """The known element type of each value; -1 for non-tensors."""
    import onnx

    graph = source.model.graph
    found: dict[str, int] = {t.name: t.data_type for t in graph.initializer}
    light = onnx.ModelProto()
    light.CopyFrom(source.stored if not source.stored.functions else source.model)
    try:
        inferred = onnx.shape_inference.infer_shapes(light).graph if light.ByteSize() < 2**31 else light.graph
    except Exception:
        inferred = light.graph
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        is_tensor = value.type.HasField("tensor_type")
        if is_tensor and value.type.tensor_type.elem_type:
            found.setdefault(value.name, value.type.tensor_type.elem_type)
        elif value.type.WhichOneof("value") not in (None, "tensor_type"):
            found[value.name] = -1
    return found


@dataclass(frozen=True)
class Runs:
    """The file in ONNX Runtime on inputs of several sizes.  ``feeds[0]`` is the example."""

    source: Source
    feeds: tuple[Feed, ...]

    @classmethod
    def of(cls, source: Source, feed: Feed) -> Runs:
        """At the sizes of the example and, if the file runs there, at two others, with other values."""
        made = cls(source, (feed,))
        others: list[Feed] = []
        for sizes in _other_sizes(source, feed):
            resized = _resized(source, feed, sizes)
            try:
                made._run(resized, [])
            except Exception:
                continue
            others.append(resized)
            if len(others) == 2:
                break
        return cls(source, (feed, *others))

    @property
    def is_varied(self) -> bool:
        return len(self.feeds) > 1 or not self.source.free

    def values(self, wanted: Sequence[str]) -> list[dict[str, Known]]:
        """The values of these names in each run."""
        return [dict(zip(wanted, self._run(feed, wanted), strict=True)) for feed in self.feeds]

    def example(self, wanted: Sequence[str]) -> dict[str, Known]:
        """The values in the first run."""
        return Runs(self.source, self.feeds[:1]).values(wanted)[0]

    def _run(self, feed: Feed, wanted: Sequence[str]) -> list[Known]:
        given = [n for n in wanted if n in feed]
        made = [n for n in dict.fromkeys(wanted) if n not in feed]
        found = dict(zip(made, _session(self.source, made).run(made or None, dict(feed)), strict=bool(made)))
        return [feed[n] if n in given else found[n] for n in wanted]


def _session(source: Source, wanted: Sequence[str]) -> InferenceSession:
    """The file with these values as further outputs."""
    import onnx

    base = source.stored if not source.stored.functions else source.model
    model = onnx.ModelProto()
    model.CopyFrom(base)
    there = {o.name for o in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in there)
    return cpu_session(model.SerializeToString(), folder=source.path.resolve().parent, exact=True)


def _other_sizes(source: Source, feed: Feed) -> Iterator[list[int]]:
    """Sizes of the free axes: equal for the same name, otherwise distinct."""
    labels = [name or f"{i} {axis}" for i, axis, name in source.free]
    different = list(dict.fromkeys(labels))
    here = [np.shape(feed[i])[axis] for i, axis, _ in source.free]
    ways: tuple[Callable[[int, int], int], ...] = (
        lambda n, k: n * (k + 2),
        lambda n, k: n + 3 * k + 1,
        lambda n, k: n * (2 * k + 3),
        lambda n, _: n + 1,
        lambda n, _: n,
    )
    for way in ways:
        yield [way(n, different.index(label)) for n, label in zip(here, labels, strict=True)]


def repeated(source: Source, feed: Feed, sizes: Sequence[int]) -> dict[str, Known]:
    """The example repeated or cut along the free axes."""
    made = {name: np.asarray(x) for name, x in feed.items()}
    for (name, axis, _), size in zip(source.free, sizes, strict=True):
        x = made[name]
        if x.shape[axis] not in (0, size):
            made[name] = np.take(x, np.arange(size) % x.shape[axis], axis)
    return made


def _resized(source: Source, feed: Feed, sizes: Sequence[int]) -> dict[str, Known]:
    """The example at these sizes with other values."""
    made = repeated(source, feed, sizes)
    return {name: (x * np.asarray(1.25, x.dtype) if x.dtype.kind == "f" else x) for name, x in made.items()}


def as_models(source: Source, unread: set[int], runs: Runs) -> tuple[list[Unread], set[int]]:
    """The unsupported nodes in groups, including the users of value-dependent sizes."""
    types = _types(source)
    for _ in range(ROUNDS):
        made = groups(source.nodes, unread - set(_constants(source)), source.constants, source.outputs)
        hidden = {
            i
            for g in made
            for n in g.outputs
            if types.get(n, 1) not in _tensors()
            for i in between(source.nodes, g.nodes, n)
        }
        if hidden <= unread:
            found = [_as_model(source, g, runs) for g in made]
            loose = {n for u in found for n, text in zip(u.outputs, u.sized, strict=True) if UNKNOWN in text}
            readers = {i for i, node in enumerate(source.nodes) if loose & set(used_by(node))}
            if readers <= unread:
                return found, unread
            hidden = readers
        unread = unread | hidden
    raise CaptureError(f"{source.path}: value-dependent sizes affect the whole graph")


def _constants(source: Source) -> list[int]:
    return [i for i, n in enumerate(source.nodes) if n.output and n.output[0] in source.constant_nodes]


def _as_model(source: Source, group: Group, runs: Runs) -> Unread:
    import onnx

    wanted = (*group.inputs, *group.outputs)
    values = runs.values(wanted)
    for name in wanted:
        if not all(isinstance(v[name], np.ndarray) and v[name].dtype.kind in "fiub" for v in values):
            raise CaptureError(f"{source.path}: {quoted(name)} is not a numeric tensor")
    graph = onnx.GraphProto(name="nodes")
    reads = {n for i in group.nodes for n in used_by(source.nodes[i])}
    graph.node.extend(source.constant_nodes[n] for n in sorted(reads & source.constant_nodes.keys()))
    graph.node.extend(source.nodes[i] for i in group.nodes)
    graph.initializer.extend(source.weights[n] for n in sorted(reads & source.weights.keys()))
    first = values[0]
    graph.input.extend(_declared(n, first[n], [None] * first[n].ndim) for n in group.inputs)
    graph.output.extend(_declared(n, first[n], [None] * first[n].ndim) for n in group.outputs)
    model = onnx.ModelProto(ir_version=source.model.ir_version, graph=graph)
    model.opset_import.extend(source.model.opset_import)
    model.functions.extend(source.model.functions)
    sized = _sized(source, group, model, values, runs)
    return Unread(group.nodes, model.SerializeToString(), group.inputs, group.outputs, tuple(map(str, sized)))


def _declared(name: str, array: Known, sizes: Sequence[str | int | None]) -> onnx.ValueInfoProto:
    import onnx

    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, list(sizes))


# ---------------------------------------------------------------- sizes
def _sized(
    source: Source, group: Group, model: onnx.ModelProto, values: Sequence[Mapping[str, Known]], runs: Runs
) -> list[Sized]:
    """Each output's sizes in terms of the inputs': as ONNX Runtime's tool infers them, or as all runs have them."""
    shapes = [[list(v[n].shape) for n in group.inputs] for v in values]
    known = [
        {f"x{i}_{a}": n for i, shape in enumerate(shapes[k]) for a, n in enumerate(shape)}
        | {f"d{i}": np.shape(feed[name])[axis] for i, (name, axis, _) in enumerate(source.free)}
        for k, feed in enumerate(runs.feeds)
    ]
    inferred = _inferred(model, group, known, runs)
    found = []
    for name in group.outputs:
        first = values[0][name]
        said = inferred.get(name)
        said = said if said is not None and len(said) == first.ndim else [UNKNOWN] * first.ndim
        is_steady = all(v[name].ndim == first.ndim for v in values)
        sizes = [
            _size(said[a], [v[name].shape[a] for v in values], known, runs) if is_steady else UNKNOWN
            for a in range(first.ndim)
        ]
        found.append(Sized(torch_dtype(first.dtype), tuple(sizes)))
    return found


def _size(said: str, sizes: Sequence[int], known: Sequence[Mapping[str, int]], runs: Runs) -> str:
    """The inferred shape if it holds in every run; otherwise what all runs agree on, if sizes varied."""
    if names(said) <= known[0].keys() and _holds(said, sizes, known):
        return said
    if not runs.is_varied:
        return UNKNOWN
    if len(set(sizes)) == 1:
        return str(sizes[0])
    return next((name for name in sorted(known[0], key=_free_first) if _holds(name, sizes, known)), UNKNOWN)


def _free_first(name: str) -> tuple[bool, str]:
    return not name.startswith("d"), name


def _holds(text: str, sizes: Sequence[int], known: Sequence[Mapping[str, int]]) -> bool:
    try:
        return all(number(text, k) == n for k, n in zip(known, sizes, strict=True))
    except (ValueError, KeyError, SyntaxError, RecursionError):
        return False


def _inferred(
    model: onnx.ModelProto, group: Group, known: Sequence[Mapping[str, int]], runs: Runs
) -> dict[str, list[str]]:
    """Sizes of the group's outputs, its inputs' having names: one name for axes that are the same in every run."""
    import onnx

    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    first: dict[tuple[int, ...], str] = {}
    for i, value in enumerate(asked.graph.input):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            name = f"x{i}_{axis}"
            sizes = tuple(k[name] for k in known)
            if runs.is_varied and len(set(sizes)) == 1:
                dim.dim_value = sizes[0]
            else:
                dim.dim_param = first.setdefault(sizes, name) if runs.is_varied else name
    for value in asked.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

        # Its own driver writes files into the working directory if a size is unknown.
        tool = SymbolicShapeInference(int_max=2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0)
        tool._preprocess(asked)
        while tool.run_:
            tool._infer_impl()
        tool._update_output_from_vi()
        inferred = tool.out_mp_
    except Exception:
        return {}
    found = {}
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            found[value.name] = [
                d.dim_param or (str(d.dim_value) if d.HasField("dim_value") else UNKNOWN) for d in dims
            ]
    return found
