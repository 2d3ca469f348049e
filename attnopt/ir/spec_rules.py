"""Verification of a spec and its new weights after every pass: a list of rules."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from attnopt.base.intervals import Ranges, clipped
from attnopt.base.registry import distribution_of
from attnopt.errors import PluginError
from attnopt.ir.call_segments import CallSegments
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.eviction import Eviction
from attnopt.ir.extended_keys import ExtendedKeys
from attnopt.ir.head_edits import HeadEdit, Scaled
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.interfaces import Rewrite
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.ir.query_rows import ChosenRows
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.transplants import Transplanted
from attnopt.ir.weight_gains import Normalise, Part, WeightGains
from attnopt.ir.zero_keys import ZeroKeys
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.segments import Segments

_SMALL = 1 << 20  # pairs up to which a pattern of a third party is compared with its own mask
_RUN = 64  # queries per call of reach
_FIXED = (
    "head_dim", "value_dim", "between_channels", "is_cross", "has_bias", "has_mask", "has_sinks", "has_map", "has_score_map",
    "has_weight_map", "clamp", "sends",
)  # fmt: skip


def broken_rules(site: Site, made: Rewrite) -> Iterator[str]:
    """The violations in a rewrite of ``site``."""
    yield from verify_spec(site.spec, made.spec)
    for edit in made.edits:
        yield from _of_weights(site, made.spec, edit)
    for tensor in made.spec.inputs:
        if tensor.input.name not in site.inputs:
            yield f"it reads {tensor.input}, which is not among the inputs {', '.join(site.inputs) or '(none)'}"
    if site.spec.of_selection and any(edit.role in ("q", "k") for edit in made.edits):
        yield f"new weights of queries or keys, but {site.spec.selection} was fitted to the old ones"
    if site.spec.before and any(edit.role in ("q", "k") for edit in made.edits):
        yield f"new weights of queries or keys, but {site.spec.before[0]} are those of the old ones"
    if made.out_bias is not None:
        yield from _of_out_bias(site, made.out_bias)
    if not isinstance(made.notes, tuple) or not all(isinstance(note, str) for note in made.notes):
        yield f"notes is {made.notes!r}, expected a tuple of strings"
    yield from _of_foreign_patterns(site, made.spec)


def verify_spec(before: AttentionSpec, after: AttentionSpec) -> Iterator[str]:
    """The rules that ``after`` violates as a rewrite of ``before``, which has the existing operands and weights."""
    for name in _FIXED:
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            yield f"{name} is {now!r}, but the attention has {was!r}"
    yield from _of_heads(before, after)
    yield from _of_linear(before, after)
    yield from _beside_other_weights(after)
    yield from _of_numbers(after)
    yield from _of_kinds(after)


def _of_heads(before: AttentionSpec, after: AttentionSpec) -> Iterator[str]:
    for name, known in (("heads", before.heads), ("kv_heads", before.kv_heads)):
        named = getattr(after, name)
        if not named or len(set(named)) < len(named) or not set(named) <= set(known):
            yield f"{name} is {named!r}, expected a subset of {known!r} without duplicates"
    if len(after.kv_of_head) != len(after.heads) or not set(after.kv_of_head) <= set(range(len(after.kv_heads))):
        yield f"kv_of_head is {after.kv_of_head!r} for {len(after.heads)} heads and {len(after.kv_heads)} K/V heads"


def _of_linear(before: AttentionSpec, after: AttentionSpec) -> Iterator[str]:
    """Weights without a softmax are those of the heads that remain."""
    places = [before.heads.index(h) for h in after.heads if h in before.heads]
    wanted = None if before.linear is None else before.linear.keeping(places)
    if after.linear != wanted:
        yield f"linear is {after.linear!r}, expected {wanted!r}"
    if after.linear is None:
        return
    yield from (f"linear has {fault}" for fault in after.linear.faults(after.num_heads))
    if after.linear.rates and not after.is_causal:
        yield f"linear has weights that fade towards earlier keys, but queries see later ones: {after.pattern}"


def _beside_other_weights(after: AttentionSpec) -> Iterator[str]:
    """Nothing beside weights that no plain softmax over keys makes needs one."""
    if not after.other_weights:
        return
    others = ["selection", "pooling", "zero_keys", "extension", "eviction", "rows"]
    if after.clamp is not None:
        others += ["softcap"]
    if after.linear is not None or after.sends:
        others += ["weight_gains", "has_sinks", "has_map"]
    if after.sends:
        others += ["has_score_map", "has_weight_map"]
    if after.linear is not None:
        others += ["softcap", "clamp", "has_bias", "sends"]
    needing = [name for name in others if getattr(after, name) not in (None, False)]
    yield from (
        f"{name} beside weights that no plain softmax over keys makes: {after.other_weights}" for name in needing
    )


def _of_numbers(after: AttentionSpec) -> Iterator[str]:
    if not _is_finite(after.scale):
        yield f"scale is {after.scale!r}, expected a finite number"
    if after.softcap is not None and not (_is_finite(after.softcap) and after.softcap > 0):
        yield f"softcap is {after.softcap!r}, expected None or a number above 0"


def _of_kinds(after: AttentionSpec) -> Iterator[str]:
    """Patterns, selections and edits of a wrong type, or with unknown heads."""
    yield from _of_selection(after)
    if after.segments is not None and not isinstance(after.segments, CallSegments):
        yield f"segments is {after.segments!r}, expected CallSegments or None"
    if after.eviction is not None and not isinstance(after.eviction, Eviction):
        yield f"eviction is {after.eviction!r}, expected an Eviction or None"
    yield from _of_pooling(after)
    yield from _of_zero_keys(after)
    yield from _of_rows(after)
    yield from _of_extension(after)
    yield from _of_pattern("pattern", after.pattern, after)
    if after.seen_as is not None:
        yield from _of_pattern("seen_as", after.seen_as, after)
    yield from _of_weight_gains(after)
    for moved in after.before:
        if not isinstance(moved, Transplanted) or not set(moved.heads) <= set(after.heads):
            yield f"before holds {moved!r}, expected a Transplanted of some heads of {after.heads!r}"
    for edit in after.after:
        if not isinstance(edit, HeadEdit):
            yield f"after holds {edit!r}, expected a HeadEdit"
        elif not set(edit.changed) <= set(after.heads):
            yield f"the edit {edit} changes heads {edit.changed!r} of {after.heads!r}"
        elif edit.reads_masks and after.selection is not None:
            yield f"the edit {edit} reads which keys are hidden, but {after.selection} hides keys at run time"
        elif isinstance(edit, Scaled) and not all(h in after.heads and _is_finite(g) for h, g in edit.gains):
            yield f"the edit {edit}: expected a finite number for each of some heads of {after.heads!r}"


def _of_selection(after: AttentionSpec) -> Iterator[str]:
    if after.selection is None:
        return
    if not isinstance(after.selection, DynamicBlocks):
        yield f"selection is {after.selection!r}, expected DynamicBlocks or None"
    elif after.selection.scores.needs_calibration != bool(after.selection.fitted):
        yield f"{after.selection} has to be fitted to calibration data first"
    elif any(c.shape[0] != after.num_heads for c in after.selection.fitted):
        yield f"{after.selection} was fitted for other heads than {after.heads!r}"
    elif after.is_causal and after.selection.scores.looks_ahead:
        yield f"{after.selection} chooses from the whole sequence, but the attention is causal"


def _of_pattern(name: str, pattern: object, after: AttentionSpec) -> Iterator[str]:
    if not isinstance(pattern, Pattern):
        yield f"{name} is {pattern!r}, expected a Pattern"
    elif pattern.named_heads > len(after.heads):
        yield f"{name} refers to head position {pattern.named_heads - 1}, but there are only {len(after.heads)} heads"


def _of_weight_gains(after: AttentionSpec) -> Iterator[str]:
    gains = after.weight_gains
    if gains is None:
        return
    if not isinstance(gains, WeightGains) or not all(isinstance(part, Part) for part in _tuple(gains.parts) or (None,)):
        yield f"weight_gains is {gains!r}, expected WeightGains with a tuple of Parts, or None"
        return
    if gains.normalise not in get_args(Normalise):
        yield f"weight_gains are normalised by {gains.normalise!r}, expected one of {get_args(Normalise)!r}"
    most = 1.0 if gains.normalise == "redistribute" else math.inf
    for part in gains.parts:
        yield from _of_pattern("a part of weight_gains", part.pattern, after)
        if len(_tuple(part.gains)) != len(after.heads):
            yield f"weight_gains has gains {part.gains!r} in {part.pattern}, expected a tuple for {len(after.heads)} heads"
        elif not all(_is_finite(g) and 0 <= g <= most for g in part.gains):
            told = "from 0 to 1, because others receive the rest" if most == 1.0 else "of at least 0"
            yield f"weight_gains multiplies by {part.gains!r} in {part.pattern}, expected finite numbers {told}"
    if gains.to is not None:
        yield from _of_pattern("the receiver of weight_gains", gains.to, after)
    if all(isinstance(p, Pattern) for p in gains.patterns):
        yield from _of_call_gains(gains, after)
    for name, value in (("mass", gains.mass), ("share", gains.share)):
        if not (_is_finite(value) and 0 <= value <= 1):
            yield f"weight_gains has {name} {value!r}, expected a number from 0 to 1"


def _of_call_gains(gains: WeightGains, after: AttentionSpec) -> Iterator[str]:
    """Segments whose ids a call brings."""
    found = {leaf.inputs for p in gains.patterns for leaf in p.leaves() if isinstance(leaf, Segments) and leaf.inputs}
    if not found:
        return
    alone = [p for p in gains.patterns if isinstance(p, Segments) and p.inputs in found and p.pairs is not None]
    if len(found) > 1 or len(alone) < len(gains.patterns):
        yield f"weight_gains has {gains.patterns!r}, expected pairs of segments of one input alone"
    if after.segments is not None or after.pooling is not None:
        yield "weight_gains of segments that a call brings, beside other such segments or pooled keys"


def _tuple(value: object) -> tuple[object, ...]:
    """``value``, or () if it is no tuple."""
    return value if isinstance(value, tuple) else ()


def _of_pooling(after: AttentionSpec) -> Iterator[str]:
    if after.pooling is None:
        return
    if not isinstance(after.pooling, PooledKeys):
        yield f"pooling is {after.pooling!r}, expected PooledKeys or None"
    elif not after.pooling.heads or not set(after.pooling.heads) <= set(after.heads):
        yield f"pooling names heads {after.pooling.heads!r}, expected some heads of {after.heads!r}"
    elif after.selection is not None:
        yield "pooling and selection: blocks of keys cannot be chosen among pooled keys"


def _of_zero_keys(after: AttentionSpec) -> Iterator[str]:
    if after.zero_keys is None:
        return
    if not isinstance(after.zero_keys, ZeroKeys):
        yield f"zero_keys is {after.zero_keys!r}, expected ZeroKeys or None"
    elif not ZeroKeys.known(after.zero_keys.pattern, range(after.num_heads)):
        yield f"zero_keys: {after.zero_keys.pattern} has no windows that are clipped at the edges"
    elif after.has_bias:
        yield "zero_keys and a bias, which has no entries for keys beyond the edges"
    elif after.pooling is not None:
        yield "zero_keys and pooling: pooled keys have no neighbours beyond the edges"


def _of_rows(after: AttentionSpec) -> Iterator[str]:
    if after.rows is None:
        return
    others = {
        "a map": after.has_map,
        "segments": after.segments is not None,
        "a selection of blocks": after.selection is not None,
        "keys of other tokens": after.extension is not None,
        "pooling": after.pooling is not None,
        "weight_gains": after.weight_gains is not None,
        "eviction": after.eviction is not None,
    }
    if not isinstance(after.rows, ChosenRows):
        yield f"rows is {after.rows!r}, expected ChosenRows or None"
    elif not after.rows.heads or not set(after.rows.heads) <= set(after.heads):
        yield f"rows names heads {after.rows.heads!r}, expected some heads of {after.heads!r}"
    elif after.is_causal:
        yield f"{after.rows}, which depends on the whole sequence, but the attention is causal"
    elif after.is_cross and after.rows.scores.of_keys:
        yield f"{after.rows.scores} scores keys, which are not the tokens of the queries"
    elif (other := next((name for name, there in others.items() if there), None)) is not None:
        yield f"rows and {other} cannot be computed together"


def _of_extension(after: AttentionSpec) -> Iterator[str]:
    if after.extension is None:
        return
    if not isinstance(after.extension, ExtendedKeys):
        yield f"extension is {after.extension!r}, expected ExtendedKeys or None"
    elif not after.extension.heads or not set(after.extension.heads) <= set(after.heads):
        yield f"extension names heads {after.extension.heads!r}, expected some heads of {after.heads!r}"
    elif not (_is_finite(after.extension.weight) and after.extension.weight > 0):
        yield f"extension has weight {after.extension.weight!r}, expected a finite number above 0"
    elif after.pooling is not None:
        yield "extension and pooling: the keys of other tokens are not pooled"
    elif after.weight_gains is not None:
        yield "extension and weight_gains: their parts do not say where the keys of other tokens belong"


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _of_weights(site: Site, spec: AttentionSpec, edit: HeadWeights) -> Iterator[str]:
    if not isinstance(edit, HeadWeights):
        yield f"edits holds {edit!r}, expected HeadWeights"
        return
    what = f"new {edit.role!r} weights of head {edit.head!r}"
    heads: dict[str, Collection[int]] = {
        "q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads, "out": spec.heads,
    }  # fmt: skip
    if edit.head not in heads.get(edit.role, ()):
        yield f"{what}: expected one of {tuple(heads.get(edit.role, ()))!r} in q, k, v or out"
        return
    weight, bias = site.head_weight(edit.role, edit.head), site.head_bias(edit.role, edit.head)
    if weight is None:
        yield f"{what}: the projection is unknown"
        return
    yield from _of_tensor(f"{what}", edit.weight, weight)
    if edit.bias is not None and bias is None:
        yield f"{what} have a bias, but the projection has none per head"
    elif edit.bias is not None and bias is not None:
        yield from _of_tensor(f"the bias of {what}", edit.bias, bias)


def _of_out_bias(site: Site, made: Tensor) -> Iterator[str]:
    known = site.out_bias()
    if known is None:
        yield "a new bias for the output projection, which has no bias"
    else:
        yield from _of_tensor("the new bias of the output projection", made, known)


def _of_tensor(what: str, made: Tensor, known: Tensor) -> Iterator[str]:
    if not isinstance(made, Tensor) or made.shape != known.shape:
        got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
        yield f"{what}: expected a tensor {list(known.shape)}, got {got}"
    elif not made.is_floating_point() or (made.device.type != "meta" and not bool(made.isfinite().all())):
        yield f"{what}: expected finite floating-point numbers"


def _of_foreign_patterns(site: Site, spec: AttentionSpec) -> Iterator[str]:
    if not 0 < site.q_len * site.kv_len <= _SMALL:
        return
    gains = spec.weight_gains
    for pattern in (spec.pattern, *([] if gains is None else [*(part.pattern for part in gains.parts), gains.to])):
        try:
            if isinstance(pattern, Pattern) and _foreign(pattern):
                yield from _contradictions(pattern, site, spec.num_heads)
        except PluginError as e:
            yield e.message
        except Exception as e:
            yield f"pattern {pattern} failed: {type(e).__name__}: {e}"


def _contradictions(pattern: Pattern, site: Site, heads: int) -> Iterator[str]:
    """A pattern whose ``reach`` contradicts its ``visible``: the result would depend on the backend."""
    q_len, kv_len = site.q_len, site.kv_len
    for one in {pattern.for_head(h) for h in range(heads)}:
        seen_LS = one.mask(q_len, kv_len)[0].numpy()
        runs = [(i, i) for i in range(q_len)] + [(i, min(i + _RUN, q_len) - 1) for i in range(0, q_len, _RUN)]
        if any(_denies(one, seen_LS[first : last + 1], first + kv_len - q_len) for first, last in runs):
            yield f"pattern {one}: reach contradicts visible at {q_len} queries and {kv_len} keys"


def _denies(pattern: Pattern, seen_LS: NDArray[np.bool_], first: int) -> bool:
    """A key in ``all`` is hidden from some query of the run, or a key outside ``some`` is visible."""
    q_len, kv_len = seen_LS.shape
    reach = pattern.reach(first, first + q_len - 1, kv_len)
    surely, maybe = (_marked(ranges, kv_len) for ranges in (reach.all, reach.some))
    return bool((surely & ~seen_LS).any() or (seen_LS & ~(maybe | surely)).any())


def _marked(ranges: Ranges, length: int) -> NDArray[np.bool_]:
    marks = np.zeros(length, np.bool_)
    for start, stop in clipped(ranges, length):
        marks[start:stop] = True
    return marks


def _foreign(pattern: Pattern) -> bool:
    """It, or a part of it, is not attnopt's own."""
    return distribution_of(type(pattern)) != "attnopt" or any(map(_foreign, pattern.parts))
