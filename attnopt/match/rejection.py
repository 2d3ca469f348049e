"""Why something that looks like an attention is not raised."""

from __future__ import annotations

from torch import fx

from attnopt.graph.nodes import opname, source_line
from attnopt.ir.refusal import Refusal

IN_ONE_ORDER = "merge queries, keys and values in one order, or keep [batch, heads, tokens, features]"


class NotAttentionError(Exception):
    """It is no attention, or none that can be expressed.  ``node``: the first that differs, where that is known;
    ``near``: it came close enough to be listed as a near miss."""

    def __init__(self, refusal: Refusal, node: fx.Node | None = None, near: bool = True) -> None:
        self.refusal, self.node, self.near = refusal, node, near
        super().__init__(str(refusal))


def rejected(node: fx.Node, code: str, expected: str, found: str, hint: str = "") -> NotAttentionError:
    """The refusal points at the line of ``node``."""
    return NotAttentionError(Refusal(code, expected, found, source_line(node), hint), node)


def unreadable(node: fx.Node, expected: str) -> NotAttentionError:
    return rejected(node, "unreadable-layout", expected, f"{node.name} = {opname(node)}")


def weights_changed(node: fx.Node) -> NotAttentionError:
    return rejected(
        node,
        "weights-changed",
        "weights that feed directly into the value product",
        f"{node.name} = {opname(node)} on the weights",
        "weights that an input mixes or gates after the softmax, or masked unlike the scores, are not supported",
    )
