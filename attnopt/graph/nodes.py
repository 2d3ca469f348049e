"""The graph that everything works on: an fx graph of functional aten operators with fake values, and small tools for it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import Argument

from attnopt.base.sizes import hint
from attnopt.graph.ops import Kind, Operators, named, of

aten = torch.ops.aten

RESHAPES = of(Kind.RESHAPE)
CASTS = of(Kind.CAST)
NOT = named("logical_not bitwise_not")


def is_call(node: object, *targets: object) -> TypeGuard[fx.Node]:
    """``node`` calls one of these operators (overloads are named exactly)."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def calls(node: object, operators: Operators) -> TypeGuard[fx.Node]:
    """``node`` calls one of a set of ``graph/ops.py``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in operators


def arg(node: fx.Node, index: int, default: object = None) -> Any:
    """A positional argument of a call, or ``default`` if absent."""
    return node.args[index] if len(node.args) > index else default


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """A positional argument that is a node."""
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def run_call(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of the called operator for these values; on the CPU instead of the meta device, which has none."""
    target: Any = node.target
    args, kwargs = fx.node.map_aggregate((args, kwargs), _off_meta)
    return target(*args, **kwargs)


def with_values(device: torch.device) -> torch.device:
    """Where the values of a tensor on ``device`` are computed."""
    return torch.device("cpu") if device.type == "meta" else device


def _off_meta(x: object) -> Any:
    return with_values(x) if isinstance(x, torch.device) else x


def opname(node: fx.Node) -> str:
    """The operator's name without its overload: "matmul", "softmax"."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def inputs_of(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of the graph, in their order."""
    return list(graph.find_nodes(op="placeholder"))


def input_axes(inputs: Iterable[fx.Node]) -> Iterator[tuple[int, fx.Node, int, int | torch.SymInt]]:
    """(its place, the input, axis, size) of every axis of these inputs."""
    for place, node in enumerate(inputs):
        if is_tensor(node):
            for axis, size in enumerate(value(node).shape):
                yield place, node, axis, size


def input_name(node: fx.Node) -> str:
    """The argument's name.  fx gives the node of an argument that is called as a builtin, such as ``input``, another."""
    return str(node.target)


def is_read(node: fx.Node) -> bool:
    """By more than the checks of its sizes."""
    return any(user.op != "call_module" for user in node.users)


def value(node: fx.Node) -> Any:
    return node.meta.get("val")


def is_tensor(node: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and isinstance(value(node), Tensor)


def is_number(node: fx.Node) -> bool:
    """``node`` computes a number, as of a size."""
    return (
        isinstance(value(node), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)) and node.op != "placeholder"
    )


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape at the sizes of the example inputs."""
    return tuple(hint(s) for s in value(node).shape)


def dtype(node: fx.Node) -> torch.dtype:
    found = value(node).dtype
    assert isinstance(found, torch.dtype)
    return found


def wrap(axis: int, ndim: int) -> int:
    return axis + ndim if axis < 0 else axis


def source_line(node: fx.Node) -> str:
    """ "file.py:88" of the innermost frame of the user's model that created ``node``; "" if unknown."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    frames = [
        f for f in frames if "/attnopt/capture/flat_call.py" not in f
    ]  # which calls the model while it is captured
    inner = [f for f in frames if "/torch/" not in f and not f.startswith('File "<')] or frames
    if not inner:
        return ""
    path, _, rest = inner[-1][len('File "') :].partition('", line ')
    return f"{path.rsplit('/', 1)[-1]}:{rest.split(',')[0]}"


def module_path(node: fx.Node) -> str:
    """Qualified name of the innermost module in which ``node`` runs; "" for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    return _plain(paths[-1]) if paths else ""


def _plain(path: str) -> str:
    path = path.removeprefix("L['self']").lstrip(".")
    return ".".join(part.split("@")[0] for part in path.split(".")) if path else ""


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        if isinstance(value(node), FakeTensor):
            mode: FakeTensorMode = value(node).fake_mode
            return mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_args(args: Argument) -> Any:
    return fx.node.map_arg(args, lambda n: n.meta["val"])


def getitem_source(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(the node that returns several tensors, which one) of a getitem."""
    if not is_call(node, operator.getitem):
        return None
    source, index = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    return source, index


def between(sources: Collection[fx.Node], ends: Iterable[fx.Node]) -> list[fx.Node]:
    """The ancestors of ``ends``, among them ``ends``, that are computed from ``sources``, not by sizes alone, in order."""
    reached, made = set(sources), list[fx.Node]()
    first = min(reached, default=None)
    if first is None:
        return made
    above = {n for end in ends for n in ancestors(end, stop=lambda n: n < first)}
    for n in sorted(above - reached):
        if not is_number(n) and reached.intersection(n.all_input_nodes):
            reached.add(n)
            made.append(n)
    return made


def ancestors(node: fx.Node, stop: Callable[[fx.Node], bool] = lambda n: False) -> Iterator[fx.Node]:
    """``node`` and its ancestors; ``stop(n)`` includes n without its ancestors."""
    seen, stack = {node}, [node]
    while stack:
        n = stack.pop()
        yield n
        if stop(n):
            continue
        fresh = [i for i in n.all_input_nodes if i not in seen]
        seen.update(fresh)
        stack.extend(fresh)


def get_attr(module: nn.Module, name: str) -> Tensor:
    found = operator.attrgetter(name)(module)
    assert isinstance(found, Tensor)
    return found


def stored(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Every parameter, buffer and constant that the graph reads, by name."""
    names = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "get_attr")
    found = {name: operator.attrgetter(name)(gm) for name in names}
    return {name: x for name, x in found.items() if isinstance(x, Tensor)}


def constant_of(node: fx.Node) -> Tensor | None:
    """The value of a stored tensor that is the same at every call: not a parameter, not state, not on the meta device."""
    owner = node.graph.owning_module
    if owner is None or is_state(node):
        return None
    found = get_attr(owner, str(node.target))
    return None if isinstance(found, nn.Parameter) or found.is_meta else found


def is_state(node: fx.Node) -> bool:
    """A stored tensor that the graph writes, such as a cache: its current value says nothing about the next call."""
    return node.op == "get_attr" and any(is_call(u, aten.copy_.default) and arg(u, 0) is node for u in node.users)


def written(gm: fx.GraphModule) -> tuple[str, ...]:
    """The names of state tensors."""
    return tuple(dict.fromkeys(str(n.target) for n in gm.graph.nodes if is_state(n)))
