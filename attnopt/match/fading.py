"""What multiplies the weights of an attention without a softmax: masks, and a decay with distance, read by evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, fx

from attnopt.graph.axes import Axes, Axis
from attnopt.graph.emitter import Emitter
from attnopt.graph.evaluate import inputs_behind, is_plain
from attnopt.graph.nodes import aten, dtype, shape, value
from attnopt.ir.linear_weights import LinearWeights
from attnopt.match.mask_numbers import Lengths
from attnopt.match.mask_patterns import Sample, name_pattern, samples
from attnopt.match.read_chain import Triangle
from attnopt.match.read_scores import Factor, Hide, Operand
from attnopt.match.rearrange import Arranger
from attnopt.match.region import Region, atoms_of
from attnopt.match.rejection import NotAttentionError, rejected
from attnopt.match.row_quotient import RowQuotient
from attnopt.patterns import Causal, Full, Pattern

_READABLE = 1e-4  # a decay that has come down to this tells its rate


def read_fading(
    gm: fx.GraphModule,
    emit: Emitter,
    at: Arranger,
    r: Region,
    factors: Sequence[Factor],
    q: fx.Node,
    k: fx.Node,
    kv_heads: Axis,
) -> tuple[LinearWeights, Pattern, fx.Node | None, fx.Node, fx.Node]:
    """(weights, pattern, mask operand, queries, keys): ``factors`` and the zeros of ``r.linear``.  Those of queries or keys alone
    are written into these.  Raises NotAttentionError."""
    linear = r.linear
    assert linear is not None
    groups = (r.batch, r.heads, r.queries, r.keys)
    known = [at.arrange(o.node, o.axes, groups) for o in (_triangle(emit, at, t) for t in linear.triangles)]
    given: list[fx.Node] = []
    for hide in linear.hides:
        atoms = atoms_of(hide.condition.axes)
        if not atoms & set(r.keys):
            q = _zeroed(emit, q, hide, at, (r.batch, r.heads, r.queries, ()))
        elif not atoms & (set(r.queries) | (set(r.heads) - set(kv_heads))):
            k = _zeroed(emit, k, hide, at, (r.batch, kv_heads, r.keys, ()))
        else:
            shown = _shown(emit, hide, at.arrange(hide.condition.node, hide.condition.axes, groups))
            (given if inputs_behind(shown) else known).append(shown)
    decays = [at.arrange(f.node, f.axes, groups) for f in factors]
    mask = reduce(lambda a, b: emit.call(aten.bitwise_and.Tensor, a, b), given) if given else None
    quotient = linear.quotient
    divided = LinearWeights() if quotient is None else _divided(quotient)
    if not known and not decays:
        if quotient is None and mask is None and not linear.running:
            raise _undivided(r)
        return divided, Causal() if linear.running else Full(), mask, q, k
    if not all(is_plain(n) and not inputs_behind(n) for n in (*known, *decays)):
        raise _unread(r)
    product = _product(emit, decays, known)
    read = _fit(gm, product, (value(q).shape[2], value(k).shape[2]), shape(q)[1])
    if read is None:
        raise _unread(r)
    rates, pattern = read
    if pattern is None:  # zeros and ones of another form
        kept = emit.call(aten.ne.Scalar, product, 0)
        mask = kept if mask is None else emit.call(aten.bitwise_and.Tensor, mask, kept)
    fading = replace(divided, rates=rates if any(rates) else ())
    return fading, pattern or Full(), mask, q, k


def _divided(quotient: RowQuotient) -> LinearWeights:
    return LinearWeights((), True, quotient.added, quotient.least, quotient.absolute, quotient.detached)


def _product(emit: Emitter, decays: Sequence[fx.Node], known: Sequence[fx.Node]) -> fx.Node:
    """All of them together: zeros where a key is hidden, even if a decay grows there without bound."""
    shown = reduce(lambda a, b: emit.call(aten.bitwise_and.Tensor, a, b), known) if known else None
    if not decays:
        assert shown is not None
        return emit.call(aten._to_copy.default, shown, dtype=torch.float32)
    decay = reduce(lambda a, b: emit.call(aten.mul.Tensor, a, b), decays)
    if shown is None:
        return decay
    return emit.call(aten.where.ScalarOther, shown, decay, 0.0)


def _triangle(emit: Emitter, at: Arranger, t: Triangle) -> Operand:
    sizes = [at.length(t.rows), at.length(t.columns)]
    ones = emit.call(aten.ones.default, sizes, dtype=torch.bool)
    cut = aten.triu.default if t.upper else aten.tril.default
    return Operand(emit.call(cut, ones, t.diagonal), (t.rows, t.columns))


def _shown(emit: Emitter, hide: Hide, condition: fx.Node) -> fx.Node:
    """Bool, True where weights stay."""
    if dtype(condition) != torch.bool:
        condition = emit.call(aten._to_copy.default, condition, dtype=torch.bool)
    return emit.call(aten.bitwise_not.default, condition) if hide.when else condition


def _zeroed(emit: Emitter, x: fx.Node, hide: Hide, at: Arranger, groups: Axes) -> fx.Node:
    shown = _shown(emit, hide, at.arrange(hide.condition.node, hide.condition.axes, groups))
    return emit.call(aten.where.ScalarOther, shown, x, 0.0)


def _undivided(r: Region) -> NotAttentionError:
    return rejected(
        r.out.node,
        "undivided",
        "weights that fade, hide keys, or are divided by their sum",
        "products of queries and keys as they are, as in non-local blocks",
    )


def _unread(r: Region) -> NotAttentionError:
    return rejected(
        r.out.node,
        "unread-decay",
        "weights times a mask, or times a number to the power of the distance to earlier keys",
        "another factor of pairs of queries and keys",
    )


def _fit(
    gm: fx.GraphModule, product: fx.Node, lengths: Lengths, heads: int
) -> tuple[tuple[float, ...], Pattern | None] | None:
    """The rate of each head, and the pattern of what is not zero (None: no known one), of ``product`` [1, H or 1, L, S] at every
    valid size of the graph; None if it is anything else."""
    seen = samples(gm, [product], lengths, smooth=True)
    if not seen or shape(product)[0] != 1:
        return None
    values = [s.values[0].reshape(-1, *s.values[0].shape[-2:]).double() for s in seen]
    rates = _rates([_Told(s, x) for s, x in zip(seen, values, strict=True)])
    least = torch.finfo(dtype(product)).tiny
    rounding = 8 * torch.finfo(dtype(product)).eps
    shown: list[tuple[Sample, Tensor]] = []
    for sample, x in zip(seen, values, strict=True):
        distance = _distance(sample)
        power = rates[:, None, None] * distance
        expected = torch.exp(-power)
        if not bool(((x == 0) | ((x - expected).abs() <= expected * rounding * (1 + power.abs()) + least)).all()):
            return None
        shown.append((sample, (x != 0) | ((distance >= 0) & (expected <= least))))  # too small for a number
    pattern = name_pattern(shown)
    fades = bool((rates > 0).any())
    if fades and (pattern is None or not pattern.is_causal):
        return None
    found = tuple(rates.tolist())
    return found * (heads if len(found) == 1 else 1), pattern


def _distance(sample: Sample) -> Tensor:
    """Float64 [rows, columns]: from a key to the query, below 0 for later keys."""
    return (sample.rows[:, None] + (sample.kv_len - sample.q_len) - sample.columns).double()


@dataclass(frozen=True)
class _Told:
    sample: Sample
    values: Tensor  # [H or 1, rows, columns]


def _rates(told: Sequence[_Told]) -> Tensor:
    """[H or 1]: of each head, from the farthest pair whose weight has not become too small to read; 0 if it is always 1."""
    heads = max(len(t.values) for t in told)
    rates, farthest = torch.zeros(heads, dtype=torch.float64), torch.zeros(heads, dtype=torch.float64)
    for t in told:
        distance = _distance(t.sample).expand_as(t.values)
        for head, (x, d) in enumerate(zip(t.values.expand(heads, -1, -1), distance.expand(heads, -1, -1), strict=True)):
            readable = (x > _READABLE) & (d > 0)
            readable = readable if bool(readable.any()) else (x > 0) & (d == 1)
            if not bool(readable.any()):
                continue
            far = torch.where(readable, d, 0.0)
            place = int(far.argmax())
            if float(far.flatten()[place]) > float(farthest[head]):
                farthest[head] = far.flatten()[place]
                rates[head] = -x.flatten()[place].log() / farthest[head]
    return rates.clamp(min=0.0) + 0.0  # no -0
