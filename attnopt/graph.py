"""The graph that everything works on: an fx graph of functional aten operators with fake values, and small tools for it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
NOT = (aten.logical_not.default, aten.bitwise_not.default)
_LAST = 9223372036854775807


def is_call(node: object, *targets: Any) -> bool:
    """``node`` calls one of these operators (overloads are named exactly)."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def arg(node: Any, index: int, default: Any = None) -> Any:
    """A positional argument of a call, or ``default`` where it was not given."""
    return node.args[index] if len(node.args) > index else default


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """A positional argument that is a node."""
    found = node.args[index]
    assert isinstance(found, fx.Node)
    return found


def run_call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the called operator gives for these values; on the CPU where the graph means the meta device, which has none."""
    target: Any = node.target
    args, kwargs = fx.node.map_aggregate((args, kwargs), _off_meta)
    return target(*args, **kwargs)


def with_values(device: torch.device) -> torch.device:
    """Where the values of a tensor on ``device`` are computed."""
    return torch.device("cpu") if device.type == "meta" else device


def _off_meta(x: Any) -> Any:
    return with_values(x) if isinstance(x, torch.device) else x


def opname(node: fx.Node) -> str:
    """The operator's name without its overload: "matmul", "softmax"."""
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def value(node: fx.Node) -> Any:
    return node.meta.get("val")


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(value(node), Tensor)


def is_number(node: fx.Node) -> bool:
    """``node`` computes a number, as of a size."""
    return (
        isinstance(value(node), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)) and node.op != "placeholder"
    )


def hint(size: int | torch.SymInt) -> int:
    """The size that an axis has for the example inputs; -1 where it depends on their values."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.hint is not None else -1
    return int(size)


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape at the sizes of the example inputs."""
    return tuple(hint(s) for s in value(node).shape)


