"""Where queries, keys, values and outputs are projected, read by moving a selection of each head to the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from attnopt.graph.nodes import ancestors, arg, between, calls, get_attr, is_tensor, opname, shape, source_line
from attnopt.graph.ops import ADD, REARRANGED, Kind, of
from attnopt.graph.select import Selection
from attnopt.ir.projection import Projection
from attnopt.slicing.push import Pushed, push
from attnopt.slicing.selection import is_weight, weight_behind
from attnopt.slicing.sources import Source, slice_sources

_CONVOLUTIONS = of(Kind.CONVOLUTION)
_DIRECT = REARRANGED | of(Kind.CAST, Kind.DROPOUT)


def read_projection(
    node: fx.Node, axis: int, heads: int, alone: bool = True, features: int = 3
) -> tuple[Projection, tuple[fx.Node, ...]]:
    """The projection that produces the heads along ``axis`` of ``node`` and their ``features``, and the nodes in between.

    ``alone``: heads may differ only by the projection, as merging requires.
    """
    each = [_of_head(node, axis, h, features) for h in range(heads)]
    return _unseparated(each, alone) or _of_weights(each), _on_ways(node, each)


def _unseparated(each: Sequence[Sequence[Source]], alone: bool) -> Projection | None:
    """An unknown projection, with the reason, if a source is in the way of the weights."""
    first: dict[str, Source] = {}
    for x in (x for found in each for x in found if x.kind != "constant" or not _is_shared(x, each)):
        first.setdefault(x.kind, x)
    if blocked := first.get("blocked"):
        return Projection(why=_stopped_at(blocked.node), keeps_size=True)
    if (part := first.get("part")) and part.node.op == "call_function":
        return Projection(why=f"heads are computed separately, by one {opname(part.node)} each{_at(part.node)}")
    if alone and (constant := first.get("constant")):
        return Projection(why=f"heads also differ by {_named(constant.node)}, which is not a projection")
    return None


def _of_weights(each: Sequence[Sequence[Source]]) -> Projection:
    """The one weight, with its bias, that the sources of all heads lie in."""
    weights = [[x for x in found if x.kind == "weight"] for found in each]
    matrices = {x.node for found in weights for x in found if len(shape(x.node)) >= 2}
    vectors = {x.node for found in weights for x in found if len(shape(x.node)) == 1}
    if not matrices:
        why = "no weight produces these features: they come directly from an input or a constant"
        return Projection(why=why, keeps_size=True)
    if len(matrices) > 1 or len(vectors) > 1:
        names = ", ".join(sorted(str(m.target) for m in (*matrices, *vectors)))
        return Projection(why=f"produced by several weights: {names}")
    matrix, vector = next(iter(matrices)), next(iter(vectors), None)
    projection = _from_weights(matrix, vector, weights)
    if vector is not None and projection.rows is not None and not _same_rows(vector, projection.rows, weights):
        return Projection(
            projection.weight, why=f"the rows of the bias {vector.target} differ from those of the weight"
        )
    return projection


def ways_of_head(node: fx.Node, axis: int) -> tuple[fx.Node, ...]:
    """The nodes between the first head along ``axis`` of ``node`` and the weights that make it."""
    return _on_ways(node, [_of_head(node, axis, 0)])


def _of_head(node: fx.Node, axis: int, head: int, features: int = 3) -> list[Source]:
    found = slice_sources(node, {axis: (head,)}) if shape(node)[axis] > 1 else _one_head(node, features)
    return [_as_bias(x) for x in found]


def _on_ways(node: fx.Node, each: Sequence[Sequence[Source]]) -> tuple[fx.Node, ...]:
    """The weights, and all that is computed between their products and ``node``: a way may pass over an operator, such as
    one that returns several tensors."""
    ways = dict.fromkeys(n for found in each for x in found for n in x.ways if x.kind == "weight")
    return (*ways, *between([n for n in ways if n.op == "call_function"], [node]))


def _is_shared(constant: Source, each: Sequence[Sequence[Source]]) -> bool:
    """Every head uses the same selection, as with the weight of a shared norm; a single head shares all with itself."""
    return len(each) == 1 or all(
        any(x.node is constant.node and x.selection == constant.selection for x in found) for found in each
    )


def _as_bias(source: Source) -> Source:
    """A vector that a separate operator adds to the product with a weight is the bias of the projection."""
    adds = len(source.path) > 1 and calls(source.path[-2], ADD)
    is_added = adds and is_tensor(arg(source.path[-2], 1)) and len(shape(source.node)) == 1  # 1 + weight is a factor
    return replace(source, kind="weight") if source.kind == "constant" and is_added else source


def _same_rows(vector: fx.Node, rows: Sequence[tuple[int, ...]], weights: Sequence[Sequence[Source]]) -> bool:
    """The bias is a parameter, and a head's rows in it are its rows in the weight."""
    owner = vector.graph.owning_module
    assert owner is not None
    if not isinstance(get_attr(owner, str(vector.target)), nn.Parameter):
        return False
    for mine, found in zip(rows, weights, strict=True):
        chosen = {i for x in found if x.node is vector for i in x.selection.get(0, range(shape(vector)[0]))}
        if chosen != set(mine):
            return False
    return True


