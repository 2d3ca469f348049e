"""A graph as readable code, one node per line, and the differences between two graphs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from attnopt.graph.nodes import is_tensor, module_path, opname, shape, source_line

CONTEXT = 2  # lines around a change


@dataclass(frozen=True)
class Line:
    """One operation: its ``text`` and its origin."""

    text: str
    module: str
    where: str
    site: str | None = None  # the rewritten attention that it belongs to
    passes: str = ""
    skeleton: str = ""  # the text without the names of other nodes: equal for equivalent operations


@dataclass(frozen=True)
class Hunk:
    """Neighbouring lines that differ, each with " ", "-" or "+", and a few around them."""

    lines: tuple[tuple[str, Line], ...]

    @cached_property
    def site(self) -> str | None:
        """The attention whose rewrite caused the difference; None for nodes that became unused or shared elsewhere."""
        return _site(self.lines)

    @property
    def module(self) -> str:
        return next(line.module for sign, line in self.lines if sign != " ")

    @property
    def where(self) -> str:
        return next((line.where for sign, line in self.lines if sign != " " and line.where), "")

    @property
    def passes(self) -> str:
        return next((line.passes for sign, line in self.lines if sign == "+" and line.passes), "")


def listing(graph: fx.Graph) -> list[Line]:
    """Every operation in order; weights are inlined, as ``self.layers.0.q.weight``."""
    return [_line(node) for node in graph.nodes if node.op not in ("get_attr", "call_module")]


def differences(before: Sequence[Line], after: Sequence[Line]) -> Iterator[Hunk]:
    """The differences between two listings, in order.  Node names alone do not count."""
    old, new = ([f"{line.module} {line.skeleton}" for line in lines] for lines in (before, after))
    opcodes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    gathered: list[tuple[str, Line]] = []
    for tag, i, i_end, j, j_end in opcodes:
        if tag != "equal":
            changed = [("-", line) for line in before[i:i_end]] + [("+", line) for line in after[j:j_end]]
            if _site(gathered) is not None and _site(changed) not in (None, _site(gathered)):
                yield Hunk(tuple(gathered))
                gathered = gathered[-CONTEXT:] if gathered[-1][0] == " " else []
            gathered += changed
            continue
        same = [(" ", line) for line in after[j:j_end]]
        if gathered and len(same) <= 2 * CONTEXT:
            gathered += same
            continue
        if gathered:
            yield Hunk((*gathered, *same[:CONTEXT]))
        gathered = same[-CONTEXT:]
    if any(sign != " " for sign, _ in gathered):
        yield Hunk(tuple(gathered))


def _site(lines: Sequence[tuple[str, Line]]) -> str | None:
    return next((line.site for sign, line in lines if sign == "+" and line.site is not None), None)


def code(node: fx.Node) -> str:
    """ "softmax = softmax(masked_fill, -1)": one node as text."""
    return _code(node, lambda n: n.name)


def _line(node: fx.Node) -> Line:
    origin = node.meta.get("attnopt") or {}
    size = "x".join(map(str, shape(node))) if is_tensor(node) else ""
    comment = f"  # {size}" if size else ""
    return Line(
        text=code(node) + comment,
        module=module_path(node),
        where=source_line(node),
        site=origin.get("site"),
        passes=str(origin.get("passes", "")),
        skeleton=_code(node, lambda _: "_").partition(" = ")[2] + comment,
    )


def _code(node: fx.Node, named: Callable[[fx.Node], object]) -> str:
    if node.op == "placeholder":
        return f"{node.name} = input"
    arguments = [_text(a, named) for a in node.args]
    if node.op == "output":
        return f"return {', '.join(arguments)}"
    arguments += [
        f"{name}={_text(a, named)}" for name, a in node.kwargs.items() if name not in ("device", "pin_memory")
    ]
    return f"{node.name} = {opname(node)}({', '.join(arguments)})"


def _text(argument: object, named: Callable[[fx.Node], object]) -> str:
    if isinstance(argument, fx.Node):
        return f"self.{argument.target}" if argument.op == "get_attr" else str(named(argument))
    if isinstance(argument, (list, tuple)):
        left, right = "[]" if isinstance(argument, list) else "()"
        return left + ", ".join(_text(a, named) for a in argument) + right
    if isinstance(argument, float):
        return f"{argument:.6g}"
    return "tensor" if isinstance(argument, Tensor) else str(argument)