def is_static(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or size.node.expr.is_number


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """The two sizes are equal whatever the inputs' sizes are."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left = a if isinstance(a, int) else a.node.expr
    right = b if isinstance(b, int) else b.node.expr
    return bool(left == right)


def dtype(node: fx.Node) -> torch.dtype:
    found = value(node).dtype
    assert isinstance(found, torch.dtype)
    return found


def wrap(axis: int, ndim: int) -> int:
    return axis + ndim if axis < 0 else axis


def source_line(node: fx.Node) -> str:
    """ "file.py:88" of the innermost frame of the user's model that made ``node``; "" where it is not known."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    frames = [f for f in frames if "/attnopt/flat_call.py" not in f]  # which calls the model while it is captured
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


def fake_args(args: Any) -> Any:
    return fx.node.map_arg(args, lambda n: n.meta["val"])


class Emitter:
    """Appends nodes at one place of a graph, with their fake values, and never the same node twice."""

    def __init__(self, graph: fx.Graph, before: fx.Node, origin: dict[str, Any] | None = None) -> None:
        self.graph, self.before, self.origin = graph, before, origin or {}
        self.mode = fake_mode(graph)
        self._known: dict[Any, fx.Node] = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        key = (target, _key(args), _key(kwargs))
        if key in self._known:
            return self._known[key]
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        with self.mode, enable_python_dispatcher():  # some kernels, as linear's in torch 2.11, take no symbolic sizes
            node.meta["val"] = target(*fake_args(args), **fake_args(kwargs))
        self._mark(node)
        self._known[key] = node
        return node

    def size(self, node: fx.Node, axis: int) -> int | fx.Node:
        """The length of an axis, as a number or as a node that computes it."""
        found = value(node).shape[axis]
        if isinstance(found, int) or found.node.expr.is_number:
            return hint(found)
        return self.call(aten.sym_size.int, node, axis)

    def inline(self, fn: Callable[..., Tensor], *inputs: fx.Node, pre_dispatch: bool = True) -> fx.Node:
        """Trace ``fn`` on the nodes' fake values and put the operators here; returns the node of its result.

        ``pre_dispatch``: with composite operators, which ``vmap`` does not trace."""
        with self.mode:
            traced = make_fx(fn, pre_dispatch=pre_dispatch)(*(value(n) for n in inputs))
        place = iter(inputs)
        here: dict[fx.Node, fx.Node] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                here[node] = next(place)
            elif node.op == "output":
                result = operand(node)
                return here[result]
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: here[n])
                here[node] = self._copy(node, args, kwargs)
            else:
                here[node] = self.constant(getattr(traced, str(node.target)))
        raise AssertionError("a traced function without output")

    def _copy(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        key = (node.target, _key(args), _key(kwargs))
        if key in self._known:
            return self._known[key]
        with self.graph.inserting_before(self.before):
            copy = self.graph.create_node("call_function", node.target, args, kwargs)
        copy.meta["val"] = node.meta.get("val")
        self._mark(copy)
        self._known[key] = copy
        return copy

    def constant(self, tensor: Tensor) -> fx.Node:
        """A tensor of known numbers, as a buffer of the graph's module."""
        real = getattr(tensor, "constant", None) if isinstance(tensor, FakeTensor) else tensor
        if real is None:
            raise TypeError("a lowering made a constant tensor whose numbers are not known while it is traced")
        gm = self.graph.owning_module
        assert gm is not None
        name = f"constant_{sum(1 for _ in gm.buffers(recurse=False))}"
        while hasattr(gm, name):
            name += "_"
        gm.register_buffer(name, real.detach().clone())
        with self.graph.inserting_before(self.before):
            node = self.graph.get_attr(name)
        with self.mode:
            node.meta["val"] = torch.empty(real.shape, dtype=real.dtype, device=real.device)
        return node

    def _mark(self, node: fx.Node) -> None:
        if self.origin:
            node.meta["attnopt"] = dict(self.origin)
        for key in ("nn_module_stack", "stack_trace"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]


def _key(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return tuple(_key(i) for i in x)
    if isinstance(x, dict):
        return tuple(sorted((k, _key(v)) for k, v in x.items()))
    return (type(x), x) if isinstance(x, (int, float, bool)) else x


def sweep(gm: fx.GraphModule) -> None:
    """Remove what nothing uses.  torch keeps an unused fused attention, because it might draw random numbers."""
    gm.graph.eliminate_dead_code(is_impure_node=_has_effects)
    gm.recompile()


def _has_effects(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output", "call_module") or "attnopt.call" in node.meta:
        return True
    schema = getattr(node.target, "_schema", None)
    name = opname(node)
    return name.startswith(("_assert", "sym_constrain")) or bool(schema is not None and schema.is_mutable)


def share(gm: fx.GraphModule) -> None:
    """Compute equal things once: every layer of a model may have made the same mask."""
    known: dict[Any, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or _has_effects(node) or _draws(node):
            continue
        same = known.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)


def computes_same(a: fx.Node, b: fx.Node) -> bool:
    """The same operators on the same tensors, written once or twice."""
    stack, seen = [(a, b)], set[tuple[fx.Node, fx.Node]]()
    while stack:
        a, b = pair = stack.pop()
        if a is b or pair in seen:
            continue
        seen.add(pair)
        if a.op != b.op or a.target != b.target or a.op not in ("call_function", "get_attr") or is_state(a):
            return False
        if a.op == "call_function" and (_draws(a) or _numbers_of(a) != _numbers_of(b)):
            return False
        above = a.all_input_nodes, b.all_input_nodes
        if len(above[0]) != len(above[1]):
            return False
        stack += zip(*above, strict=True)
    return True


def _numbers_of(node: fx.Node) -> Any:
    """The arguments of a call, with the place of each node among its inputs."""
    place = {n: i for i, n in enumerate(node.all_input_nodes)}
    return _key(fx.node.map_arg((node.args, node.kwargs), lambda n: f"node {place[n]}"))


def _draws(node: fx.Node) -> bool:
    """The operator may give something else each time."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or "empty" in opname(node) or not isinstance(value(node), Tensor)


def getitem_source(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(the node that returns several tensors, which one) of a getitem."""
    if not is_call(node, operator.getitem):
        return None
    source, index = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    return source, index


def ancestors(node: fx.Node, stop: Callable[[fx.Node], bool] = lambda n: False) -> Iterator[fx.Node]:
    """``node`` and everything that it is computed from; ``stop(n)`` keeps n but not what n is computed from."""
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
    """What a stored tensor holds where that is the same at every call: no parameter, no state, and not on the meta device."""
    owner = node.graph.owning_module
    if owner is None or is_state(node):
        return None
    found = get_attr(owner, str(node.target))
    return None if isinstance(found, nn.Parameter) or found.is_meta else found


def is_state(node: fx.Node) -> bool:
    """A stored tensor that the graph writes, as a cache is: what it holds now says nothing about the next call."""
    return node.op == "get_attr" and any(is_call(u, aten.copy_.default) and arg(u, 0) is node for u in node.users)


def written(gm: fx.GraphModule) -> tuple[str, ...]:
    """The names of what is state."""
    return tuple(dict.fromkeys(str(n.target) for n in gm.graph.nodes if is_state(n)))


def prune_unused_state(gm: fx.GraphModule) -> None:
    """Drop parameters, buffers and empty submodules that no node reads any more."""
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    for name in [
        n for n, _ in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    ]:
        if name not in used and not any(name.startswith(u + ".") for u in used):
            owner, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(owner), leaf)
