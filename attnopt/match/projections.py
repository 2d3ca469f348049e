"""Where queries, keys, values and outputs are projected, read by moving a selection of each head to the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from torch import fx, nn

from attnopt.graph.nodes import ancestors, arg, calls, get_attr, is_state, is_tensor, opname, shape, source_line, wrap
from attnopt.graph.ops import ADD, IN_ORDER, REARRANGED, Kind, of
from attnopt.graph.select import Selection
from attnopt.ir.projection import Projection
from attnopt.slicing.pull import pull
from attnopt.slicing.push import push
from attnopt.slicing.selection import Pulled, is_weight, trim, weight_behind


@dataclass(frozen=True)
class Landing:
    """A slice source.  ``kind``: "weight" (of a projection), "constant" (another parameter or buffer, or numbers
    of sizes alone), "token" (the input of a projection), "input" (of the model), "part" (all of one of several joined
    tensors), "blocked" (no rule for ``node``).  ``path`` leads there, and ``ways`` has the nodes of all paths:
    a rotation or a norm reads the same features twice."""

    kind: str
    node: fx.Node
    selection: Selection
    path: tuple[fx.Node, ...]
    ways: tuple[fx.Node, ...] = ()


def landings(node: fx.Node, selection: Selection, exact: bool = True) -> list[Landing]:
    """The slice sources of a selection of ``node``: the ends of its backward propagation.

    ``exact``: including slices along other axes, such as a role in a packed projection.
    """
    found: dict[tuple[fx.Node, str, tuple[tuple[int, tuple[int, ...]], ...]], Landing] = {}

    def walk(n: fx.Node, chosen: Selection, path: tuple[fx.Node, ...], in_weight: bool, is_part: bool) -> None:
        chosen = trim(n, chosen)
        if not chosen and not in_weight and not (is_part and calls(n, _ARRANGES)):
            if is_part:
                add("part", n, chosen, path)
            return
        if n.op == "get_attr" and not is_state(n):
            add("weight" if in_weight else "constant", n, chosen, path)
            return
        if n.op == "placeholder" or is_state(n):
            add("input", n, chosen, path)
            return
        pulled, left = _pulled(n, chosen) if chosen or is_part else (None, {})
        if pulled is None:
            add("constant" if _is_computed(n) else "blocked", n, chosen, path)
            return
        if left and (rest := pull(n, left)) is not None and rest.across:
            add("token", n, left, path)
        if pulled.across:
            add("token", n, chosen, path)
            return
        for i, (below, sel) in enumerate((pulled.exact if exact else None) or pulled.demands):
            walk(below, sel, (*path, n), in_weight or i in pulled.weights, is_part or _joined_along(n) in chosen)

    def add(kind: str, n: fx.Node, chosen: Selection, path: tuple[fx.Node, ...]) -> None:
        key = (n, kind, tuple(sorted((a, tuple(i)) for a, i in chosen.items())))
        known = found.setdefault(key, Landing(kind, n, chosen, (*path, n)))
        found[key] = replace(known, ways=tuple(dict.fromkeys((*known.ways, *path, n))))

    walk(node, selection, (), False, False)
    return list(found.values())


def _is_computed(node: fx.Node) -> bool:
    """From sizes alone, like positions."""
    return all(n.op == "call_function" for n in ancestors(node, stop=lambda n: not is_tensor(n)))


# Operators that return the same elements in the same order, for any selection.  A permute returns others axis by axis.
_ARRANGES = IN_ORDER | of(Kind.EXPAND, Kind.REPEAT, Kind.SLICE, Kind.PIECE, Kind.JOIN)
_JOINS = of(Kind.JOIN)
_CONVOLUTIONS = of(Kind.CONVOLUTION)
_DIRECT = REARRANGED | of(Kind.CAST, Kind.DROPOUT)


def _joined_along(node: fx.Node) -> int | None:
    return wrap(arg(node, 1, 0), len(shape(node))) if calls(node, _JOINS) else None


def _pulled(node: fx.Node, selection: Selection) -> tuple[Pulled | None, Selection]:
    """The selection propagated backward, and the axes that could not be: mixed by a norm, or tokens beside features, which
    lead to weights, unlike tokens."""
    across: tuple[Pulled | None, Selection] = None, {}
    for size in range(len(selection), 0, -1) if selection else (0,):
        for axes in combinations(sorted(selection), size):
            pulled = pull(node, {a: selection[a] for a in axes})
            left = {a: i for a, i in selection.items() if a not in axes}
            if pulled is not None and not pulled.across:
                return pulled, left
            if pulled is not None and across[0] is None:
                across = pulled, left
    return across


def signature(node: fx.Node, selection: Selection) -> frozenset[object]:
    """Equal for two selections only if they select the same values for the same reason."""
    return frozenset(
        (x.kind, x.node, tuple(sorted(x.selection.items())), frozenset(n for n in x.ways if not calls(n, _ARRANGES)))
        for x in landings(node, selection)
    )


def chooses_weights(node: fx.Node, one: Selection, other: Selection, behind: bool = False) -> bool:
    """The two selections differ along a feature axis of a projection, not along tokens or
    the batch: they come from different rows of a weight.  ``behind``: or of one above the first."""
    first, second = ({(n, tuple(sorted(c.items()))) for n, c in _rows(node, chosen, behind)} for chosen in (one, other))
    return first != second


def _rows(node: fx.Node, chosen: Selection, behind: bool) -> Iterator[tuple[fx.Node, Selection]]:
    for x in landings(node, chosen, exact=False):
        if x.kind == "weight":
            yield x.node, x.selection
        elif x.kind == "token" and behind and (pulled := pull(x.node, x.selection)) is not None:
            for above, demanded in pulled.demands:
                yield from _rows(above, demanded, behind=False)


def read_projection(node: fx.Node, axis: int, heads: int, alone: bool = True) -> tuple[Projection, tuple[fx.Node, ...]]:
    """The projection that produces the heads along ``axis`` of ``node``, and the nodes in between.

    ``alone``: heads may differ only by the projection, as merging requires.
    """
    each = [_of_head(node, axis, h) for h in range(heads)]
    dirty = _ways(each)
    blocked = next((x for found in each for x in found if x.kind == "blocked"), None)
    if blocked is not None:
        return Projection(why=_stopped_at(blocked.node), keeps_size=True), dirty
    part = next((x for found in each for x in found if x.kind == "part"), None)
    if part is not None and part.node.op == "call_function":
        return Projection(why=f"heads are computed separately, by one {opname(part.node)} each{_at(part.node)}"), dirty
    constant = next((x for found in each for x in found if x.kind == "constant" and not _is_shared(x, each)), None)
    if constant is not None and alone:
        return Projection(why=f"heads also differ by {_named(constant.node)}, which is not a projection"), dirty
    weights = [[x for x in found if x.kind == "weight"] for found in each]
    matrices = {x.node for found in weights for x in found if len(shape(x.node)) >= 2}
    vectors = {x.node for found in weights for x in found if len(shape(x.node)) == 1}
    if not matrices:
        why = "no weight produces these features: they come directly from an input or a constant"
        return Projection(why=why, keeps_size=True), dirty
    if len(matrices) > 1 or len(vectors) > 1:
        names = ", ".join(sorted(str(m.target) for m in (*matrices, *vectors)))
        return Projection(why=f"produced by several weights: {names}"), dirty
    matrix, vector = next(iter(matrices)), next(iter(vectors), None)
    projection = _from_weights(matrix, vector, weights)
    if vector is not None and projection.rows is not None and not _same_rows(vector, projection.rows, weights):
        return Projection(
            projection.weight, why=f"the rows of the bias {vector.target} differ from those of the weight"
        ), dirty
    return projection, dirty


def ways_of_head(node: fx.Node, axis: int) -> tuple[fx.Node, ...]:
    """The nodes between the first head along ``axis`` of ``node`` and the weights that make it."""
    return _ways([_of_head(node, axis, 0)])


def _of_head(node: fx.Node, axis: int, head: int) -> list[Landing]:
    found = landings(node, {axis: (head,)} if shape(node)[axis] > 1 else _one_head(node))
    return [_as_bias(x) for x in found]


def _ways(each: Sequence[Sequence[Landing]]) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(n for found in each for x in found for n in x.ways if x.kind == "weight"))


def _is_shared(constant: Landing, each: Sequence[Sequence[Landing]]) -> bool:
    """Every head uses the same selection, as with the weight of a shared norm."""
    return len(each) > 1 and all(
        any(x.node is constant.node and x.selection == constant.selection for x in found) for found in each
    )


def _as_bias(landing: Landing) -> Landing:
    """A vector that a separate operator adds to the product with a weight is the bias of the projection."""
    adds = len(landing.path) > 1 and calls(landing.path[-2], ADD)
    is_added = adds and is_tensor(arg(landing.path[-2], 1)) and len(shape(landing.node)) == 1  # 1 + weight is a factor
    return replace(landing, kind="weight") if landing.kind == "constant" and is_added else landing


def _same_rows(vector: fx.Node, rows: Sequence[tuple[int, ...]], weights: Sequence[Sequence[Landing]]) -> bool:
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


def _one_head(node: fx.Node) -> Selection:
    """With a single head, all features belong to it; select all features explicitly, in reverse order."""
    last = len(shape(node)) - 1
    return {last: tuple(reversed(range(shape(node)[last])))}


def _from_weights(matrix: fx.Node, vector: fx.Node | None, weights: Sequence[Sequence[Landing]]) -> Projection:
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


def read_output(node: fx.Node, heads: Sequence[Selection]) -> tuple[Projection, fx.Node | None]:
    """The projection that reads the heads of ``node``, each a selection of it, and its operator."""
    rows: list[tuple[int, ...]] = []
    end: tuple[fx.Node, fx.Node, int] | None = None
    direct = True
    for selection in heads:
        x = node
        while True:
            users = list(x.users)
            if len(users) != 1:
                return Projection(why=f"the output is used by {len(users)} operators", keeps_size=True), None
            pushed = push(users[0], x, selection)
            if pushed is None or not pushed.linear:
                return Projection(why=_stopped_at(users[0]), keeps_size=True), None
            if pushed.selection is None:
                break
            x, selection = users[0], pushed.selection
            direct = direct and calls(x, _DIRECT)
        weight, chosen = pushed.demands[-1]
        column, target = next(iter(chosen.items())), weight
        found = (
            landings(weight, chosen) if weight.op != "get_attr" else [Landing("constant", weight, chosen, (weight,))]
        )
        if not is_weight(weight) or len(found) != 1 or len(found[0].selection) > 1:
            return Projection(why="the weight of the output projection is computed at run time"), None
        target = found[0].node
        (at, idx), *_ = list(found[0].selection.items()) or [column]
        if end not in (None, (users[0], target, at)):
            return Projection(why="heads go to different output projections"), None
        end = (users[0], target, at)
        rows.append(tuple(idx))
    assert end is not None
    op, target, at = end
    if at > 1 or (len(shape(target)) > 2 and not is_convolution(op)):
        return Projection(str(target.target), why=f"the weight has {len(shape(target))} axes"), op
    added = [weight_behind(a) for a in op.all_input_nodes if is_tensor(a) and len(shape(a)) == 1]
    if None in added:
        return Projection(str(target.target), why="the bias of the output projection is computed at run time"), op
    return Projection(
        str(target.target),
        next((str(bias.target) for bias in added if bias is not None), None),
        at == 0,
        tuple(rows),
        direct=direct and not {"alpha", "beta"} & set(op.kwargs),
    ), op


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