def _one_head(node: fx.Node, features: int) -> list[Source]:
    """With a single head, all features belong to it: in reverse order, so that they count as selected; where some are joined,
    as a rotation does, a quarter at a time, so that none of what is joined is whole."""
    size = shape(node)[features]
    found = slice_sources(node, {features: tuple(reversed(range(size)))})
    if all(x.kind not in ("blocked", "part") for x in found):
        return found
    quarters = [x for n in range(4) for x in slice_sources(node, {features: tuple(range(n, size, 4))})]
    return [x for x in quarters if x.kind != "part" or _has_weights(x.node)]


def _has_weights(node: fx.Node) -> bool:
    """Unlike positions."""
    return any(n.op == "get_attr" for n in ancestors(node))


def _from_weights(matrix: fx.Node, vector: fx.Node | None, weights: Sequence[Sequence[Source]]) -> Projection:
    rows: list[tuple[int, ...]] = []
    axes: set[int] = set()
    for found in weights:
        mine = [x for x in found if x.node is matrix]
        if len({x.selection.keys().__iter__().__next__() if x.selection else -1 for x in mine}) != 1:
            return Projection(str(matrix.target), why="the rows of a head span several axes of the weight")
        indices: dict[int, None] = {}
        for x in mine:
            if len(x.selection) > 1:
                return Projection(str(matrix.target), why="the rows of a head span several axes of the weight")
            (axis, idx), *_ = list(x.selection.items()) or [(0, tuple(range(shape(matrix)[0])))]
            axes.add(axis)
            indices.update(dict.fromkeys(idx))
        rows.append(tuple(sorted(indices)))
    bias = None if vector is None else str(vector.target)
    if len(axes) != 1 or axes - {0, 1} or (1 in axes and len(shape(matrix)) != 2):
        axis_names = ", ".join(map(str, sorted(axes)))
        return Projection(
            str(matrix.target),
            bias,
            why=f"heads lie along axis {axis_names} of a weight with {len(shape(matrix))} axes",
        )
    if len(shape(matrix)) > 2 and not all(is_convolution(x.path[-2]) for found in weights for x in found):
        return Projection(str(matrix.target), bias, why=f"the weight has {len(shape(matrix))} axes")
    return Projection(str(matrix.target), bias, transposed=axes == {1}, rows=tuple(rows))


def is_convolution(node: fx.Node) -> bool:
    return calls(node, _CONVOLUTIONS)


def _named(node: fx.Node) -> str:
    return str(node.target) if node.op == "get_attr" else f"{opname(node)}{_at(node)}"


