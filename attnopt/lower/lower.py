"""Replace attentions by their canonical form, apply the plans, and lower them to ordinary operators.

There are two ways, which verify each other.  "optimized" moves head selections into the weights, folds gains into
the output projection and uses the chosen backend; "plain" computes the same spec with the reference backend on
full-size weights, with dense masks and zeros instead of pruned heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import fx

from attnopt.capture.flex_attention import restore_calls
from attnopt.errors import PluginError, RewriteError
from attnopt.graph.cleanup import prune_unused_state, share_equal_nodes
from attnopt.graph.copies import copy_program
from attnopt.graph.emitter import Emitter
from attnopt.graph.input_sizes import read_sizes_from_inputs
from attnopt.graph.nodes import aten, shape, value
from attnopt.graph.normalize import tidy
from attnopt.graph.scatters import sizes_of
from attnopt.graph.select import restrict, spread
from attnopt.ir.edited_parameters import edited_parameters
from attnopt.ir.extension import joined_spec
from attnopt.ir.head_edits import constant_heads
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.interfaces import Backend
from attnopt.ir.operands import CANONICAL, operands_of
from attnopt.ir.pooling import parts_of
from attnopt.ir.row_attention import row_parts
from attnopt.ir.site import Site
from attnopt.ir.site_edit import SiteEdit
from attnopt.ir.spec import AttentionSpec
from attnopt.lower.attention_calls import Lowered, note_between
from attnopt.lower.early_pools import early_pools, pools_early
from attnopt.lower.fold import folded
from attnopt.lower.other_tokens import MoreNodes, other_tokens
from attnopt.lower.spec_calls import as_specified, inline
from attnopt.lower.table_products import multiply_tables_first
from attnopt.match.find import Found
from attnopt.match.pair_sums import remove_products
from attnopt.match.projections import weight_path
from attnopt.slicing.fuse_projections import join
from attnopt.slicing.packed_projections import built_anew, forks, is_read_in_parts, take_apart
from attnopt.slicing.selection import trim
from attnopt.slicing.selector import Selector, push_down
from attnopt.slicing.weight_store import Weights


@dataclass(frozen=True, kw_only=True)
class Plan(SiteEdit):
    """The edit of one site, with the passes that made it and the backend that computes it."""

    found: Found
    backend: Backend
    passes: tuple[str, ...]

    @property
    def changes_nothing(self) -> bool:
        """The spec of the site is unchanged: the plan only fuses it."""
        return self.spec == self.found.raised.spec and not self.edits and self.out_bias is None

    @property
    def rows(self) -> float:
        """The fraction of (query, head) pairs that are computed."""
        route, chosen = self.spec.route, self.spec.rows
        if chosen is not None and not self.backend.rows:
            site, heads = self.found.site, self.spec.num_heads
            return 1.0 - (1.0 - chosen.count(site.q_len) / site.q_len) * len(chosen.heads) / heads
        return route.share if route is not None and self.backend.skips_rows else 1.0

    @property
    def pools_early(self) -> bool:
        """Tokens are pooled before they are projected to keys and values."""
        return pools_early(self.spec, self.backend, self.found.raised.operands)


def lower(gm: fx.GraphModule, plans: Sequence[Plan], plain: bool = False, joins: bool = True) -> fx.GraphModule:
    """A copy of ``gm`` with every plan applied; ``gm`` itself is unchanged.

    ``joins``: fuse projections of the same input.
    """
    return rewritten(gm, plans, plain, joins).module


@dataclass(frozen=True)
class Rewritten:
    """``whole``: the roles of each site whose tensors something besides the attentions reads, though their heads change."""

    module: fx.GraphModule
    whole: Mapping[str, tuple[str, ...]]


def rewritten(gm: fx.GraphModule, plans: Sequence[Plan], plain: bool = False, joins: bool = True) -> Rewritten:
    """As ``lower``."""
    made = _lowered(gm, plans, plain, frozenset())
    if twice := made.twice():
        made = _lowered(gm, plans, plain, twice)
    module, weights = made.module, made.weights
    if joins and not plain:
        join(module, weights)
    weights.settle()
    prune_unused_state(module)
    module.graph.lint()
    module.recompile()
    return Rewritten(module, made.told)


@dataclass(frozen=True)
class _Copy:
    """A copy of a graph while plans are applied to it; ``table`` has its node for each of the graph's.

    ``whole``: nodes that something besides the attentions reads: parts of them are taken from them, not from the weights.
    ``anew``: nodes whose parts are made from the weights.  ``told``: as ``Rewritten.whole``.
    """

    module: fx.GraphModule
    table: Mapping[fx.Node, fx.Node]
    weights: Weights
    whole: frozenset[fx.Node]
    anew: set[fx.Node] = field(default_factory=set)
    told: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def twice(self) -> frozenset[fx.Node]:
        """The nodes of the graph that are still read although the parts that attentions need are made anew."""
        alive = set(self.module.graph.nodes)
        return frozenset(old for old, new in self.table.items() if new in self.anew and new in alive)


def _lowered(gm: fx.GraphModule, plans: Sequence[Plan], plain: bool, whole: frozenset[fx.Node]) -> _Copy:
    """``whole``: of ``gm``."""
    module, table = copy_program(gm)
    made = _Copy(module, table, Weights(module), frozenset(table[n] for n in whole))
    for bias in () if plain else (operands_of(table[plan.found.raised.node]).bias for plan in plans):
        if bias is not None:
            multiply_tables_first(module, bias)
    for plan in plans:
        try:
            _carry_out(made, plan, plain)
        except PluginError as e:
            raise PluginError(e.message, hint=e.hint, site=plan.found.site.name) from e.__cause__
        except Exception as e:
            raise RewriteError(
                f"{', '.join(plan.passes)} failed: {type(e).__name__}: {e}",
                site=plan.found.site.name,
                hint="exclude the site from the policy and report the model",
            ) from e
    restore_calls(module)
    remove_products(module)
    read_sizes_from_inputs(module.graph)
    share_equal_nodes(module)
    tidy(module)
    return made


def _carry_out(copy: _Copy, plan: Plan, plain: bool) -> None:
    gm, table, weights = copy.module, copy.table, copy.weights
    raised = plan.found.raised
    node, out, region_out = table[raised.node], table[raised.out], table[raised.region.out.node]
    region_out.replace_all_uses_with(out)
    made: SiteEdit = plan if plain else folded(plan.found, plan)
    emit = Emitter(gm.graph, node, {"site": plan.found.site.name, "passes": ", ".join(plan.passes)})
    if made.spec.is_constant and not plain:
        lowered = _constant(emit, node, made.spec)
    else:
        lowered = _attention(emit, copy, plan, made, plain)
    _edit_output(gm, weights, plan.found, table, replace(made, edits=tuple(e for e in made.edits if e.role == "out")))
    chosen = trim(node, {1: made.spec.heads})
    if not chosen:
        node.replace_all_uses_with(lowered)
    elif plain:
        node.replace_all_uses_with(spread(emit, lowered, node, chosen))
    else:
        push_down(gm.graph, weights, emit.origin, node, lowered, chosen)


def _attention(emit: Emitter, copy: _Copy, plan: Plan, made: SiteEdit, plain: bool) -> fx.Node:
    """The attention computed from operands with selected heads, propagated backward as far as possible."""
    table, weights = copy.table, copy.weights
    node, spec, edits = table[plan.found.raised.node], made.spec, made.edits
    operands = operands_of(node)
    projected = {"q": operands.q, "k": operands.k, "v": operands.v}
    ways = {role: [table[n] for n in plan.found.dirty[role] if n in table] for role in projected}
    packed = forks(projected, ways)
    stays = bool(packed & copy.whole)
    if stays and not is_read_in_parts(packed):
        packed = set()
    packs = [(packed, projected, ways)]
    if spec.extension is not None:
        others = other_tokens(emit, plan.found, spec.extension, table)
        of_others = {"k": others.k, "v": others.v}
        again = {role: [others.made.get(n, n) for n in ways[role]] for role in of_others}
        packs.append((forks(of_others, again), of_others, again))
    shared = {n for packed, _, _ in packs for n in packed}
    editing = {role: edits_for(plan.found.site, edits, role) for role in CANONICAL}
    edited = any(editing.values())
    before = plan.found.raised.spec
    early = not plain and pools_early(spec, plan.backend, plan.found.raised.operands)
    alone = not plain and spec.unused == {"q", "k"}  # of a packed projection, the values are all that is read
    resized = spec.heads != before.heads or spec.kv_heads != before.kv_heads
    rebuilt = edited or (shared and (early or alone or resized))
    dirty = [n for pack in packs for n in built_anew(*pack)] if rebuilt else []
    selectors = {
        new: Selector(
            emit, weights, edited_parameters(plan.found.site, new), dirty, shared, () if new else copy.whole - packed
        )
        for new in set(editing.values())
    }
    kept = {"q": {1: spec.heads}, "k": {1: spec.kv_heads}, "v": {1: spec.kv_heads}}

    def selected(role: str, operand: fx.Node) -> fx.Node:
        wanted = kept.get(role, {1: spec.heads} if shape(operand)[1] != 1 else {})
        select = selectors[editing[role]]
        if plain:
            return restrict(emit, select.select(operand, {}), trim(operand, wanted))
        return select.select(operand, wanted)

    def of_heads(role: str, heads: tuple[int, ...]) -> fx.Node:
        return selectors[editing[role]].select(projected[role], {1: heads})

    chosen = operands.map(selected)
    more = None
    if spec.extension is not None:
        more = MoreNodes(selected("k", others.k), selected("v", others.v), others.seen).once(emit)
    if plain:
        return as_specified(emit, spec, chosen, more)
    pools = early_pools(emit, spec, of_heads) if early else ()
    lowered = inline(emit, spec, plan.backend, chosen, more, pools)
    if stays:
        take_apart(packed, weights)
    if copy.whole:
        new = {e.role for e in edits}
        changed = [r for r in projected if r in new or trim(projected[r], kept[r])]
        copy.told[plan.found.site.name] = tuple(r for r in changed if copy.whole.intersection(ways[r]) - packed)
    copy.anew.update(*(select.anew for select in selectors.values()))
    parts = [Lowered(plan.found.site.name, part) for part in _computed(spec, plan)]
    beside = (*(() if more is None else more.given), *chain(*pools))
    note_between((*chosen.given.values(), *beside), lowered, parts)
    return lowered


def _computed(spec: AttentionSpec, plan: Plan) -> list[AttentionSpec]:
    """What the calls of the backend compute, one after the other."""
    if spec.rows is not None:
        return [spec] if plan.backend.rows else [part.spec for part in row_parts(spec)]
    spec = spec if spec.extension is None else joined_spec(spec)
    return [spec] if plan.backend.pools else [part.whole for part in parts_of(spec)]


def edits_for(site: Site, edits: Sequence[HeadWeights], role: str) -> tuple[HeadWeights, ...]:
    """The new weights of an operand, without those of another role that shares its rows."""
    mine = site.projections.get(role)
    own = set() if mine is None or mine.rows is None else {row for rows in mine.rows for row in rows}

    def is_another(edit: HeadWeights) -> bool:
        p = site.projections[edit.role]
        assert p.rows is not None
        return mine is not None and p.weight == mine.weight and bool(own & set(p.rows[edit.head]))

    return tuple(e for e in edits if e.role == role or (e.role != "out" and not is_another(e)))


def _constant(emit: Emitter, node: fx.Node, spec: AttentionSpec) -> fx.Node:
    """The output of ``node`` if every head is constant: no attention is computed."""
    known = constant_heads(spec.after)
    values = torch.stack([known[h] for h in spec.heads])
    wanted = value(node)
    sizes = sizes_of(emit, node)
    assert sizes is not None, "an attention has the batch and the queries of its inputs"
    held = emit.constant(values.to(wanted.dtype).to(wanted.device)[None, :, None])
    return emit.call(aten.expand.default, held, [sizes[0], -1, sizes[2], -1])


def _edit_output(
    gm: fx.GraphModule, weights: Weights, found: Found, table: Mapping[fx.Node, fx.Node], made: SiteEdit
) -> None:
    """New columns and, if changed, a new bias in the output projection of this site only."""
    op = found.output_op
    edited = edited_parameters(found.site, made.edits, made.out_bias)
    if op is None:
        return
    here = table[op]
    for name in edited:
        path = weight_path(here, {name})
        select = Selector(Emitter(gm.graph, here, {"site": found.site.name}), weights, edited, path)
        here.replace_input_with(path[0], select.select(path[0], {}))
