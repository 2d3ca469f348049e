"""Single entries of a tensor computed by a graph, at sizes where the whole tensor would be too large."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)

from attnopt.graph.entry_rules import MADE, MOVES, Index, UnsupportedError
from attnopt.graph.evaluate import Sizes, evaluate, size_at
from attnopt.graph.interpreter import COMPUTED, Interpreter
from attnopt.graph.nodes import arg, calls, get_attr, is_number, is_state, run_call, value
from attnopt.graph.ops import Kind, is_pointwise, of

_WHOLE = 1 << 20  # a tensor of at most this many elements is computed as a whole

_FORMS = of(Kind.FILL)


class InvalidSizesError(Exception):
    """The graph itself does not run at these sizes."""


class _Formal(Interpreter):
    """Sizes, and tensors that have a shape and no values."""

    def __init__(self, gm: fx.GraphModule, sizes: Sizes) -> None:
        super().__init__(gm)
        self.sizes, self.mode = sizes, FakeTensorMode(allow_non_fake_inputs=True)

    def leaf(self, node: fx.Node) -> object:
        val = value(node)
        if node.op == "call_function" and not is_number(node):
            return COMPUTED
        if not isinstance(val, Tensor):
            return size_at(val, self.sizes)
        with self.mode:
            return torch.empty([size_at(s, self.sizes) for s in val.shape], dtype=val.dtype, device=val.device)

    def call(self, node: fx.Node, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        target: Any = node.target
        try:
            with self.mode:
                return target(*args, **kwargs)
        except (UnsupportedFakeTensorException, DynamicOutputShapeException, DataDependentOutputException) as e:
            raise UnsupportedError(str(e)) from e
        except NotImplementedError as e:
            raise UnsupportedError(str(e)) from e
        except Exception as e:
            raise InvalidSizesError(str(e)) from e


class Entries:
    """Entries of any node of ``gm``, with the graph's symbols at ``sizes`` and its inputs filled with ``fill``."""

    def __init__(self, gm: fx.GraphModule, sizes: Sizes, fill: float | None = None) -> None:
        self._gm, self._sizes, self._fill = gm, sizes, fill
        self._formal = _Formal(gm, sizes)
        self._whole: dict[fx.Node, Tensor] = {}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Raises InvalidSizesError for sizes at which the nodes above fail, UnsupportedError if unknown."""
        return tuple(self._formal(node).shape)

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        """The same of an operator with several results."""
        return [tuple(x.shape) for x in self._formal(node)]

    def at(self, node: fx.Node, index: Index) -> Tensor:
        """The entries at ``index``, with as many axes, that broadcast to its shape.  Raises UnsupportedError."""
        found = self._at(node, index)
        ndim = max((i.dim() for i in index), default=0)
        return found.reshape((1,) * (ndim - found.dim()) + found.shape)

    def _at(self, node: fx.Node, index: Index) -> Tensor:
        if node.op == "get_attr" and not is_state(node):
            return _taken(get_attr(self._gm, str(node.target)).detach(), index)
        if node.op in ("placeholder", "get_attr"):
            if self._fill is None:
                raise UnsupportedError(f"depends on the input {node.name}")
            return torch.full((1,) * len(index), self._fill, dtype=value(node).dtype)
        if math.prod(self.shape(node)) <= _WHOLE:
            if node not in self._whole:
                self._whole[node] = evaluate(self._gm, node, self._sizes, self._fill)
            return _taken(self._whole[node], index)
        if (move := MOVES.get(node.target)) is not None:
            source = arg(node, 0)
            return self.at(source, move(self, node, index, self.shape(source)))
        if (make := MADE.get(node.target)) is not None:
            return make(self, node, index)
        if is_pointwise(node.target) or calls(node, _FORMS):
            return self._each(node, index)
        raise UnsupportedError(f"entries of {node.target}")

    def _each(self, node: fx.Node, index: Index) -> Tensor:
        """Number by number: of each operand the entries that meet at ``index``."""
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: self.operand(n, index))
        made: Tensor = run_call(node, args, {k: v for k, v in kwargs.items() if k != "memory_format"})
        return made

    def operand(self, node: fx.Node, index: Index) -> Tensor | float:
        """The entries of an operand that is broadcast, or a number."""
        if not isinstance(value(node), Tensor):
            return size_at(value(node), self._sizes)
        sizes = self.shape(node)
        inner = index[len(index) - len(sizes) :]
        return self.at(node, tuple(torch.zeros_like(i) if n == 1 else i for i, n in zip(inner, sizes, strict=True)))

    def number(self, x: Any) -> Any:
        return size_at(value(x), self._sizes) if isinstance(x, fx.Node) else x


def _taken(x: Tensor, index: Index) -> Tensor:
    return x[index] if index else x
