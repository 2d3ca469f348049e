"""Example inputs at other sizes of the axes that are free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.sizes import hint
from attnopt.capture.run_unchanged import outputs_of
from attnopt.capture.valid_sizes import other_sizes, sizes_that_fit
from attnopt.graph.evaluate import Sizes, symbols, within
from attnopt.graph.nodes import inputs_of, is_tensor, value


def inputs_that_run(module: fx.GraphModule, inputs: CallInputs, held: Sequence[str] = ()) -> Iterator[CallInputs]:
    """The example inputs, then ``resized`` ones, those aside for which the graph is not valid."""
    yield inputs
    for other in resized(module, inputs, held):
        try:
            outputs_of(module, other)
        except Exception:
            continue
        yield other


def resized(module: fx.GraphModule, inputs: CallInputs, held: Sequence[str] = ()) -> list[CallInputs]:
    """The example inputs at other sizes of the module's dynamic axes, by repeating them; the module may refuse some.

    First at larger, distinct odd sizes, then at multiples, then at sizes that grow or shrink together, then
    each size alone, within the bounds of the graph and the constraints ``held`` between its sizes (see ``Report.fixed_axes``).
    """
    sizes = symbols(module.graph)
    nodes = inputs_of(module.graph)
    leaves, spec = pytree.tree_flatten(inputs)
    if not sizes or len(leaves) != len(nodes):
        return []
    fits = sizes_that_fit(module.graph, held)
    wanted = [within(module.graph, new) for new in _other_sizes(sizes)]
    wanted += [new for s in sizes if (new := next(filter(fits, other_sizes(sizes, s)), None)) is not None]
    found: list[CallInputs] = []
    for k, new in enumerate(wanted):
        if new == sizes or new in wanted[:k] or not fits(new):
            continue
        fitted = [_fitted(leaf, n, new) for leaf, n in zip(leaves, nodes, strict=True)]
        found.append(pytree.tree_unflatten(fitted, spec))
    return found


def _other_sizes(sizes: Sizes) -> list[Sizes]:
    odd: Sizes = {}
    for symbol, n in sizes.items():
        larger = n + 3 + n % 2
        while larger in odd.values():
            larger += 2
        odd[symbol] = larger
    values = list(sizes.values())
    multiples = {s: n * (2 + values[:k].count(n)) for k, (s, n) in enumerate(sizes.items())}
    alike = [{s: max(2, n + more) for s, n in sizes.items()} for more in (3, 1, -1)]
    return [odd, multiples, {s: 2 * n for s, n in sizes.items()}, *alike]


def _fitted(leaf: object, node: fx.Node, sizes: Sizes) -> object:
    if isinstance(leaf, int) and isinstance(value(node), torch.SymInt):
        return int(value(node).node.expr.subs(sizes))
    if not isinstance(leaf, Tensor) or not is_tensor(node):
        return leaf
    for axis, size in enumerate(value(node).shape):
        if isinstance(size, torch.SymInt):
            places = torch.arange(int(size.node.expr.subs(sizes)), device=leaf.device)
            leaf = leaf.index_select(axis, places % hint(size))
            if leaf.is_floating_point():  # no copies: the order of equal numbers is rounding's to choose
                times = (places // hint(size)).reshape([-1] + [1] * (leaf.dim() - axis - 1))
                leaf = leaf * (1 - times / 16).to(leaf.dtype)
    return leaf
