"""The weights of a user's model with heads removed, merged and put in the order in which its class reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from attnopt.errors import ConversionError
from attnopt.graph.nodes import get_attr, shape
from attnopt.ir.edited_parameters import edited_parameters
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.lower.lower import Plan
from attnopt.slicing.sources import slice_sources

REMEDY = "use attnopt.optimize, whose graph can represent any heads"


@dataclass(frozen=True)
class HeadOrder:
    """Original numbers of query and key/value heads, in the order of a converted module."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.queries), len(self.keys)


def head_order(plan: Plan) -> HeadOrder:
    """Query heads ordered by the keys that they read, as classes with grouped heads require: all groups of equal size.

    Raises ConversionError if group sizes differ.
    """
    before, after = plan.found.raised.spec, plan.spec
    readers = [
        [h for h, g in zip(after.heads, after.kv_of_head, strict=True) if g == n] for n in range(len(after.kv_heads))
    ]
    sizes = sorted({len(heads) for heads in readers})
    if len(sizes) != 1:
        raise ConversionError(
            f"its key/value heads would serve {' and '.join(map(str, sizes))} query heads, but model classes need equal groups",
            site=plan.found.site.name,
            hint=f'keep the same number of query heads per key/value head (GroupedQuery: grouping="adjacent"), or {REMEDY}',
        )
    by_turns = list(zip(*readers, strict=True)) if _is_tiled(before) else readers
    return HeadOrder(tuple(h for run in by_turns for h in run), after.kv_heads)


def _is_tiled(spec: AttentionSpec) -> bool:
    """Query head h reads key/value head h % G, with several groups of several heads."""
    G = spec.num_kv_heads
    return 1 < G < spec.num_heads and all(g == h % G for h, g in enumerate(spec.kv_of_head))


def reshaped(model: nn.Module, plans: Sequence[Plan]) -> dict[str, Tensor]:
    """New values of the parameters of ``model`` that the plans change, by name.  Raises ConversionError."""
    known = dict(model.named_parameters(remove_duplicate=False))
    made: dict[str, Tensor] = {}
    for plan in plans:
        for name, value in _of_site(plan).items():
            if name not in known:
                raise ConversionError(
                    f"{name} is not a parameter of {type(model).__name__}", site=plan.found.site.name, hint=REMEDY
                )
            others = made.setdefault(name, value)
            if others is not value and not torch.equal(others, value):
                raise ConversionError(
                    f"{name} is shared by several attentions, which would need different weights",
                    site=plan.found.site.name,
                    hint=f"rewrite all of them to the same heads, or {REMEDY}",
                )
    return made


def _of_site(plan: Plan) -> dict[str, Tensor]:
    site, order = plan.found.site, head_order(plan)
    if plan.spec.after:
        raise ConversionError(
            "the edits of its head outputs cannot be folded into the output projection",
            site=site.name,
            hint=REMEDY,
        )
    values = edited_parameters(site, plan.edits, plan.out_bias)
    if order == HeadOrder(site.spec.heads, site.spec.kv_heads):
        return values
    for name, axis, held in (*_axes(site, order), *_tables(plan, order)):
        current = values.get(name, site.parameters[name].detach())
        index = torch.as_tensor(_arranged(held, current.shape[axis]), device=current.device)
        values[name] = current.index_select(axis, index).contiguous()
    return values


Held = tuple[Sequence[Sequence[int]], Sequence[int]]  # the indices of each head, and the remaining heads, in order


def _axes(site: Site, order: HeadOrder) -> Iterator[tuple[str, int, list[Held]]]:
    """Each projection with heads, the head axis, and the heads."""
    found: dict[tuple[str, int], list[str]] = {}
    for role in ("q", "k", "v", "out"):
        p = site.projections[role]
        if p.rows is None or p.weight is None:
            raise ConversionError(f"its {role} weights cannot be reduced: {p.why}", site=site.name, hint=REMEDY)
        found.setdefault((p.weight, int(p.transposed != (role == "out"))), []).append(role)
        if p.bias is not None and role != "out":
            found.setdefault((p.bias, 0), []).append(role)
    for (name, axis), roles in found.items():
        held: list[Held] = []
        for role in roles:
            rows = site.projections[role].rows
            assert rows is not None
            held.append((rows, order.keys if role in ("k", "v") else order.queries))
        yield name, axis, held


def _tables(plan: Plan, order: HeadOrder) -> Iterator[tuple[str, int, list[Held]]]:
    """The same for parameters that a bias or a sink reads by head, as T5's relative positions [buckets, heads]."""
    heads = range(plan.found.raised.spec.num_heads)
    for role in ("bias", "sinks", "keep", "added"):
        node = plan.found.raised.operands.given.get(role)
        if node is None or shape(node)[1] != len(heads):
            continue
        each = [{x.node: x.selection for x in slice_sources(node, {1: (h,)}) if _is_parameter(x.node)} for h in heads]
        for table in set[fx.Node]().union(*each):
            chosen = [found.get(table, {}) for found in each]
            axes = {axis for selection in chosen for axis in selection}
            if len(axes) == 1 and all(chosen):
                (axis,) = axes
                yield str(table.target), axis, [([selection[axis] for selection in chosen], order.queries)]


def _is_parameter(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    return node.op == "get_attr" and owner is not None and isinstance(get_attr(owner, str(node.target)), nn.Parameter)


def _arranged(held: Sequence[Held], length: int) -> list[int]:
    """For each remaining index along the axis, its old index; indices outside heads are unchanged."""
    source: dict[int, int | None] = {}
    for rows, wanted in held:
        taken = dict(zip(sorted(wanted), wanted, strict=True))  # a slot that stays -> the head that comes into it
        for head, places in enumerate(rows):
            comes = rows[taken[head]] if head in taken else (None,) * len(places)
            source.update(zip(places, comes, strict=True))
    return [there for place in range(length) if (there := source.get(place, place)) is not None]


def put_into(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace parameters of ``model`` everywhere, and update the sizes in the layers that own them."""
    known = dict(model.named_parameters(remove_duplicate=False))
    new: dict[int, nn.Parameter] = {}
    for name, value in values.items():
        old = known[name]
        new[id(old)] = nn.Parameter(value.clone(), requires_grad=old.requires_grad)
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in new:
                setattr(module, leaf, new[id(parameter)])
                _resize(module)


def _resize(layer: nn.Module) -> None:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = weight.shape
    elif weight.dim() == 2 and hasattr(layer, "nf"):  # transformers' Conv1D, which stores the weight as (in, out)
        layer.nx, layer.nf = weight.shape  # type: ignore[assignment]
