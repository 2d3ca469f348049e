"""Users of the scores or weights of an attention outside it."""

from __future__ import annotations

from torch import fx
from torch.utils import _pytree as pytree

from attnopt.graph.nodes import calls, module_path, source_line
from attnopt.graph.ops import REARRANGED, Kind, named, of
from attnopt.match.region import Region

_ON_THE_WAY = REARRANGED | of(Kind.CAST) | named("mean")


def where_used(region: Region) -> str:
    """ "returned as output['attentions'][0]", or "used by mul_3 (aux, model.py:12)"."""
    inside, told = set(region.nodes), list[str]()
    for node in region.escapes:
        for user in node.users:
            if user not in inside:
                told.append(_end(user, node))
    return ", ".join(dict.fromkeys(told))


def _end(user: fx.Node, value: fx.Node) -> str:
    first = user
    while user.op != "output" and calls(user, _ON_THE_WAY) and len(user.users) == 1:
        user, value = next(iter(user.users)), user
    if user.op == "output":
        return f"returned{_place(user, value)}"
    owner, line = module_path(first), source_line(first)
    where = ", ".join(part for part in (owner, line) if part)
    return f"used by {first.name}" + (f" ({where})" if where else "")


def _place(output: fx.Node, value: fx.Node) -> str:
    """Its name in the output, if there are several."""
    leaves = pytree.tree_leaves(output.args[0])
    spec = getattr(output.graph.owning_module, "_out_spec", None)
    if spec is None or spec.num_leaves != len(leaves):
        return ""
    names = pytree.tree_flatten_with_path(pytree.tree_unflatten(leaves, spec))[0]
    found = next((pytree.keystr(path) for path, leaf in names if leaf is value), "")
    return f" as output{found}" if found else ""
