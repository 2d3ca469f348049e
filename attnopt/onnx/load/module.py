"""An ONNX graph as a torch module: supported nodes one by one, the others in ONNX Runtime."""

from __future__ import annotations

import ast
import inspect
import keyword
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from attnopt.graph.value_names import named
from attnopt.onnx.load.fuse_nodes import fused
from attnopt.onnx.load.fused_operators import FUSED, kind_of
from attnopt.onnx.load.grouping import in_order
from attnopt.onnx.load.layout_operators import split
from attnopt.onnx.load.operators import OPERATORS, meant
from attnopt.onnx.load.runtime_nodes import onnx_nodes
from attnopt.onnx.load.sizes import Size
from attnopt.onnx.load.source import Source
from attnopt.onnx.load.values import Known, Value, stays_known, tensor

if TYPE_CHECKING:
    import onnx


GROUP = -1  # the number of a step that is several nodes


@dataclass(frozen=True)
class Unread:
    """A group of nodes as a separate model: its bytes, its inputs and outputs, and their ``Sized``."""

    nodes: tuple[int, ...]
    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sized: tuple[str, ...]


class OnnxModule(nn.Module):
    """Called with the inputs of the file, by position or by name; returns its outputs by name.

    Weights keep their names.  ``source``: the file.
    """

    def __init__(
        self,
        source: Source,
        unread: Sequence[Unread] = (),
        derived: Mapping[str, Known] | None = None,
        skip: Collection[int] = (),
    ) -> None:
        import onnx

        super().__init__()
        self.source = source
        self._known: dict[str, Known] = {}
        self.places: dict[str, str] = {}  # of weights: name in the file -> name in this module
        self._steps: list[_Node | _Group] = []  # set before the weights, which may have the same names
        self.outputs = source.outputs
        self.inputs = arguments(source)
        self.derived = dict(derived or {})  # weights that the file stores in fewer bits
        apart = {i for group in unread for i in group.nodes} | set(skip)
        read = [(i, n) for i, n in enumerate(source.nodes) if i not in apart]
        wanted = {name for _, n in read for name in n.input} | set(self.outputs) | {n for g in unread for n in g.inputs}
        stored = {name: onnx.numpy_helper.to_array(t) for name, t in source.weights.items() if name in wanted}
        for name, array in (stored | {n: x for n, x in self.derived.items() if n in wanted}).items():
            self._store(name, array)
        nodes = fused([n for _, n in read], self._zeros(source))
        steps = [self._placed(node, number) for (number, _), node in zip(read, nodes, strict=True)]
        self._steps = in_order([*steps, *(self._grouped(g) for g in unread)], lambda s: s.inputs, lambda s: s.outputs)

    @property
    def file(self) -> str:
        return str(self.source.path)

    @property
    def free(self) -> dict[str, list[int]]:
        """By the arguments of ``forward``."""
        found: dict[str, list[int]] = {}
        for name, axis, _ in self.source.free:
            found.setdefault(self.inputs[name], []).append(axis)
        return found

    def _zeros(self, source: Source) -> frozenset[str]:
        """The constants that are one 0."""
        found = dict(self._known)
        for name, node in source.constant_nodes.items():
            found[name] = next(iter(_Node(node, source.opset).attributes.values()))
        return frozenset(n for n, a in found.items() if getattr(a, "size", 0) == 1 and not a.any())

    def _store(self, name: str, array: Known) -> None:
        if stays_known(array):
            self._known[name] = array
            return
        *path, last = map(_attribute_name, name.split("."))
        owner, place = self._folder(path)
        while hasattr(owner, last):
            last += "_"
        weight = torch.from_numpy(array.copy())
        if weight.is_floating_point():
            owner.register_parameter(last, nn.Parameter(weight))
        else:
            owner.register_buffer(last, weight)
        self.places[name] = ".".join((*place, last))

    def _placed(self, node: onnx.NodeProto, number: int) -> _Node:
        """The node as a module under the path in its name, which gives a site its name."""
        made = _Node(node, self.source.opset, number, self.source.opens_fused)
        owner, _ = self._folder(map(_attribute_name, _scope(node)))
        owner.add_module(f"node{number}", made)
        return made

    def _grouped(self, unread: Unread) -> _Group:
        made = _Group(unread)
        owner, _ = self._folder(map(_attribute_name, _scope(self.source.nodes[unread.nodes[0]])))
        owner.add_module(f"nodes{unread.nodes[0]}", made)
        return made

    def _folder(self, path: Iterable[str]) -> tuple[nn.Module, list[str]]:
        owner: nn.Module = self
        place: list[str] = []
        for part in path:
            while hasattr(owner, part) and type(getattr(owner, part)) is not nn.Module:
                part += "_"
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
            place.append(part)
        return owner, place

    @property
    def signature(self) -> inspect.Signature:
        """Of the file: without what a policy adds."""
        return signature_of(self.source)

    @property
    def inner_names(self) -> frozenset[str]:
        """Names of the file that are no inputs of a caller."""
        return self.source.names - self.inputs.keys()

    def given(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """The values before any node runs: inputs and stored tensors."""
        values: dict[str, Value] = {**self._known, **{name: inputs[said] for name, said in self.inputs.items()}}
        for name, place in self.places.items():
            owner, _, last = place.rpartition(".")
            values[name] = getattr(self.get_submodule(owner), last)
        return values

    def values(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """Every value of the graph, by its name in the file."""
        values = self.given(inputs)
        sizes = self.free_sizes(inputs)
        is_traced = torch.compiler.is_exporting()
        for step in self._steps:
            for name, made in zip(step.outputs, step.run(values, sizes), strict=False):
                values[name] = named(made, name) if is_traced and isinstance(made, Tensor) else made
        return values

    def free_sizes(self, inputs: Mapping[str, Value]) -> list[Size]:
        return [inputs[self.inputs[name]].shape[axis] for name, axis, _ in self.source.free]

    def steps(self) -> list[_Node | _Group]:
        """In the order in which they run."""
        return list(self._steps)

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        values = self.values(self.signature.bind(*args, **kwargs).arguments)
        return {said: tensor(values[name]) for said, name in zip(self.output_names(), self.outputs, strict=True)}

    def output_names(self) -> list[str]:
        """The output names in the result of ``forward``."""
        return list(_distinct(self.outputs, _identifier).values())


def arguments(source: Source) -> dict[str, str]:
    """What the file's inputs are called as arguments of ``forward``."""
    return _distinct([i.name for i in source.inputs], _argument)


def signature_of(source: Source) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(name, kind) for name in arguments(source).values()])


