"""What heads add to a residual stream: their outputs times their rows of the output projection, and what follows it.

A scale after the projection multiplies each head's part.  A norm there is taken at its actual scale, so that the parts of
the heads and of the bias add up to what the model adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from attnopt.base.bit_table import indices
from attnopt.errors import CalibrationError
from attnopt.graph.nodes import arg, calls, opname
from attnopt.graph.ops import DIV, FACTORS
from attnopt.ir.projection import Projection
from attnopt.match.find import Found
from attnopt.observe.frozen_norms import LAYER_NORM, RMS_NORM, layer_norm, rms_norm
from attnopt.observe.residual import NORMS, Branch, carried

Values = Callable[[fx.Node], Any]


def require_projection(owner: str, f: Found, branch: Branch | None) -> None:
    """Raises CalibrationError if the site's heads have no rows of an output projection."""
    p, why = f.site.projections["out"], None
    if not f.site.spec.has_own_maps:
        why = "heads attend between channels, depend on each other, or have no softmax"
    elif p.rows is None or p.weight is None or f.output_op is None:
        why = p.why or "it was not found"
    elif any(len(rows) != f.site.value_dim for rows in p.rows):
        why = "its rows of one head are not those of one output"
    elif not p.direct:
        why = "the heads' outputs are changed before it, as by a gate"
    elif f.site.parameters[p.weight].dim() > 2 and f.site.parameters[p.weight][0, 0].numel() > 1:
        why = "it is a convolution over several tokens"
    elif (unread := next((n for n in _steps(branch) if not _is_known(n)), None)) is not None:
        why = f"{opname(unread)} follows it"
    if why is not None:
        raise CalibrationError(
            f"{owner}: its heads have no contribution of their own: the output projection cannot be read: {why}",
            site=f.site.name,
            hint='leave it out with sites=..., or ask for "outputs"',
        )


def read_for(branch: Branch | None) -> list[fx.Node]:
    """The nodes whose values ``contribution`` reads beside the heads' outputs."""
    found: list[fx.Node] = []
    for n in _steps(branch):
        if calls(n, NORMS):
            found += n.all_input_nodes
        elif isinstance(other := _factor(n), fx.Node):
            found.append(other)
    return found


def contribution(
    f: Found,
    branch: Branch | None,
    out: Tensor,
    stored: Tensor,
    places: Sequence[int],
    values: Values,
    rows: Tensor | None = None,
) -> Tensor:
    """[B, H, R, C] of the heads at these places, whose outputs are ``out`` [B, H, L, Dv].

    ``stored``: the weight of the output projection.  ``rows``: of these queries alone."""
    weight = _of_heads(f.site.projections["out"], stored, places)
    made = (out if rows is None else out.index_select(2, rows)).to(weight.dtype) @ weight

    def beside(x: Tensor) -> Tensor:
        found = _beside_heads(f, x, (out.shape[0], out.shape[2], weight.shape[2]))
        return found if rows is None or found.dim() < 4 or found.shape[2] == 1 else found.index_select(2, rows)

    for n in _steps(branch):
        made = _step(n, made, values, beside)
    return made


def _of_heads(p: Projection, stored: Tensor, places: Sequence[int]) -> Tensor:
    """[H, Dv, C]"""
    assert p.rows is not None
    by_input = stored if p.transposed else stored.flatten(1).transpose(0, 1)
    rows = [row for place in places for row in p.rows[place]]
    return by_input.index_select(0, indices(rows, stored.device)).reshape(len(places), -1, by_input.shape[1])


def _steps(branch: Branch | None) -> list[fx.Node]:
    """What changes numbers on the way from the projection to the stream."""
    return [] if branch is None else [n for n in branch.chain if calls(n, NORMS) or calls(n, FACTORS)]


def _is_known(n: fx.Node) -> bool:
    return n.target in LAYER_NORM | RMS_NORM | FACTORS


def _factor(n: fx.Node) -> object:
    """The other operand of a product or quotient."""
    return arg(n, 1) if n.args[0] is carried(n) else n.args[0]


def _step(n: fx.Node, c: Tensor, values: Values, beside: Callable[[Tensor], Tensor]) -> Tensor:
    x: Any
    if calls(n, FACTORS):
        factor = _factor(n)
        x = values(factor) if isinstance(factor, fx.Node) else factor
        if isinstance(x, Tensor):
            x = beside(x)
        made: Tensor = c / x if calls(n, DIV) else c * x
        return made
    read: Any = fx.node.map_arg(n.args, values)
    (x, *given), options = read, dict[str, Any](n.kwargs)
    if calls(n, RMS_NORM):
        return rms_norm(c, beside(x), *given, **options)
    given[2:3] = [None]  # its bias is of no head
    return layer_norm(c, beside(x), *given, **options)


def _beside_heads(f: Found, x: Tensor, tokens: tuple[int, int, int]) -> Tensor:
    """A tensor of tokens, [B|1, L|1, C|1], with an axis for the heads."""
    if x.dim() <= 1:
        return x
    B, L, C = tokens
    sizes = (1,) * (3 - x.dim()) + tuple(x.shape)
    fits = len(sizes) == 3 and all(a in (1, b) for a, b in zip(sizes, (B, L, C), strict=True))
    if not fits or (B == L > 1 and sizes[0] == sizes[1] == B):
        raise CalibrationError(
            f"what scales its output has the sizes {tuple(x.shape)}, which are not those of {B} x {L} tokens",
            site=f.site.name,
            hint='leave it out with sites=..., ask for "outputs", or pass batches of another size',
        )
    return x.reshape(sizes).unsqueeze(1)
