"""Queries, keys and values that no input changes, such as those of learned queries or a memory bank, computed once.

They come from parameters and buffers, repeated over the batch.  The graph then stores one of the copies, and repeats that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from attnopt.backends.attention_operator import ATTENTION, ATTENTION_WITH_LSE
from attnopt.base.closeness import ROOM, difference, tolerance
from attnopt.base.sizes import is_static
from attnopt.graph.cleanup import draws, has_effects, prune_unused_state, remove_unused_nodes
from attnopt.graph.emitter import Emitter
from attnopt.graph.evaluate import Sizes, evaluate, symbols, within
from attnopt.graph.nodes import (
    ancestors,
    aten,
    calls,
    is_call,
    is_state,
    is_tensor,
    module_path,
    opname,
    stored,
    value,
)
from attnopt.graph.ops import LAYOUT, Kind, of
from attnopt.graph.scatters import sizes_of
from attnopt.graph.sdpa import SDPA
from attnopt.graph.store import store
from attnopt.lower.attention_calls import lowered_at
from attnopt.slicing.repeated import repeats

SMALL = 1 << 20  # bytes that the results may add to a model, ...
SHARE = 0.1  # ... or this fraction of what it stores, if that is more
_CORES = frozenset((SDPA, ATTENTION, ATTENTION_WITH_LSE))
_WORK = of(Kind.PRODUCT, Kind.CONVOLUTION, Kind.NORM, Kind.SOFTMAX) | _CORES
_LAYOUT = of(*LAYOUT)
_ROLES = ("queries", "keys", "values")
_Fixed = dict[
    fx.Node, bool
]  # nodes whose values depend on no input but for its sizes; whether they depend on no free size


@dataclass(frozen=True)
class FixedOperands:
    """Operands of the attention ``site`` that are stored; ``added``: bytes that all those of the model add to it."""

    site: str
    roles: tuple[str, ...]
    added: int

    def __str__(self) -> str:
        *first, last = self.roles
        listed = f"{', '.join(first)} and {last}" if first else last
        change = f"{abs(self.added):,} bytes {'more' if self.added > 0 else 'less'} in the whole model"
        return f"no input changes the {listed}: computed once and stored ({change})"


@dataclass(frozen=True, eq=False)
class _Result:
    """What ``node`` computes: ``base``, which has length 1 along the axes on which it repeats."""

    node: fx.Node
    base: Tensor


def store_fixed_operands(gm: fx.GraphModule, *, trains: bool) -> list[FixedOperands]:
    """Compute in advance, in place, what of queries, keys and values no input changes, if that takes a product or a norm
    and the model hardly grows.

    ``trains``: parameters are left alone, because they have to receive gradients.  Otherwise what is computed from parameters
    is a parameter.
    """
    fixed = _fixed(gm, trains)
    work = _work(fixed)
    wanted = {(site, role): [n for n in _parts(x, fixed) if work[n]] for site, role, x in _operands(gm)}
    reached = {w for found in wanted.values() for n in found for w in work[n]}
    ends = [n for n in fixed if is_tensor(n) and not reached.isdisjoint(work[n]) and _is_end(n, fixed)]
    results = _small(gm, [r for n in ends if (r := _result(gm, n, fixed)) is not None])
    if not results:
        return []
    added = _added(gm, results)
    for result in results:
        _replace(gm, result)
    remove_unused_nodes(gm)
    prune_unused_state(gm)
    gm.recompile()
    return _told(wanted, set(gm.graph.nodes), added)


def _told(wanted: Mapping[tuple[str, str], Sequence[fx.Node]], left: Set[fx.Node], added: int) -> list[FixedOperands]:
    roles: dict[str, list[str]] = {}
    for (site, role), nodes in wanted.items():
        if nodes and left.isdisjoint(nodes):
            roles.setdefault(site, []).append(role)
    return [FixedOperands(site, tuple(found), added) for site, found in roles.items()]


def _operands(gm: fx.GraphModule) -> Iterator[tuple[str, str, fx.Node]]:
    """(site, role, operand) of the attention calls that lowering wrote."""
    for core in gm.graph.nodes:
        noted = lowered_at(core) if calls(core, _CORES) else None
        if noted is not None:
            yield from ((noted.site, role, x) for role, x in zip(_ROLES, core.args, strict=False) if is_tensor(x))


def _fixed(gm: fx.GraphModule, trains: bool) -> _Fixed:
    found: _Fixed = {}
    for n in gm.graph.nodes:
        if n.op == "get_attr":
            held = attrgetter(str(n.target))(gm)
            if isinstance(held, Tensor) and not (is_state(n) or held.is_meta or (trains and held.requires_grad)):
                found[n] = True
        elif is_call(n, aten.sym_size.int):
            found[n] = is_static(value(n))
        elif _is_pure(n) and all(i in found for i in n.all_input_nodes):
            found[n] = all(found[i] for i in n.all_input_nodes)
    return found


def _is_pure(n: fx.Node) -> bool:
    """Its result follows from its arguments."""
    if n.op != "call_function" or has_effects(n) or draws(n) or "empty" in opname(n):
        return False
    return isinstance(n.target, OpOverload) or getattr(n.target, "__module__", "") == "_operator"


def _work(fixed: _Fixed) -> dict[fx.Node, frozenset[fx.Node]]:
    """The products, norms and attentions that each of these nodes takes."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for n in fixed:
        own = {n} if calls(n, _WORK) else set()
        found[n] = frozenset(own.union(*(found.get(i, ()) for i in n.all_input_nodes)))
    return found


