"""Residual streams: the chains of additions to which attentions and other branches, such as MLPs, write.

An addition is residual if one operand, the stream, is above the other, the branch: ``x + f(x)``.  Parallel branches
(``x + attention(x) + mlp(x)``, in any order) are told apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from attnopt.graph.nodes import aten, calls, dtype, is_call, is_tensor, module_path, shape
from attnopt.graph.ops import ADD, FACTORS, REARRANGED, Kind, of
from attnopt.match.find import Found, common_modules
from attnopt.slicing.selection import is_weight

PASSES = REARRANGED | of(Kind.CAST, Kind.DROPOUT)
NORMS = of(Kind.NORM)
_OTHER_PLACES = of(Kind.MOVE, Kind.SLICE, Kind.PAD)  # of tokens, as in shifted windows
_PRODUCTS = of(Kind.PRODUCT, Kind.CONVOLUTION)
START = "embedding"


@dataclass(frozen=True)
class Branch:
    """``node`` is what is added to a stream by ``add``; for the start of a stream, which nothing adds, that itself."""

    name: str
    node: fx.Node
    add: fx.Node | None
    site: str | None = None  # the attention whose output projection ends in it
    chain: tuple[fx.Node, ...] = ()  # from after that projection to ``node``


@dataclass(frozen=True)
class _Addition:
    node: fx.Node
    stream: fx.Node
    branches: tuple[fx.Node, ...]


class Residual:
    """The residual streams of a graph on which its attentions write."""

    def __init__(self, graph: fx.Graph, found: Sequence[Found]) -> None:
        self.found = {f.output_op: f.site.name for f in found if f.output_op is not None}
        self.names = [f.site.name for f in found]
        self.place = {n: i for i, n in enumerate(graph.nodes)}
        self.above: dict[fx.Node, int] = {}
        self.additions: dict[fx.Node, _Addition] = {}
        for n in graph.nodes:
            own = 0
            for i in n.all_input_nodes:
                own |= self.above[i] | 1 << self.place[i]
            self.above[n] = own
            if (addition := self._addition(n)) is not None:
                self.additions[n] = addition

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """Everything that is added to these streams, in order: their starts, attentions, and all others."""
        made: list[Branch] = []
        counted: Counter[str] = Counter()

        def named(name: str) -> str:
            counted[name] += 1
            return name if counted[name] == 1 else f"{name}#{counted[name]}"

        for stream in self._streams():
            made.append(Branch(named(START), self._up(stream[0]), None))
            for addition in stream:
                for node in addition.branches:
                    end = self._end(node)
                    if end is None:
                        made.append(Branch(named(self._name(node, addition)), node, addition.node))
                    else:
                        made.append(Branch(self.found[end[0]], node, addition.node, self.found[end[0]], end[1]))
        return tuple(made)

    @cached_property
    def of_site(self) -> Mapping[str, Branch]:
        return {b.site: b for b in self.branches if b.site is not None}

    def _addition(self, n: fx.Node) -> _Addition | None:
        if not _adds(n):
            return None
        a, b = n.args[0], n.args[1]
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        for stream, branch in ((a, b), (b, a)):
            if any(self.above[branch] >> self.place[s] & 1 for s in self._stream_above(stream)):
                return _Addition(n, stream, tuple(self._parts(branch)))
        return None

    def _stream_above(self, stream: fx.Node) -> Iterator[fx.Node]:
        """The stream, and what it was before parallel branches were added."""
        node = _behind(stream)
        yield node
        while node in self.additions:
            node = _behind(self.additions[node].stream)
            yield node

    def _parts(self, branch: fx.Node) -> Iterator[fx.Node]:
        """A sum of parallel branches, of which one is an attention, apart."""
        node = _behind(branch)
        if _adds(node) and node not in self.additions:
            parts = [p for x in node.args[:2] if isinstance(x, fx.Node) for p in self._parts(x)]
            if any(self._end(p) is not None for p in parts):
                yield from parts
                return
        yield branch

    def _end(self, node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
        """The output projection of an attention in which ``node`` ends, and the way from there."""
        chain: list[fx.Node] = []
        while node not in self.found:
            below = carried(node)
            if below is None:
                return None
            chain.append(node)
            node = below
        return node, tuple(reversed(chain))

    def _up(self, addition: _Addition) -> fx.Node:
        """The addition before, through norms and layouts, or where the stream starts."""
        node = addition.stream
        while node not in self.additions:
            if not (calls(node, PASSES) or calls(node, NORMS)) or not isinstance(node.args[0], fx.Node):
                return addition.stream
            node = node.args[0]
        return node

    def _streams(self) -> list[list[_Addition]]:
        """The chains that attentions write to."""
        first: dict[fx.Node, fx.Node] = {}
        chains: dict[fx.Node, list[_Addition]] = {}
        for n, addition in self.additions.items():
            up = self._up(addition)
            first[n] = first.get(up, n)
            chains.setdefault(first[n], []).append(addition)
        return [c for c in chains.values() if any(self._end(b) is not None for a in c for b in a.branches)]

    def _name(self, branch: fx.Node, addition: _Addition) -> str:
        """The module of its products, or of the last of them where attentions are inside that one."""
        above = self.above[branch]
        root = next((n for n in self._stream_above(addition.stream) if above >> self.place[n] & 1), branch)
        inside = [n for n, i in self.place.items() if i > self.place[root] and above >> i & 1] + [branch]
        own = module_path(_behind(branch))
        paths = [module_path(n) for n in inside if calls(n, _PRODUCTS)] or [own]
        common = (".".join(common_modules(found)) for found in ([*paths, own], paths))
        return next((name for name in common if not self._holds_attention(name)), paths[-1]) or "(root)"

    def _holds_attention(self, path: str) -> bool:
        return not path or any(name == path or name.startswith(f"{path}.") for name in self.names)


def carried(node: fx.Node) -> fx.Node | None:
    """The operand that ``node`` passes on: rearranged, cast, normalised, or multiplied by what is the same for every head."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if calls(node, PASSES) or calls(node, NORMS):
        return node.args[0]
    if calls(node, _OTHER_PLACES):
        return node.args[0] if shape(node)[-1] == shape(node.args[0])[-1] else None
    a, b = node.args[0], node.args[1] if len(node.args) > 1 else None
    if calls(node, ADD) and isinstance(b, fx.Node) and is_weight(b) and len(shape(b)) == 1:
        return a
    if not calls(node, FACTORS):
        return None
    if not isinstance(b, fx.Node) or _is_factor(b, a):
        return a
    return b if _is_factor(a, b) and is_call(node, aten.mul.Tensor) else None