def module_of(
    source: Source,
    unread: Sequence[Unread] = (),
    derived: Mapping[str, Known] | None = None,
    skip: Collection[int] = (),
) -> OnnxModule:
    """The graph as a module whose ``forward`` has the names of the file's inputs.

    ``derived``: constants that the nodes in ``skip`` compute from stored ones.
    """
    made = OnnxModule(source, unread, derived, skip)

    def forward(self: OnnxModule, *args: object, **kwargs: object) -> object:
        return OnnxModule.forward(self, *args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *made.inputs.values())]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    made.__class__ = type("OnnxModule", (OnnxModule,), {"forward": forward})
    return made


def _scope(node: onnx.NodeProto) -> list[str]:
    """The position of the node in the original model, if the exporter recorded it."""
    noted = {p.key: p.value for p in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
    if noted is None:
        return [part for level in node.name.split("/")[:-1] for part in level.split(".") if part]
    try:
        scopes = [scope for scope in ast.literal_eval(noted)[:-1] if isinstance(scope, str)]
    except (ValueError, SyntaxError):
        return []
    return [part for part in (scopes[-1] if scopes else "").split(".") if part]


class _Node(nn.Module):
    """One operator with its attributes as Python values."""

    def __init__(self, node: onnx.NodeProto, opset: int, number: int = -1, opens_fused: bool = False) -> None:
        import onnx

        super().__init__()
        self.fused = FUSED.get(kind_of(node.domain, node.op_type)) if opens_fused else None
        self.kind, self.name, self.number = node.op_type, node.name, number
        self.means = meant(node.op_type, opset)
        self.inputs, self.outputs = list(node.input), list(node.output)
        self.attributes = {a.name: _attribute(onnx.helper.get_attribute_value(a)) for a in node.attribute}

    def run(self, values: Mapping[str, Value], _: Sequence[Size]) -> list[Value]:
        try:
            made: list[Value] = self([values[name] if name else None for name in self.inputs])
        except Exception as e:
            e.add_note(f"in {self.kind} {self.name!r}")
            raise
        return made

    def forward(self, inputs: list[Value | None]) -> list[Value]:
        if self.kind == "Constant":
            ((name, value),) = self.attributes.items()
            array = value if name == "value" else np.asarray(value, np.float32 if "float" in name else np.int64)
            return [array if stays_known(array) else tensor(array)]
        if self.kind == "Split":
            x, *sizes = inputs
            assert x is not None
            return list(split(self.attributes, len(self.outputs), x, *sizes))
        if self.fused is not None:
            return list(self.fused(self.attributes, *inputs))
        return [OPERATORS[self.means](self.attributes, *inputs)]


class _Group(nn.Module):
    """Nodes that ONNX Runtime runs."""

    model: Tensor

    def __init__(self, unread: Unread) -> None:
        super().__init__()
        self.number = GROUP
        self.inputs, self.outputs, self.sized = list(unread.inputs), list(unread.outputs), "\n".join(unread.sized)
        self.register_buffer("model", torch.frombuffer(bytearray(unread.model), dtype=torch.uint8))

    def run(self, values: Mapping[str, Value], sizes: Sequence[Size]) -> list[Value]:
        made: list[Value] = self([values[name] for name in self.inputs], list(sizes))
        return made

    def forward(self, inputs: list[Value], sizes: list[Size]) -> list[Tensor]:
        made: list[Tensor] = onnx_nodes(self.model, [tensor(x) for x in inputs], sizes, self.sized)
        return made


def _attribute(value: object) -> Any:
    import onnx

    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _distinct(names: Iterable[str], make: Callable[[str], str]) -> dict[str, str]:
    """The names transformed by ``make``, each unique."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        made = make(name)
        while made in taken:
            made += "_"
        taken.add(made)
        found[name] = made
    return found


def _argument(name: str) -> str:
    made = _identifier(name)
    return made if made.isidentifier() and not keyword.iskeyword(made) and made != "self" else f"_{made}"


def _attribute_name(name: str) -> str:
    made = _identifier(name)
    return f"{made}_" if keyword.iskeyword(made) else made


def _identifier(name: str) -> str:
    made = re.sub(r"\W", "_", name)
    return f"_{made}" if not made or (made[0].isdigit() and not made.isdigit()) else made
