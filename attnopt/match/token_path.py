"""How the keys and values of an attention come from the features of their tokens: the operators in between, which can be run
again on the features of other tokens, because they act token by token.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.node import Target

from attnopt.base.closeness import TOLERANCE, difference
from attnopt.base.sizes import hint, is_static
from attnopt.graph.axes import Atom, Axes, Axis, fresh, resolve_all
from attnopt.graph.emitter import Emitter
from attnopt.graph.evaluate import inputs_behind
from attnopt.graph.interpreter import Interpreter
from attnopt.graph.nodes import (
    aten,
    calls,
    dtype,
    is_call,
    is_number,
    is_state,
    is_tensor,
    operand,
    opname,
    shape,
    source_line,
    value,
    with_values,
)
from attnopt.graph.ops import Kind, of
from attnopt.ir.refusal import Refusal
from attnopt.match.token_axes import NotFollowedError, TokenAxes, takes_all

T = TypeVar("T")
_PROJECTIONS = of(Kind.PRODUCT, Kind.CONVOLUTION)
_EXPANDS = of(Kind.EXPAND)
_SIZED = _EXPANDS | of(Kind.RESHAPE)


@dataclass(frozen=True)
class TokenPath:
    """From ``source``, the features of tokens, by way of ``nodes``, in their order, to the canonical keys and values.

    ``axes``: of the source and of each node; ``batch`` and ``tokens``: the atoms that are sequences, and tokens of one.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    axes: Mapping[fx.Node, Axes]
    batch: Axis
    tokens: Axis
    k: fx.Node
    v: fx.Node

    @property
    def width(self) -> int:
        """The features of a token."""
        return prod(shape(self.source)) // prod(a.size for a in (*self.batch, *self.tokens))

    def run(self, calls: _Calls[T], features: T) -> dict[fx.Node, T]:
        """What each node gives for other tokens, whose ``features`` are [B or 1, M, C]."""
        made = {self.source: self._as_source(calls, features)}
        sizes = calls.size(features, 0), calls.size(features, 1)
        for node in self.nodes:
            made[node] = self._again(calls, node, made, sizes)
        return made

    def _as_source(self, calls: _Calls[T], features: T) -> T:
        """In the layout of the source."""
        axes = self.axes[self.source]
        marked = (*self.batch, *self.tokens)
        atoms = [a for axis in axes for a in axis]
        inner = [a for a in atoms if a not in marked]
        order = [*self.batch[:1], *self.tokens[:1], *inner]
        b, m = calls.size(features, 0), calls.size(features, 1)
        if not self.batch:
            order = [_ONE, *order]
        parts = calls.call(aten.reshape.default, (features, [*self._plain(b, m), *(a.size for a in inner)]))
        wanted = [*([] if self.batch else [_ONE]), *(a for a in atoms if a in order)]
        moved = calls.call(aten.permute.default, (parts, [order.index(a) for a in wanted]))
        return calls.call(aten.reshape.default, (moved, self._sizes(calls, axes, (b, m))))

    @staticmethod
    def _plain(b: Any, m: Any) -> list[Any]:
        return [b, m] if isinstance(m, int) else [b, -1]

    def _again(self, calls: _Calls[T], node: fx.Node, made: Mapping[fx.Node, T], sizes: tuple[Any, Any]) -> T:
        if is_call(node, aten.slice.Tensor) and takes_all(node):
            return made[operand(node)]
        if node.target in _SIZED:
            target = aten.expand.default if node.target in _EXPANDS else aten.reshape.default
            return calls.call(target, (made[operand(node)], self._sizes(calls, self.axes[node], sizes)))
        given: dict[fx.Node, Any] = {n: made[n] if n in made else calls.known(n) for n in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
        return calls.call(node.target, args, kwargs)

    def _sizes(self, calls: _Calls[T], axes: Axes, sizes: tuple[Any, Any]) -> list[Any]:
        """The sizes of a tensor of other tokens: one of the atoms counts for all of them."""
        b, m = sizes
        found: list[Any] = []
        for axis in axes:
            rest = prod(a.size for a in axis if a not in self.batch and a not in self.tokens)
            of_batch, of_tokens = bool({*self.batch[:1]} & {*axis}), bool({*self.tokens[:1]} & {*axis})
            given = [*([b] if of_batch else []), *([m] if of_tokens else [])]
            if all(isinstance(size, int) for size in given):
                found.append(prod(given) * rest)
            elif of_tokens:
                found.append(-1)
            else:
                found.append(b if rest == 1 else calls.times(b, rest))
        return found


_ONE = Atom(1)


@dataclass(frozen=True)
class _Calls(Generic[T]):
    """How to run a path: on tensors, or as nodes of a graph."""

    call: Callable[..., T]  # of an operator with its arguments
    size: Callable[[T, int], Any]
    known: Callable[[fx.Node], Any]  # what is the same in every call
    times: Callable[[Any, int], Any] = operator.mul


def token_path(k: fx.Node, v: fx.Node) -> TokenPath | Refusal:
    """Where the canonical keys and values come from, if they come from the features of one sequence, token by token."""
    nearest = _nearest_source(k, v)
    if isinstance(nearest, Refusal):
        return nearest
    source, nodes = nearest
    axes = TokenAxes({source: fresh(shape(source))})
    try:
        for node in nodes:
            axes.add(node)
    except NotFollowedError as e:
        return _refused(e.node)
    batch, _, tokens, _ = axes.of(k)
    if not tokens or (not batch and not (is_static(value(k).shape[0]) and shape(k)[0] == 1)):
        found = f"an example of {shape(k)[0]} x {shape(k)[2]} tokens"
        return replace(_refused(k), found=found, hint="give an example of several tokens")
    of_v = axes.of(v)
    atoms = {a for axis in axes.of(source) for a in axis}
    if (apart := axes.at_token((*batch, *tokens))) is not None:
        return _refused(apart)
    if (of_v[0], of_v[2]) != (batch, tokens) or not {*batch, *tokens} <= atoms:
        return replace(_refused(k), found="tokens that are joined, cut or arranged anew before them")
    known = {n: resolve_all(own) for n, own in axes.known.items()}
    return TokenPath(source, tuple(nodes), known, batch, tokens, k, v)


_EXCLUDE = "exclude the site from extend-keys"


def _nearest_source(k: fx.Node, v: fx.Node) -> tuple[fx.Node, list[fx.Node]] | Refusal:
    """The nearest tensor that all ways from keys and values up lead to, past a projection, and the nodes below it."""
    ends, projected, inside = {k, v}, set[fx.Node](), list[fx.Node]()
    while True:
        node = max(ends)
        if len(ends) == 1 and is_tensor(node) and (node in projected or not _is_computed(node)):
            return node, sorted(inside)
        if not _is_computed(node):
            return _from_several(", ".join(sorted(map(_told, ends))))
        ends.remove(node)
        inside.append(node)
        above = [n for n in node.all_input_nodes if not is_number(n) and inputs_behind(n)]
        if not above:
            return _from_several(f"{_told(node)}, which no input changes")
        if calls(node, _PROJECTIONS) or node in projected:
            projected.update(above)
        ends.update(above)


def _is_computed(node: fx.Node) -> bool:
    return node.op == "call_function" and not is_state(node)


def _from_several(found: str) -> Refusal:
    expected = "keys and values that are computed from one tensor of features"
    return Refusal("several-sources", expected, found, hint=_EXCLUDE)


def _refused(node: fx.Node) -> Refusal:
    return Refusal(
        "not-token-wise",
        expected="keys and values that are computed from each token alone, wherever it stands",
        found=_told(node),
        hint="the reference has no places in the sequence of the tokens, which rotated keys, caches and convolutions need; "
        + _EXCLUDE,
    )


def _told(node: fx.Node) -> str:
    line = source_line(node)
    return f"{opname(node) if node.op == 'call_function' else node.name}{f' ({line})' if line else ''}"


def emitted(
    path: TokenPath, emit: Emitter, features: fx.Node, here: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """The path as nodes of a graph, for ``features`` [B or 1, M, C] of the type of the source.  ``here``: the nodes of that
    graph for those of the path's."""

    def called(target: Target, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> fx.Node:
        return emit.call(target, *args, **(kwargs or {}))

    calls: _Calls[fx.Node] = _Calls(
        called, emit.size, here.__getitem__, lambda size, by: emit.call(operator.mul, size, by)
    )
    return path.run(calls, features)


def error_of(gm: fx.GraphModule, path: TokenPath, seed: int = 0) -> float:
    """Largest relative difference between keys and values of other tokens, as the path computes them, and those that the model
    computes where its own tokens have these features."""
    random = torch.Generator().manual_seed(seed)
    B, S = (prod(a.size for a in atoms) for atoms in (path.batch, path.tokens))
    M = S + 1 if S > 1 else 2
    kind, device = dtype(path.source), with_values(value(path.source).device)
    features = torch.randn((1, M, path.width), generator=random).to(kind).to(device)
    chosen = torch.randint(M, (B, S), generator=random).to(device)
    worst = 0.0
    with torch.no_grad():
        own = _Own(gm)
        own.values[path.source] = _in_layout(path, features[0, chosen])
        known = _Own(gm)
        made = path.run(_Calls(_called, lambda x, axis: x.shape[axis], known), features)
        for end in (path.k, path.v):
            got = made[end][0][:, chosen].transpose(0, 1)  # [B, G, S, D]
            worst = max(worst, difference([got], [own(end)]))
    return worst


def is_equal(path: TokenPath, error: float) -> bool:
    return error <= TOLERANCE.get(dtype(path.source), 0.0)


def _called(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Tensor:
    made: Tensor = target(*args, **(kwargs or {}))
    return made


def _in_layout(path: TokenPath, features: Tensor) -> Tensor:
    """[B, S, C] as the source has them."""
    axes = path.axes[path.source]
    atoms = [a for axis in axes for a in axis]
    inner = [a for a in atoms if a not in (*path.batch, *path.tokens)]
    order = [*path.batch, *path.tokens, *inner]
    split = features.reshape([a.size for a in order])
    return split.permute([order.index(a) for a in atoms]).reshape(shape(path.source))


class _Own(Interpreter):
    """Sizes are those of the example; what has no values is random."""

    def leaf(self, node: fx.Node) -> object:
        if is_number(node):
            return hint(value(node)) if isinstance(value(node), (int, torch.SymInt)) else value(node)
        found = super().leaf(node)
        if isinstance(found, Tensor) and found.is_meta:
            random = torch.Generator().manual_seed(len(self.values))
            return torch.randn(found.shape, generator=random).to(found.dtype)
        return found
