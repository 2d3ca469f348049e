"""Where the residual streams of a model end and are read for its output, and what was added to them on the way there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from attnopt.errors import RewriteError
from attnopt.graph.nodes import calls, source_line
from attnopt.graph.ops import ADD, FACTORS
from attnopt.match.find import Found
from attnopt.observe.linear_path import LinearPath
from attnopt.observe.residual import PASSES, Residual


@dataclass(frozen=True)
class Share:
    """What one path adds to a stream: ``node``.  ``heads``: the attention whose heads it sums, if they can be told apart."""

    name: str
    node: fx.Node
    heads: Found | None = None


class Readout:
    """``ends``: the last additions of streams, which later operators read for the output; ``shares``: by name, the paths that
    reach them directly, through additions, layouts and norms at their actual scales; ``others``: the names of all others.

    Raises RewriteError for a model without a residual stream.
    """

    def __init__(self, graph: fx.Graph, found: Sequence[Found]) -> None:
        residual = Residual(graph, found)
        self.ends = _ends(graph, residual)
        if not self.ends:
            raise RewriteError(
                "no attention writes to a residual stream that leads to the output, so no path is read directly",
                hint="attnopt.inspect shows which attentions were found; paths are told apart where x + attention(x) is computed",
            )
        self.path = LinearPath(graph, found, residual, self.ends)
        self.additions = residual.additions.keys()
        self.live = _above(residual, graph.output_node())
        on = {*self.path.followed, *self.path.ends}
        by_name = {f.site.name: f for f in found}
        self.shares: dict[str, Share] = {}
        for b in residual.branches:
            is_known = b.add is None and any(share.node is b.node for share in self.shares.values())
            if b.node in on and (b.add is None or b.add in on) and not is_known:  # two streams may start at one node
                f = None if b.site is None else by_name[b.site]
                told_apart = f is not None and f.raised.region.out.node in self.path.ends
                self.shares[b.name] = Share(b.name, b.node, f if told_apart else None)
        self.others = [name for name in dict.fromkeys(b.name for b in residual.branches) if name not in self.shares]

    def require_alone(self, share: Share) -> None:
        """Raises RewriteError if what the path adds goes to a sum that is no stream, which may be the real readout's."""
        if sum(other.node is share.node for other in self.shares.values()) > 1:
            raise self._added_twice(share, share.node)
        stack, seen = [share.node], {share.node}
        while stack:
            for user in stack.pop().users:
                if user in seen or user not in self.live:
                    continue
                if calls(user, ADD) and user not in self.path.followed and user not in self.additions:
                    raise self._added_twice(share, user)
                if calls(user, PASSES) or calls(user, FACTORS):
                    seen.add(user)
                    stack.append(user)

    def _added_twice(self, share: Share, where: fx.Node) -> RewriteError:
        line = source_line(where)
        return RewriteError(
            f"what {share.name!r} adds is added twice, the second time at {where.name}{line and f' ({line})'}",
            hint="give a model that has gains of paths already all of them at once, in place of path_gain of path_gain",
        )


def _ends(graph: fx.Graph, residual: Residual) -> list[fx.Node]:
    """The additions that no later one depends on."""
    live = _above(residual, graph.output_node())
    adds = [n for n in dict.fromkeys(b.add for b in residual.branches) if n is not None and n in live]
    before = 0
    for n in adds:
        before |= residual.above[n]
    return [n for n in adds if not before >> residual.place[n] & 1]


def _above(residual: Residual, node: fx.Node) -> set[fx.Node]:
    return {n for n, place in residual.place.items() if residual.above[node] >> place & 1}
