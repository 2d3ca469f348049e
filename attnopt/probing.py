"""Reading masks by evaluation: run the part of a graph that makes a mask, and compare what comes out with known patterns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.graph import (
    ancestors,
    constant_of,
    get_attr,
    hint,
    is_state,
    is_static,
    opname,
    run_call,
    value,
    with_values,
)
from attnopt.patterns import Causal, Full, Pattern, Window

HEAVY = (
    "linear",
    "matmul",
    "bmm",
    "mm",
    "addmm",
    "baddbmm",
    "einsum",
    "convolution",
    "conv1d",
    "conv2d",
    "embedding",
    "scaled_dot_product_attention",
    "softmax",
    "layer_norm",
)
_APART = 200.0  # a softmax sees nothing of a score that lies this far below another, both with room for their products
_RANDOM = ("rand", "randn", "randint", "bernoulli", "dropout", "randperm", "uniform", "normal")


def inputs_behind(node: fx.Node) -> set[fx.Node]:
    """The inputs, and the state that calls leave, whose values (not merely sizes) ``node`` depends on."""
    known = node.meta.get(_INPUTS)
    if known is None:
        _note_inputs(node)
        known = node.meta[_INPUTS]
    return set(known)


_INPUTS = "attnopt.inputs"  # remembered on the nodes: a graph that only grows keeps its answers


def _note_inputs(node: fx.Node) -> None:
    stack = [node]
    while stack:
        n = stack[-1]
        above = [] if _is_number(n) else [i for i in n.all_input_nodes if _INPUTS not in i.meta]
        if above:
            stack.extend(above)
            continue
        stack.pop()
        own = {n} if n.op == "placeholder" or is_state(n) else set()
        n.meta[_INPUTS] = frozenset(
            own.union(*(i.meta[_INPUTS] for i in n.all_input_nodes)) if not _is_number(n) else own
        )


def _is_number(node: fx.Node) -> bool:
    return (
        isinstance(value(node), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)) and node.op != "placeholder"
    )


def is_plain(node: fx.Node) -> bool:
    """``node`` is made of index arithmetic and constants alone: cheap to run, and the same at every call.

    A parameter is no constant, whatever it holds now: a bias table of zeros is still to be learned.  Nor is a buffer on the
    meta device, which holds nothing yet.
    """
    return not any(_is_varying(n) for n in ancestors(node, stop=_is_number))


def _is_varying(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return constant_of(node) is None
    return opname(node) in HEAVY or opname(node) in _RANDOM


def may_hide(node: fx.Node, fill: float) -> bool:
    """What is added to the scores may be a mask, beside which a score of ``fill`` is seen.

    It is none where activations made it and no number as large stands in it (what is large may be subtracted), or where its
    own numbers are known.
    """
    gm = node.graph.owning_module
    assert isinstance(gm, fx.GraphModule)
    made = list(ancestors(node, stop=lambda n: opname(n) in HEAVY))
    constants = [get_attr(gm, str(n.target)) for n in made if n.op == "get_attr"]
    if any((n.op == "placeholder" and not _is_number(n)) or is_state(n) for n in made):
        return True
    if any(c.is_meta for c in constants):
        return True
    limit = -fill - _APART
    if inputs_behind(node):
        large = [x for n in made for x in _literals(n) if abs(x) > limit]
        return bool(large) or any(_holds_large(c, limit) for c in constants)
    return any(_holds_large(evaluate(gm, node, sizes), limit) for sizes in other_sizes(symbols(gm.graph)))


def _holds_large(x: Tensor, limit: float) -> bool:
    return bool(((x > limit) | (x < -limit)).any())


def _literals(node: fx.Node) -> list[float]:
    """Every number among the arguments of a call."""
    leaves = torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
    return [float(x) for x in leaves if isinstance(x, (int, float))]


def symbols(graph: fx.Graph) -> dict[Any, int]:
    """Every symbol of the graph's sizes with its example value."""
    return {s.node.expr: hint(s) for s in _free(graph)}


def within(graph: fx.Graph, sizes: Mapping[Any, int]) -> dict[Any, int]:
    """These sizes of the graph's symbols, brought into the bounds within which it holds."""
    found = dict(sizes)
    for s in _free(graph):
        lower, upper = bounds(s)
        found[s.node.expr] = max(lower, found[s.node.expr] if upper is None else min(upper, found[s.node.expr]))
    return found