def _stopped_at(node: fx.Node) -> str:
    return f"heads cannot be separated before {opname(node)}{_at(node)}"


def _at(node: fx.Node) -> str:
    line = source_line(node)
    return f" ({line})" if line else ""


@dataclass(frozen=True)
class _Reader:
    """Where one head is read: the indices ``rows`` along ``axis`` of ``weight``, by the operator ``op``."""

    op: fx.Node
    weight: fx.Node
    axis: int
    rows: tuple[int, ...]
    direct: bool


class _UnreadError(Exception):
    """No known weight reads a head."""

    def __init__(self, why: str, keeps_size: bool = False) -> None:
        super().__init__(why)
        self.unknown = Projection(why=why, keeps_size=keeps_size)


def read_output(node: fx.Node, heads: Sequence[Selection]) -> tuple[Projection, fx.Node | None]:
    """The projection that reads the heads of ``node``, each a selection of it, and its operator."""
    try:
        readers = [_reader_of(node, selection) for selection in heads]
    except _UnreadError as e:
        return e.unknown, None
    if len({(r.op, r.weight, r.axis) for r in readers}) > 1:
        return Projection(why="heads go to different output projections"), None
    op, weight, axis = readers[0].op, readers[0].weight, readers[0].axis
    if axis > 1 or (len(shape(weight)) > 2 and not is_convolution(op)):
        return Projection(str(weight.target), why=f"the weight has {len(shape(weight))} axes"), op
    added = [weight_behind(a) for a in op.all_input_nodes if is_tensor(a) and len(shape(a)) == 1]
    if None in added:
        return Projection(str(weight.target), why="the bias of the output projection is computed at run time"), op
    return Projection(
        str(weight.target),
        next((str(bias.target) for bias in added if bias is not None), None),
        transposed=axis == 0,
        rows=tuple(r.rows for r in readers),
        direct=all(r.direct for r in readers) and not {"alpha", "beta"} & set(op.kwargs),
    ), op


def _reader_of(node: fx.Node, selection: Selection) -> _Reader:
    """Follow a head of ``node`` forward to the weight that mixes it with the others.  Raises _UnreadError."""
    direct = True
    while True:
        op, pushed = _only_user(node, selection)
        if pushed.selection is None:
            break
        node, selection = op, pushed.selection
        direct = direct and calls(node, _DIRECT)
    weight, columns = pushed.demands[-1]
    whole = [
        Source("constant", weight, columns, (weight,))
    ]  # a stored weight needs no search, not even for all columns
    found = whole if weight.op == "get_attr" else slice_sources(weight, columns)
    if not is_weight(weight) or len(found) != 1 or len(found[0].selection) > 1:
        raise _UnreadError("the weight of the output projection is computed at run time")
    (axis, rows), *_ = (found[0].selection or columns).items()
    return _Reader(op, found[0].node, axis, tuple(rows), direct)


def _only_user(node: fx.Node, selection: Selection) -> tuple[fx.Node, Pushed]:
    users = list(node.users)
    if len(users) != 1:
        raise _UnreadError(f"the output is used by {len(users)} operators", keeps_size=True)
    pushed = push(users[0], node, selection)
    if pushed is None or not pushed.linear:
        raise _UnreadError(_stopped_at(users[0]), keeps_size=True)
    return users[0], pushed


def weight_path(op: fx.Node, names: set[str]) -> list[fx.Node]:
    """From an operand of ``op`` up to the parameter among ``names`` that it is a layout change of."""
    for operand in op.all_input_nodes:
        if not is_weight(operand):
            continue
        path = [operand]
        while path[-1].op != "get_attr":
            above = path[-1].args[0]
            assert isinstance(above, fx.Node)
            path.append(above)
        if str(path[-1].target) in names:
            return path
    raise AssertionError(f"{op.name} does not read {sorted(names)}")
