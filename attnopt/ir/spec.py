"""What one attention means, as a frozen value.  Passes turn a spec into a spec; backends turn it into operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from attnopt.ir.call_segments import CallSegments
from attnopt.ir.call_tensor import CallTensor, Source
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.eviction import Eviction
from attnopt.ir.extended_keys import ExtendedKeys
from attnopt.ir.head_edits import HeadEdit, Scaled, constant_heads
from attnopt.ir.head_routing import Routed
from attnopt.ir.linear_weights import LinearWeights
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.ir.query_rows import ChosenRows
from attnopt.ir.transplants import Transplanted
from attnopt.ir.weight_gains import WeightGains
from attnopt.ir.zero_keys import ZeroKeys
from attnopt.patterns.algebra import FULL, Full, Pattern


@dataclass(frozen=True)
class AttentionSpec:
    """Scaled dot-product attention over heads.

    With query head h reading K/V head g = ``kv_of_head[h]``::

        q_h, k_h = x.apply(q_h, k_h), for each x of ``before``  # queries and keys of some heads, from another run
        k_g, v_g = mean(k_g), mean(v_g)            # if h pools: over the pool of each key
        s = scale * q_h @ k_g.T                    # [L, S]
        s = clamp(s)                               # if there are bounds; then there is no softcap
        s = softcap * tanh(s / softcap)            # if there is a softcap
        s_h = sum_j score_map[h, j] s_j            # if there is such a map across heads; then there is no softcap
        s = s + bias                               # if there is a bias operand, [B|1, H|1, L|1, S]
        s = s - log(size)                          # if h pools: of the pool of each key, so that a pool counts as one key
        s = where(mask & pattern & segments & selected, s, -inf)  # mask (bool) is an operand, the pattern is static
        m = softcap(scale * q_h @ more_k_g.T) + log(weight)  # if h reads other tokens, M of them: -inf where their mask hides
        p = softmax([s, m, sink_h, 0 ...])[:S]     # a sink logit and zero keys, of score 0, take probability without a value
        p = linear(s)                              # if there is no softmax; hidden keys then have weight 0
        p = softmax(s, over L)                     # if it sends: a key that no query sees then has weight 0 everywhere
        p = weight_gains(p)                        # if there are any
        p_h = sum_j weight_map[h, j] p_j           # if there is such a map across heads
        p = keep * p + added                       # if there is a map; keep [B|1, H|1, L|1, 1], added [B|1, H|1, L|1, S]
        o_h = p @ v_g                              # [L, value_dim]; added reads the values of keys, also of those that pool
        o_h = o_h + p_m @ more_v_g                 # if h reads other tokens, with their probabilities of the same softmax
        o_h = where(chosen, o_h, 0)                # if there are rows that h chooses: of each sequence and head
        o = edit(o), for each edit of ``after``    # all heads together, in their order

    ``segments`` compares ids that the call brings.  ``selected`` holds the keys of the blocks that ``selection`` chooses
    from q, k and the scale (before bias and softcap) at run time.  Either is all keys where it is None.  Only heads of
    ``pooling`` pool.  A fully masked query gives zeros.
    ``eviction`` changes nothing in one call: see there.

    ``sends``: each key divides 1 among the queries, and a query may receive any weight (reversed attention, arXiv:2304.03282).

    ``between_channels``: L and S count channels of a head, and D and Dv tokens, in the example: their number may be another in
    each call.  The formula is the same.
    """

    heads: tuple[int, ...]  # the original number of each query head that remains
    kv_heads: tuple[int, ...]  # the original number of each key/value head that remains
    kv_of_head: tuple[int, ...]  # for each remaining query head, the position in kv_heads of the one it reads
    head_dim: int  # D, of queries and keys
    value_dim: int  # Dv
    scale: float
    pattern: Pattern = FULL
    has_bias: bool = False
    has_mask: bool = False
    has_sinks: bool = False
    has_map: bool = False  # operands keep and added: a map that no input changes, mixed into the weights
    has_score_map: bool = False  # operand score_map: talking heads
    has_weight_map: bool = False
    clamp: tuple[float | None, float | None] | None = None  # the least and the largest score; None: no such bound
    softcap: float | None = None
    linear: LinearWeights | None = None  # in the place of a softmax
    sends: bool = False  # the softmax is over queries instead of keys
    between_channels: bool = False  # queries and keys are channels of a head, and their features are tokens
    is_cross: bool = False  # keys and queries come from different sequences
    seen_as: Pattern | None = None  # the effective mask: pattern and mask operand combined on unpadded inputs, if known
    segments: CallSegments | None = None  # segments of tokens whose ids the call brings
    selection: DynamicBlocks | None = None  # blocks of keys that are chosen from queries and keys at run time
    pooling: PooledKeys | None = None  # heads that read the means of pools of keys and values
    zero_keys: ZeroKeys | None = None  # keys of zeros beyond the edges of the sequence
    extension: ExtendedKeys | None = None  # keys and values of other tokens
    weight_gains: WeightGains | None = None  # factors on the weights, by parts of the pairs
    eviction: Eviction | None = None  # keys that a cache drops between calls
    rows: ChosenRows | None = None  # queries that are chosen at run time; the others give zeros
    positions: tuple[str, ...] = ()  # position encodings found, e.g. ("rope",)
    before: tuple[Transplanted, ...] = ()  # queries and keys that come from another run
    after: tuple[HeadEdit, ...] = ()  # edits of the head outputs, which read the own queries and values

    def __post_init__(self) -> None:
        if len(self.kv_of_head) != len(self.heads):
            raise ValueError(f"kv_of_head has {len(self.kv_of_head)} entries for {len(self.heads)} heads")
        if any(not 0 <= g < len(self.kv_heads) for g in self.kv_of_head):
            raise ValueError(f"kv_of_head {self.kv_of_head} points outside the {len(self.kv_heads)} key/value heads")

    @classmethod
    def of(
        cls,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        scale: float,
        kv_of_head: tuple[int, ...] | None = None,
        pattern: Pattern = FULL,
        softcap: float | None = None,
    ) -> AttentionSpec:
        """A plain attention with numbered heads.  ``kv_of_head`` None: consecutive query heads share a K/V head."""
        return cls(
            heads=tuple(range(heads)),
            kv_heads=tuple(range(kv_heads)),
            kv_of_head=tuple(h * kv_heads // heads for h in range(heads)) if kv_of_head is None else kv_of_head,
            head_dim=head_dim,
            value_dim=value_dim,
            scale=scale,
            pattern=pattern,
            softcap=softcap,
        )

    def having(
        self,
        bias: object = None,
        mask: object = None,
        sinks: object = None,
        added: object = None,
        score_map: object = None,
        weight_map: object = None,
    ) -> AttentionSpec:
        """The same attention with these operands, where they are not None."""
        return replace(
            self,
            has_bias=bias is not None,
            has_mask=mask is not None,
            has_sinks=sinks is not None,
            has_map=added is not None,
            has_score_map=score_map is not None,
            has_weight_map=weight_map is not None,
        )

    @property
    def bare(self) -> AttentionSpec:
        """What a backend computes of it: without map and edits, and of the operands that ``before`` leaves."""
        return replace(self.transplanted, has_map=False, after=())

    @property
    def transplanted(self) -> AttentionSpec:
        """The same attention of the operands that ``before`` leaves."""
        if not self.has_own_keys:
            return replace(self, before=())
        places = tuple(range(self.num_heads))
        return replace(self, before=(), kv_heads=places, kv_of_head=places)

    @property
    def has_own_keys(self) -> bool:
        """Keys that come from another run are those of one query head, so that heads share none."""
        return any(moved.role == "k" for moved in self.before)

    def __str__(self) -> str:
        """ "12 heads / 4 kv x 64, self, Causal(), bias, rope, scale 0.125" """
        kind = "cross" if self.is_cross else "self"
        pattern, scale = str(self.visible_pattern), f"scale {self.scale:.4g}"
        return ", ".join((f"{self.head_counts} x {self.sizes}", kind, pattern, *self.features, *self.positions, scale))

    @property
    def head_counts(self) -> str:
        """ "12 heads", or "12 heads / 4 kv" """
        heads = f"{self.num_heads} {'heads' if self.num_heads != 1 else 'head'}"
        return heads if self.num_heads == self.num_kv_heads else f"{heads} / {self.num_kv_heads} kv"

    @property
    def sizes(self) -> str:
        """ "64", or "64 / 32 v" where values have another size"""
        return str(self.head_dim) if self.head_dim == self.value_dim else f"{self.head_dim} / {self.value_dim} v"

    @property
    def features(self) -> tuple[str, ...]:
        """What changes the result besides scale and pattern, in words."""
        softcap = () if self.softcap is None else (f"softcap {self.softcap:g}",)
        given = {"bias": self.has_bias, "mask": self.has_mask, "sinks": self.has_sinks, "map": self.has_map}
        pooled = () if self.pooling is None else (str(self.pooling),)
        zeros = () if self.zero_keys is None else (str(self.zero_keys),)
        more = () if self.extension is None else (str(self.extension),)
        gains = () if self.weight_gains is None else (str(self.weight_gains),)
        segments = () if self.segments is None else (str(self.segments),)
        evicted = () if self.eviction is None else (str(self.eviction),)
        rows = () if self.rows is None else (str(self.rows),)
        named = (name for name, has in given.items() if has)
        channels = ("between channels",) if self.between_channels else ()
        talking = ("talking heads",) if self.mixes_heads else ()
        other = (self.other_weights,) if self.other_weights else ()
        return (
            *channels,
            *talking,
            *other,
            *named,
            *segments,
            *softcap,
            *pooled,
            *zeros,
            *more,
            *gains,
            *evicted,
            *rows,
        )

    @property
    def mixes_heads(self) -> bool:
        """The scores or the weights of a head depend on all heads."""
        return self.has_score_map or self.has_weight_map

    @property
    def other_weights(self) -> str:
        """What makes the weights if no plain softmax over keys does, in words; "" if one does."""
        if self.linear is not None:
            return str(self.linear)
        if self.sends:
            return "softmax over queries"
        return "" if self.clamp is None else "softmax of clamped scores"

    @property
    def has_own_maps(self) -> bool:
        """Each head has a softmax of its own, over keys that are tokens."""
        return not self.between_channels and not self.mixes_heads and not self.other_weights

    @property
    def num_heads(self) -> int:
        return len(self.heads)

    @property
    def num_kv_heads(self) -> int:
        return len(self.kv_heads)

    @property
    def is_evenly_shared(self) -> bool:
        """Query head h reads K/V head h // r, for one number r of query heads to each."""
        r = self.num_heads // self.num_kv_heads
        return r * self.num_kv_heads == self.num_heads and all(g == h // r for h, g in enumerate(self.kv_of_head))

    @property
    def visible_pattern(self) -> Pattern:
        """What queries see, a mask operand included where it is known what it amounts to."""
        return self.pattern if self.seen_as is None else self.seen_as

    @property
    def is_causal(self) -> bool:
        """No query sees a later key, as far as known without input values."""
        return self.visible_pattern.is_causal

    @property
    def route(self) -> Routed | None:
        """The edit that routes tokens to heads, if any."""
        return next((edit for edit in self.after if isinstance(edit, Routed)), None)

    @property
    def chooses(self) -> bool:
        """The result depends on comparisons that rounding may flip: of blocks, of rows, of heads, or of the weights of a row."""
        gains = self.weight_gains
        chosen = (self.selection, self.rows, self.route)
        return any(x is not None for x in chosen) or (gains is not None and gains.chooses)

    @property
    def is_constant(self) -> bool:
        """Every head outputs the same for every token, whatever the queries, keys and values."""
        return len(constant_heads(self.after)) == self.num_heads

    @property
    def call_segments(self) -> CallSegments | None:
        """The segments whose ids the call brings: of the keys that are seen, or of gains."""
        gains = self.weight_gains
        return self.segments if self.segments is not None or gains is None else gains.segments

    @property
    def tensors(self) -> tuple[Source, ...]:
        """What backends, transplants and edits read beside the operands: of ``selection``, ``call_segments``, ``before`` and each
        edit, in this order."""
        of_edits = (t for edit in self.after for t in edit.tensors)
        return (*self.of_selection, *self.of_segments, *(moved.values for moved in self.before), *of_edits)

    @property
    def of_selection(self) -> tuple[Source, ...]:
        return () if self.selection is None else self.selection.fitted

    @property
    def of_segments(self) -> tuple[Source, ...]:
        return () if self.call_segments is None else self.call_segments.tensors

    @property
    def inputs(self) -> tuple[CallTensor, ...]:
        """What each call brings, keys and values of other tokens included."""
        of_extension = () if self.extension is None else self.extension.tensors
        return tuple(t for t in (*self.tensors, *of_extension) if isinstance(t, CallTensor))

    @property
    def unused(self) -> frozenset[str]:
        """Those of "q" and "k" that no head's output depends on."""
        if self.ignores_weights:
            return frozenset() if any(edit.reads_keys for edit in self.after) else frozenset("qk")
        whole = {m.role for m in self.before if m.tokens is None and set(self.heads) <= set(m.heads)}
        return frozenset(whole if self.route is None else whole - {"q"})

    @property
    def ignores_weights(self) -> bool:
        """No head's output depends on the attention weights; on queries and keys only where an edit reads them."""
        return self.route is None and any(set(self.heads) <= set(edit.overwritten) for edit in self.after)

    @property
    def with_segments_masked(self) -> AttentionSpec:
        """The same attention with a mask operand in the place of segments."""
        return self if self.segments is None else replace(self, segments=None, has_mask=True)

    def restricted(self, pattern: Pattern) -> AttentionSpec:
        """The same attention, restricted to the pairs that ``pattern`` also allows."""
        seen = None if self.seen_as is None else _both(self.seen_as, pattern)
        return replace(self, pattern=_both(self.pattern, pattern), seen_as=seen)

    def keeping(self, heads: Iterable[int]) -> AttentionSpec:
        """The same attention with only these query heads (original numbers); unused K/V heads are removed, too."""
        kept = set(heads)
        places = [i for i, h in enumerate(self.heads) if h in kept]
        used = sorted({self.kv_of_head[i] for i in places})
        return replace(
            self,
            heads=tuple(self.heads[i] for i in places),
            kv_heads=tuple(self.kv_heads[g] for g in used),
            kv_of_head=tuple(used.index(self.kv_of_head[i]) for i in places),
            pattern=self.pattern.for_heads(places),
            seen_as=None if self.seen_as is None else self.seen_as.for_heads(places),
            segments=None if self.segments is None else self.segments.keeping(places),
            pooling=None if self.pooling is None else self.pooling.keeping(kept),
            zero_keys=None if self.zero_keys is None else self.zero_keys.keeping(places),
            extension=None if self.extension is None else self.extension.keeping(kept),
            linear=None if self.linear is None else self.linear.keeping(places),
            weight_gains=None if self.weight_gains is None else self.weight_gains.keeping(places),
            selection=None if self.selection is None else self.selection.keeping(places, kept),
            rows=None if self.rows is None else self.rows.keeping(kept),
            before=tuple(here for moved in self.before if (here := moved.keeping(kept)) is not None),
            after=tuple(left for edit in self.after if (left := edit.keeping(kept)) is not None),
        )

    def merging(self, groups: Sequence[Sequence[int]]) -> AttentionSpec:
        """The same attention with one K/V head for each group (original numbers), which has the number of the first."""
        place = {h: n for n, group in enumerate(groups) for h in group}
        return replace(
            self,
            kv_heads=tuple(group[0] for group in groups),
            kv_of_head=tuple(place[self.kv_heads[g]] for g in self.kv_of_head),
        )

    def reading(self, kv_of_head: Iterable[int]) -> AttentionSpec:
        """The same attention with other K/V heads (their places) for its heads."""
        return replace(self, kv_of_head=tuple(kv_of_head))

    def scaled(self, gains: Mapping[int, float]) -> AttentionSpec:
        """The same attention with the outputs of these heads multiplied by their gains."""
        before, last = self._unscaled
        product = {h: last.get(h, 1.0) * float(gains.get(h, 1.0)) for h in self.heads}
        return replace(self, after=(*before, *_scaled(product)))

    def followed_by(self, edit: HeadEdit) -> AttentionSpec:
        """The same attention with another edit of its head outputs.  Gains of heads that it leaves alone stay last, where the
        output projection can absorb them."""
        before, last = self._unscaled
        own = {h: g for h, g in last.items() if h in edit.changed and h not in edit.overwritten}
        left = {h: g for h, g in last.items() if h not in edit.changed}
        return replace(self, after=(*before, *_scaled(own), edit, *_scaled(left)))

    @property
    def gains(self) -> Mapping[int, float]:
        """The factors of heads after all other edits."""
        return self._unscaled[1]

    def without_gains(self) -> AttentionSpec:
        return replace(self, after=self._unscaled[0])

    @property
    def _unscaled(self) -> tuple[tuple[HeadEdit, ...], dict[int, float]]:
        """The edits up to a last ``Scaled``, and its factors."""
        match self.after:
            case (*before, Scaled(gains)):
                return tuple(before), dict(gains)
        return self.after, {}


def _scaled(gains: Mapping[int, float]) -> tuple[Scaled, ...]:
    """No edit if all gains are 1."""
    changed = tuple((h, g) for h, g in gains.items() if g != 1.0)
    return (Scaled(changed),) if changed else ()


def _both(a: Pattern, b: Pattern) -> Pattern:
    if isinstance(a, Full) or a == b:
        return b
    return a if isinstance(b, Full) else a & b
