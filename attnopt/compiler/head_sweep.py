"""The rest of a model after one attention, for one output of its heads after another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import ROOM, difference, tolerance
from attnopt.capture.program import Program
from attnopt.compiler.graph_output import leaves_of, output_of
from attnopt.compiler.head_graph import HeadGraph
from attnopt.graph.nodes import shape
from attnopt.graph.resume import Call, Part, Stacker

ROWS = {"cpu": 512, "cuda": 16384}  # tokens in one product of weights, beyond which stacking gains nothing
BYTES = 1 << 28  # of the largest tensor of a stack

Rest = Callable[[Iterable[Tensor]], Iterator[Any]]  # outputs of heads [B, H, L, Dv] -> the model's outputs


class HeadSweep:
    """A captured model whose calls stop at each attention; what comes before it is computed once.

    What comes after runs for several outputs of its heads at a time where that pays.  Nothing is kept of a call but what
    something later reads.
    """

    def __init__(self, program: Program, graph: HeadGraph, swept: Collection[str] | None = None) -> None:
        """``graph``: of the module of ``program``.  ``swept``: the sites to stop at; all by default."""
        self.program, self.graph = program, graph
        self.nodes = {n: o for n, o in self.graph.outputs.items() if swept is None or n in swept}
        self.ends = [n for n in dict.fromkeys(leaves_of(graph.module.graph)) if isinstance(n, fx.Node)]
        self.parts: dict[str, Part] = {}
        self.stacker = Stacker(agree)

    def call(self, batch: CallInputs) -> Call:
        """A call that stops at the sites."""
        return self.call_to(self.nodes.values(), batch)

    def call_to(
        self, stops: Collection[fx.Node], batch: CallInputs, given: Mapping[fx.Node, Any] | None = None
    ) -> Call:
        """A call that stops at these nodes.  ``given``: values of others, which then are not computed."""
        call = Call(self.graph.module, batch, stops, self.ends)
        call.values.update(given or {})
        return call

    def output(self, batch: CallInputs, given: Mapping[fx.Node, Any] | None = None) -> Any:
        """The model's output."""
        found = self.values(self.ends, batch, given)
        return self.told([_own(found[n]) for n in self.ends], batch)

    def values(
        self, nodes: Collection[fx.Node], batch: CallInputs, given: Mapping[fx.Node, Any] | None = None
    ) -> dict[fx.Node, Any]:
        """Of these nodes in one call."""
        return self.call_to(nodes, batch, given).read(nodes)

    def sites(self, batch: CallInputs) -> Iterator[tuple[str, Tensor, Rest]]:
        """For each site, as they run: its name, the outputs of its heads [B, H, L, Dv], and the rest of the model."""
        call = self.call(batch)
        for name, node in self.nodes.items():
            call.up_to(node)
            yield name, call(node), self.rest(name, call, batch)

    def rest(self, name: str, call: Call, batch: CallInputs) -> Rest:
        """What follows the site where ``call`` has come to."""
        node = self.nodes[name]
        if name not in self.parts:
            self.parts[name] = Part(self.graph.module.graph, [node], self.ends)
        part = self.parts[name]
        fixed = {*part.reads}

        def run(outputs: Iterable[Tensor]) -> Iterator[Any]:
            around = call.around(part)
            for values in self.stacker.each(
                part, around, ((o,) for o in outputs), self.at_once(part, call.values[node])
            ):
                yield self.told([_own(x) if n in fixed else x for n, x in zip(self.ends, values, strict=True)], batch)

        return run

    def at_once(self, part: Part, o_BHLD: Tensor) -> int:
        """How many values of ``part`` to stack."""
        rows = max(1, o_BHLD.shape[0] * o_BHLD.shape[2])
        batch, _, queries, _ = shape(part.starts[0])
        bytes_each = part.largest * rows / max(1, batch * queries)
        return int(max(1, min(ROWS.get(o_BHLD.device.type, ROWS["cuda"]) // rows, BYTES // max(1, bytes_each))))

    def told(self, values: Sequence[Any], batch: CallInputs) -> Any:
        """The output of the user's model with these values of ``ends``."""
        return output_of(self.program, self.graph.module.graph, dict(zip(self.ends, values, strict=True)), batch)


def with_each(o_BHLD: Tensor, other_BHLD: Tensor, places: Iterable[int]) -> Iterator[Tensor]:
    """``o`` with each of these heads, alone, from ``other`` [B, H, L, D] or broadcast."""
    for place in places:
        changed = o_BHLD.clone()
        changed[:, place] = other_BHLD[:, place]
        yield changed


def _own(x: Any) -> Any:
    """A metric may write into what it is given."""
    return x.clone() if isinstance(x, Tensor) else x


def agree(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    return difference(got, want) <= ROOM * tolerance(want)