def _free(graph: fx.Graph) -> list[torch.SymInt]:
    found = [value(n) for n in graph.nodes if n.op == "placeholder"]
    sizes = [s for val in found for s in (val.shape if isinstance(val, Tensor) else (val,))]
    return [s for s in sizes if isinstance(s, torch.SymInt) and s.node.expr.is_symbol]


def bounds(size: torch.SymInt) -> tuple[int, int | None]:
    """The sizes from and to which a graph holds; None without an end."""
    known = size.node.shape_env.bound_sympy(size.node.expr)
    lower, upper = (int(b) if getattr(b, "is_Integer", False) else None for b in (known.lower, known.upper))
    return lower or 0, upper


def dynamic_axes(graph: fx.Graph) -> set[tuple[str, int]]:
    """The input axes whose size may vary, by the input's name."""
    inputs = [n for n in graph.nodes if n.op == "placeholder" and isinstance(value(n), Tensor)]
    return {(n.name, axis) for n in inputs for axis, size in enumerate(value(n).shape) if not is_static(size)}


def evaluate(gm: fx.GraphModule, node: fx.Node, sizes: Mapping[Any, int], fill: Any = None) -> Tensor:
    """The value of ``node`` when the graph's symbols have ``sizes``; placeholders are filled with ``fill``.

    Raises ValueError where an input's value is needed and ``fill`` is None.
    """
    env: dict[fx.Node, Any] = {}

    def number(s: Any) -> int:
        return s if isinstance(s, int) else int(s.node.expr.subs(sizes))

    def concrete(n: fx.Node) -> Any:
        val = value(n)
        if isinstance(val, torch.SymInt):
            return number(val)
        if n.op == "get_attr" and not is_state(n):
            return get_attr(gm, str(n.target)).detach()
        if n.op in ("placeholder", "get_attr"):
            if fill is None or not isinstance(val, Tensor):
                raise ValueError(f"depends on the input {n.name}")
            dims = [number(s) for s in val.shape]
            return torch.full(dims, fill, dtype=val.dtype, device=with_values(val.device))
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda i: env[i])
        return run_call(n, args, kwargs)

    wanted = set(ancestors(node, stop=_is_number))
    with torch.no_grad():
        for n in gm.graph.nodes:
            if n in wanted:
                env[n] = concrete(n)
            if n is node:
                break
    found = env[node]
    assert isinstance(found, Tensor)
    return found


def other_sizes(sizes: Mapping[Any, int]) -> list[dict[Any, int]]:
    """The example sizes and two others at which a pattern has to show itself too."""
    bigger = [{s: n + grow for s, n in sizes.items()} for grow in (3, 8)] if sizes else []
    return [dict(sizes), *bigger]


def name_pattern(masks: list[Tensor]) -> Pattern | None:
    """The pattern that has all these visible-masks [..., L, S] as its meaning, or None.

    A pattern is accepted only if it is a candidate of the first mask and equals each of the masks exactly.
    """
    flat = [m.reshape(-1, *m.shape[-2:]) for m in masks]
    if any(not (m == m[:1]).all() for m in flat):
        return None
    for candidate in _candidates(flat[0][0]):
        if all(torch.equal(candidate.mask(*m.shape[-2:])[0], m[0]) for m in flat):
            return candidate
    return None


def _candidates(mask: Tensor) -> list[Pattern]:
    """Full, causal, and the band that the widest row shows."""
    q_len, kv_len = mask.shape
    found: list[Pattern] = [Full(), Causal()]
    i = torch.arange(q_len)[:, None] + (kv_len - q_len)
    step = torch.arange(kv_len)[None, :] - i
    seen = step[mask]
    if len(seen):
        left, right = max(0, -int(seen.min())), max(0, int(seen.max()))
        found += [Window(left, right), Causal() & Window(left, 0)]
    return found


def as_visible(bias: Tensor, floor: float = -1e4, beside: bool = False) -> Tensor | None:
    """A bias that only hides, as a bool mask: 0 where visible, at most ``floor`` elsewhere, no query without a key.

    In such a bias the hidden keys' weights underflow to exactly 0, so that it means the same as a mask.  ``beside``:
    visible keys may have a bias of their own, as long as hidden ones lie that far below it.
    """
    if bias.dtype == torch.bool:
        visible = bias
    else:
        visible = bias > floor if beside else bias == 0
        if beside and visible.any():
            floor += float(bias[visible].min().clamp(max=0.0))
        if not bool((visible | (bias <= floor)).all()):
            return None
    return visible if bool(visible.any(-1).all()) else None
