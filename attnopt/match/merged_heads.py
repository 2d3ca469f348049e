"""Heads that share an axis with a batch, where no reshape tells the two apart: told by the weights that each place reads."""

from __future__ import annotations

from attnopt.base.sizes import at_double_sizes, is_static
from attnopt.graph.axes import Atom, length, resolve, resolve_all
from attnopt.graph.nodes import shape, value
from attnopt.match.read_scores import Operand
from attnopt.match.region import Region, atoms_of, picked
from attnopt.match.rejection import IN_ONE_ORDER, rejected
from attnopt.slicing.sources import weight_rows

Rows = list[frozenset[object]]  # of weights, that each place along an atom reads


def take_apart(r: Region) -> None:
    """Split each axis of ``r`` that has heads and a batch, as a reshape to both would.  Raises NotAttentionError if the places
    read weights in no such order."""
    for atom in (atoms_of(r.q.axes) & atoms_of(r.k.axes)) - set(resolve(r.features)):
        if not _varies(r.q, atom):
            continue
        rows = _rows(r.q, atom)
        if len(set(rows)) == atom.size:  # heads alone
            continue
        parts = _parts(rows)
        if parts is not None and all(_agree(rows, _rows(o, atom)) for o in (r.k, r.v) if atom in atoms_of(o.axes)):
            outer, heads, run = parts
            is_outer_fixed, is_run_fixed = _fixed(r.q, atom, parts)
            each = (Atom(outer, fixed=is_outer_fixed), Atom(heads), Atom(run, fixed=is_run_fixed))
            atom.parts = tuple(a for a in each if a.size > 1)
        elif rows[0] != rows[1] and rows[-2] != rows[-1]:  # which would be heads
            expected = "heads on an axis of their own, or merged with a batch in one order"
            found = f"{atom.size} places of one axis, some of which read the same rows of a weight"
            raise rejected(r.anchor or r.out.node, "merged-heads", expected, found, IN_ONE_ORDER)


def _varies(o: Operand, atom: Atom) -> bool:
    """The first and the last place read other rows."""
    first, last = (weight_rows(o.node, picked(o, atom, i)) for i in (0, atom.size - 1))
    return bool(first) and bool(last) and first != last


def _rows(o: Operand, atom: Atom) -> Rows:
    return [weight_rows(o.node, picked(o, atom, i)) for i in range(atom.size)]


def _parts(rows: Rows) -> tuple[int, int, int] | None:
    """How many places lie outside the heads, are heads, and lie inside, if that is the order."""
    heads = list(dict.fromkeys(rows))
    run = next((i for i, own in enumerate(rows) if own != rows[0]), len(rows))
    outer, rest = divmod(len(rows), run * len(heads))
    if rest or any(own != heads[i // run % len(heads)] for i, own in enumerate(rows)):
        return None
    return outer, len(heads), run


def _fixed(o: Operand, atom: Atom, parts: tuple[int, int, int]) -> tuple[bool, bool]:
    """Whether what lies outside and inside the heads is known to be as long for any inputs: it is as long at double sizes."""
    i, axis = next((i, axis) for i, axis in enumerate(resolve_all(o.axes)) if atom in axis)
    if is_static(value(o.node).shape[i]):
        return True, True
    with at_double_sizes():
        double = _parts([weight_rows(o.node, {i: (place,)}) for place in range(shape(o.node)[i])])
    at, (outer, heads, run) = axis.index(atom), parts
    if double is None or double[1] != heads:
        return False, False
    return double[0] == outer * length(axis[:at]), double[2] == run * length(axis[at + 1 :])


def _agree(rows: Rows, others: Rows) -> bool:
    """Places that read one head of the queries read one head here, too."""
    return len(set(zip(rows, others, strict=True))) == len(set(rows))
