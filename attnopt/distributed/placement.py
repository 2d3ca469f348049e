"""Which form of each value of a graph a rank needs: its own tokens of it, or all of it.

Behind the first attention, every tensor is that of the rank's own tokens, so each operator between two attentions has to act
token by token.  What attentions do not reach, as masks and tables of positions, is cut as early as its operators allow; the rest
is computed whole on every rank, from whole inputs.  So positions are those of the whole sequence by construction.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from attnopt.distributed.attention_arguments import AttentionCall
from attnopt.distributed.token_rules import ATTENTIONS, Call, Needed, Tokens, draws, moved, needed
from attnopt.errors import DistributedError
from attnopt.graph.nodes import calls, operand, opname, source_line
from attnopt.graph.ops import Kind, of
from attnopt.lower.attention_calls import lowered_at

Form = Tokens | None  # the own tokens, which lie there; None: all
ON_ONE_RANK = "run this model on one rank"


@dataclass(eq=False)
class Placement:
    """``values``: of every node at the sizes of the call.  ``places``: of what attentions reach, where its tokens lie; None if it
    is no function of each token.  ``wanted``: the forms that are computed."""

    graph: fx.Graph
    values: Mapping[fx.Node, Any]
    cores: Mapping[fx.Node, AttentionCall]
    length: int
    by_heads: Collection[fx.Node] = ()  # of the cores
    places: dict[fx.Node, Form] = field(default_factory=dict)
    wanted: dict[fx.Node, dict[Form, Needed]] = field(default_factory=dict)  # with what they are computed from

    def place(self) -> None:
        """Forward from the attentions."""
        for node in self.graph.nodes:
            if node in self.cores:
                self.places[node] = Tokens(2)
            elif (
                node.op == "call_function"
                and not self.is_number(node)
                and any(n in self.places for n in node.all_input_nodes)
            ):
                self.places[node] = self._placed(node)

    def want(self, forms: Mapping[fx.Node, Form]) -> None:
        """Backward from the outputs.  Raises DistributedError where an attention needs more than the own tokens of another."""
        asked = dict[fx.Node, list[Form]]()

        def ask(node: fx.Node, form: Form) -> None:
            if not self.is_number(node):
                asked.setdefault(node, []).append(form)

        for node, form in forms.items():
            ask(node, form)
        for node in reversed(list(self.graph.nodes)):
            while todo := asked.get(node):
                form = todo.pop()
                if form in self.wanted.setdefault(node, {}):
                    continue
                self.wanted[node][form] = need = self._needed(node, form)
                for n, of_n in need.items():
                    ask(n, of_n)

    def is_number(self, node: fx.Node) -> bool:
        return isinstance(self.values.get(node), (int, float, bool))

    def forms(self, node: fx.Node) -> list[Form]:
        """The wanted ones, each after those that it is made of."""
        whole_last = self.places.get(node) is not None
        return sorted(self.wanted.get(node, ()), key=lambda form: (form is None) is whole_last)

    def _placed(self, node: fx.Node) -> Form:
        above = {n: self.places[n] for n in node.all_input_nodes if n in self.places and not self.is_number(n)}
        if None in above.values():
            return None
        for at in self._candidates(node, {at for at in above.values() if at is not None}):
            need = needed(self._call(node), at)
            if need is not None and all(need.get(n) == place for n, place in above.items()):
                return at
        return None

    def _candidates(self, node: fx.Node, above: set[Tokens]) -> list[Tokens]:
        made = self.values[node]
        if calls(node, of(Kind.RESHAPE, Kind.ONES)):
            sizes = tuple(self.values[operand(node)].shape)
            there = [moved(at, sizes, tuple(made.shape), self.length) for at in above]
            return [at for at in there if at is not None]
        ndim = made.dim() if isinstance(made, Tensor) else max((at.axis for at in above), default=0) + 1
        return [at.on(axis) for at in above for axis in range(ndim)]

    def _needed(self, node: fx.Node, form: Form) -> Needed:
        """What the node is computed from in this form: itself in the other one, if it is collected or cut."""
        at = self.places.get(node)
        if form is None:
            return dict.fromkeys(node.all_input_nodes) if at is None else {node: at}
        if node in self.cores and form == at:
            return self.cores[node].needed(self.values, self.length, node in self.by_heads)
        need = needed(self._call(node), form) if node.op == "call_function" else None
        if need is None and node in self.places:
            raise _refused(node)
        return {node: None} if need is None else need

    def _call(self, node: fx.Node) -> Call:
        return Call(node, self.values, self.length)


def is_between_channels(node: fx.Node) -> bool:
    noted = lowered_at(node)
    return noted is not None and noted.spec.between_channels


def at_node(node: fx.Node, why: str, hint: str | None = None) -> DistributedError:
    line = source_line(node)
    return DistributedError(f"{opname(node)}{f' ({line})' if line else ''} {why}", hint=hint)


def _refused(node: fx.Node) -> DistributedError:
    if draws(node):
        return at_node(
            node, "draws random numbers, on each rank others", "call model.eval() before optimizing the model"
        )
    if is_between_channels(node):
        return at_node(node, "is an attention between channels, which every token changes", ON_ONE_RANK)
    if calls(node, ATTENTIONS):
        return at_node(
            node,
            "reads other tokens than those that ranks share, and compares positions, chooses keys or pools them",
            ON_ONE_RANK,
        )
    if (site := node.meta.get("attnopt", {}).get("site")) is not None:
        why = f"its {opname(node)} reads the tokens of all ranks: it is computed in plain operators"
        return DistributedError(why, site=site, hint=ON_ONE_RANK)
    return at_node(
        node,
        "between two attentions mixes tokens or tells them apart, so that a rank would need those of all ranks",
        "run this model on one rank, or move the operator behind the last attention",
    )