def _is_factor(x: fx.Node, of_node: fx.Node) -> bool:
    """A constant, or one number for each token, as the root mean square of a norm."""
    if not is_tensor(x) or _is_constant(x):
        return True
    return len(shape(x)) == len(shape(of_node)) and shape(x)[-1] == 1 != shape(of_node)[-1]


def _is_constant(node: fx.Node) -> bool:
    """Computed from weights alone."""
    stack, seen = [node], {node}
    while stack:
        n = stack.pop()
        if n.op == "placeholder":
            return False
        fresh = [i for i in n.all_input_nodes if i not in seen]
        seen.update(fresh)
        stack += fresh
        if len(seen) > 16:  # of a weight: a cast, a sum with one, a reshape
            return False
    return True


def _adds(n: fx.Node) -> bool:
    if not is_call(n, aten.add.Tensor) or n.kwargs or not all(map(is_tensor, n.args[:2])):
        return False
    a, b = n.args[0], n.args[1]
    assert isinstance(a, fx.Node)
    assert isinstance(b, fx.Node)
    sizes = {shape(a), shape(b), shape(n)}
    return len(sizes) == 1 and len(shape(n)) >= 2 and dtype(n).is_floating_point


def _behind(node: fx.Node) -> fx.Node:
    """Behind copies, casts and layouts."""
    while calls(node, PASSES) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
