"""Appending nodes to a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Argument, Target

from attnopt.base.sizes import hint
from attnopt.graph.nodes import aten, fake_args, fake_mode, module_path, operand, value
from attnopt.graph.store import store


class Emitter:
    """Appends nodes at one position of a graph, with fake values, without duplicates."""

    def __init__(self, graph: fx.Graph, before: fx.Node, origin: dict[str, object] | None = None) -> None:
        self.graph, self.before, self.origin = graph, before, origin or {}
        self.mode = fake_mode(graph)
        self._known: dict[object, fx.Node] = {}

    def call(self, target: Target, *args: Argument, **kwargs: Argument) -> fx.Node:
        assert not isinstance(target, str)  # the name of a method
        key = (target, _key(args), _key(kwargs))
        if key in self._known:
            return self._known[key]
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        with (
            self.mode,
            enable_python_dispatcher(),
        ):  # some kernels, such as linear in torch 2.11, do not accept symbolic sizes
            node.meta["val"] = target(*fake_args(args), **fake_args(kwargs))
        self._mark(node)
        self._known[key] = node
        return node

    def reuse(self, node: fx.Node) -> None:
        """``node``, which stands before this place, is not to be computed again."""
        self._known.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)

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
            traced = make_fx(fn, pre_dispatch=pre_dispatch)(*(_alone(value(n)) for n in inputs))
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

    def run(self, fn: Callable[..., Tensor], *inputs: fx.Node, like: Tensor) -> fx.Node:
        """A call of ``fn`` itself, which is not traced; its result has the shape and dtype of ``like``."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(fn, inputs)
        node.meta["val"] = like
        self._mark(node)
        return node

    def _copy(self, node: fx.Node, args: tuple[Argument, ...], kwargs: dict[str, Argument]) -> fx.Node:
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
        """A tensor of known numbers, as a buffer of the graph's module; as a parameter if it is one."""
        real = getattr(tensor, "constant", None) if isinstance(tensor, FakeTensor) else tensor
        if real is None:
            raise TypeError("a lowering created a constant tensor whose values are unknown during tracing")
        gm = self.graph.owning_module
        assert gm is not None
        held = real.detach().clone()
        if isinstance(real, nn.Parameter):
            name = store(gm, ".".join(filter(None, (module_path(self.before), "weight"))), nn.Parameter(held))
        else:
            name = store(gm, f"constant_{sum(1 for _ in gm.buffers(recurse=False))}", held)
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


def _alone(x: object) -> object:
    """Tracing tells tensors apart as objects, and copies of a graph share theirs."""
    return x.detach() if isinstance(x, Tensor) else x


def _key(x: object) -> object:
    if isinstance(x, (tuple, list)):
        return tuple(_key(i) for i in x)
    if isinstance(x, dict):
        return tuple(sorted((k, _key(v)) for k, v in x.items()))
    return (type(x), x) if isinstance(x, (int, float, bool)) else x