def _parts(operand: fx.Node, fixed: _Fixed) -> list[fx.Node]:
    """``operand``, or what it is joined and rearranged from, where that is fixed."""
    above = ancestors(operand, stop=lambda n: n in fixed or not calls(n, _LAYOUT))
    return [n for n in above if n in fixed and is_tensor(n)]


def _is_end(n: fx.Node, fixed: _Fixed) -> bool:
    """Something that is not fixed reads it.  An output is computed at each call: the caller may write into it."""
    return n.op == "call_function" and any(u not in fixed for u in n.users) and all(u.op != "output" for u in n.users)


def _result(gm: fx.GraphModule, n: fx.Node, fixed: _Fixed) -> _Result | None:
    """None if it depends on sizes in another way than by being repeated."""
    settled = {x for x, is_settled in fixed.items() if is_settled}
    sizes = value(n).shape
    repeated = [
        a for a, size in enumerate(sizes) if not (is_static(size) and size == 1) and repeats(n, a, settled, _CORES)
    ]
    if n not in settled and not all(is_static(s) or a in repeated for a, s in enumerate(sizes)):
        return None
    if n not in settled and not repeated:
        return None
    now = symbols(gm.graph)
    try:
        base = evaluate(gm, n, now)
        for axis in repeated:
            base = base.narrow(axis, 0, 1)
        if not all(_is_same(evaluate(gm, n, other), base) for other in _others(gm, now)):
            return None
    except Exception:  # it cannot be computed without inputs, or not at other sizes
        return None
    return _Result(n, base.contiguous().clone())


def _others(gm: fx.GraphModule, now: Sizes) -> list[Sizes]:
    return [within(gm.graph, {s: n + more for s, n in now.items()}) for more in (1, 2)] if now else []


def _is_same(found: Tensor, base: Tensor) -> bool:
    return difference([found], [base.expand(found.shape)]) <= ROOM * tolerance([found])


def _small(gm: fx.GraphModule, results: Sequence[_Result]) -> list[_Result]:
    """Without the largest, as long as the model would grow too much."""
    kept = sorted(results, key=lambda r: r.base.nbytes)
    most = max(SMALL, SHARE * _size(stored(gm).values()))
    while kept and _added(gm, kept) > most:
        kept.pop()
    return kept


def _added(gm: fx.GraphModule, results: Sequence[_Result]) -> int:
    """Bytes of the results, without those of what nothing else reads."""
    computed = {r.node for r in results}
    ends = [n for n in gm.graph.nodes if n.op == "output" or has_effects(n)]
    read = {n.target for end in ends for n in ancestors(end, stop=computed.__contains__) if n not in computed}
    gone = {name: held for name, held in stored(gm).items() if name not in read}
    kept = {id(held) for name, held in stored(gm).items() if name in read}
    return _size(r.base for r in results) - _size(held for held in gone.values() if id(held) not in kept)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum({id(t): t.nbytes for t in tensors}.values())


def _replace(gm: fx.GraphModule, result: _Result) -> None:
    node, base = result.node, result.base
    emit = Emitter(gm.graph, node)
    sizes = sizes_of(emit, node)
    if sizes is None:
        return
    read = [attrgetter(str(n.target))(gm) for n in ancestors(node) if n.op == "get_attr"]
    parameters = [x for x in read if isinstance(x, nn.Parameter)]
    trained = any(p.requires_grad for p in parameters)
    held = nn.Parameter(base, requires_grad=trained) if parameters and base.is_floating_point() else base
    name = store(gm, ".".join(filter(None, (module_path(node), "fixed"))), held)
    with gm.graph.inserting_before(node):
        made = gm.graph.get_attr(name)
    with emit.mode:
        made.meta["val"] = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if list(base.shape) != sizes:
        made = emit.call(aten.expand.default, made, sizes)
    node.replace_all_uses_with(made)
