"""An ONNX graph as a torch module, node for node."""

from __future__ import annotations

import ast
import inspect
import keyword
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnopt.errors import CaptureError
from attnopt.from_onnx.fusing import fused
from attnopt.from_onnx.layout import split
from attnopt.from_onnx.operators import OPERATORS
from attnopt.from_onnx.quoting import quoted
from attnopt.from_onnx.values import Value, stays_known, tensor

if TYPE_CHECKING:
    import onnx


class OnnxModule(nn.Module):
    """Called with the file's inputs, by place or by name; gives its outputs by name.

    Weights keep their names.  ``file``: where the graph comes from.
    """

    def __init__(self, model: onnx.ModelProto, file: str) -> None:
        import onnx

        super().__init__()
        self.file = file
        self._known: dict[str, Any] = {}
        self._weights: dict[str, str] = {}
        self._nodes: list[_Node] = []  # these are set before there are weights, which may have the same names
        self.outputs = [o.name for o in model.graph.output]
        self.inputs: dict[str, str] = {}
        for stored in model.graph.initializer:
            self._store(stored.name, onnx.numpy_helper.to_array(stored))
        given = [i.name for i in model.graph.input if i.name not in self._known and i.name not in self._weights]
        self.inputs = _distinct(given, _argument)
        self._nodes = [
            self._placed(node, number) for number, node in enumerate(fused(model.graph.node, self._zeros(model)))
        ]

    def _zeros(self, model: onnx.ModelProto) -> frozenset[str]:
        """The constants that are one 0."""
        found = dict(self._known)
        for node in model.graph.node:
            if node.op_type == "Constant":
                found[node.output[0]] = next(iter(_Node(node).attributes.values()))
        return frozenset(n for n, a in found.items() if getattr(a, "size", 0) == 1 and not a.any())

    def _store(self, name: str, array: Any) -> None:
        if stays_known(array):
            self._known[name] = array
            return
        *path, last = map(_identifier, name.split("."))
        owner, place = self._folder(path)
        while hasattr(owner, last):
            last += "_"
        weight = torch.from_numpy(array.copy())
        if weight.is_floating_point():
            owner.register_parameter(last, nn.Parameter(weight))
        else:
            owner.register_buffer(last, weight)
        self._weights[name] = ".".join((*place, last))

    def _placed(self, node: onnx.NodeProto, number: int) -> _Node:
        """The node as a module in the folder that its name says: that is how a site gets its name."""
        made = _Node(node)
        owner, _ = self._folder(map(_identifier, _scope(node)))
        owner.add_module(f"node{number}", made)
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
        return inspect.signature(self.forward)

    def values(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Every value of the graph, by its name in the file.  Raises CaptureError."""
        values: dict[str, Any] = dict(self._known) | {name: inputs[said] for name, said in self.inputs.items()}
        for name, place in self._weights.items():
            owner, _, last = place.rpartition(".")
            values[name] = getattr(self.get_submodule(owner), last)
        for node in self._nodes:
            try:
                made = node([values[name] if name else None for name in node.inputs])
            except (NotImplementedError, TypeError) as e:
                raise CaptureError(f"{self.file}: {node.kind} {node.name!r} is not read: {quoted(str(e))}") from e
            except Exception as e:
                e.add_note(f"in {node.kind} {node.name!r}")
                raise
            values.update(zip(node.outputs, made, strict=False))
        return values

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        values = self.values(self.signature.bind(*args, **kwargs).arguments)
        return {said: tensor(values[name]) for name, said in _distinct(self.outputs, _identifier).items()}


def module_of(model: onnx.ModelProto, file: str) -> OnnxModule:
    """The graph as a module whose ``forward`` has the names of the file's inputs."""
    made = OnnxModule(model, file)

    def forward(self: OnnxModule, *args: Any, **kwargs: Any) -> Any:
        return OnnxModule.forward(self, *args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind) for name in ("self", *made.inputs.values())]
    forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    made.__class__ = type("OnnxModule", (OnnxModule,), {"forward": forward})
    return made


def _scope(node: onnx.NodeProto) -> list[str]:
    """Where in the original model the node was, as far as the exporter noted it."""
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

    def __init__(self, node: onnx.NodeProto) -> None:
        import onnx

        super().__init__()
        self.kind, self.name = node.op_type, node.name
        self.inputs, self.outputs = list(node.input), list(node.output)
        self.attributes = {a.name: _attribute(onnx.helper.get_attribute_value(a)) for a in node.attribute}

    def forward(self, inputs: list[Value | None]) -> list[Value]:
        if self.kind == "Constant":
            (array,) = self.attributes.values()
            return [array if stays_known(array) else tensor(array)]
        if self.kind == "Split":
            x, *sizes = inputs
            assert x is not None
            return list(split(self.attributes, len(self.outputs), x, *sizes))
        return [OPERATORS[self.kind](self.attributes, *inputs)]


def _attribute(value: Any) -> Any:
    import onnx

    if isinstance(value, bytes):
        return value.decode()
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _distinct(names: Iterable[str], make: Callable[[str], str]) -> dict[str, str]:
    """What ``make`` makes of the names, each one of its own."""
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


def _identifier(name: str) -> str:
    made = re.sub(r"\W", "_", name)
    return f"_{made}" if not made or (made[0].isdigit() and not made.isdigit()) else made
