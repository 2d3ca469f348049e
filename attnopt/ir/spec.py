"""What one attention means, as a frozen value.  Passes turn a spec into a spec; backends turn it into operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from attnopt.ir.constant import Constant
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.head_edits import HeadEdit, Scaled, constant_heads
from attnopt.ir.head_routing import Routed
from attnopt.patterns.algebra import FULL, Full, Pattern


@dataclass(frozen=True)
class AttentionSpec:
    """Scaled dot-product attention over heads.

    With query head h reading K/V head g = ``kv_of_head[h]``::

        s = scale * q_h @ k_g.T                    # [L, S]
        s = softcap * tanh(s / softcap)            # if there is a softcap
        s = s + bias                               # if there is a bias operand, [B|1, H|1, L|1, S]
        s = where(mask & pattern & selected, s, -inf)  # mask (bool) is an operand, the pattern is static
        p = softmax([s, sink_h])[:S]               # a sink logit takes probability without a value
        o_h = p @ v_g                              # [L, value_dim]
        o = edit(o), for each edit of ``after``    # all heads together, in their order
        o_h = gain_h * o_h

    ``selected`` holds the keys of the blocks that ``selection`` chooses from q, k and the scale (before bias and softcap) at
    run time; all keys where it is None.  A fully masked query gives zeros.
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
    softcap: float | None = None
    gains: tuple[float, ...] | None = None  # one factor for each remaining query head
    is_cross: bool = False  # keys and queries come from different sequences
    seen_as: Pattern | None = None  # the effective mask: pattern and mask operand combined on unpadded inputs, if known
    selection: DynamicBlocks | None = None  # blocks of keys that are chosen from queries and keys at run time
    positions: tuple[str, ...] = ()  # position encodings found, e.g. ("rope",)
    after: tuple[HeadEdit, ...] = ()  # edits of the head outputs, before the gains

    def __post_init__(self) -> None:
        if len(self.kv_of_head) != len(self.heads):
            raise ValueError(f"kv_of_head has {len(self.kv_of_head)} entries for {len(self.heads)} heads")
        if any(not 0 <= g < len(self.kv_heads) for g in self.kv_of_head):
            raise ValueError(f"kv_of_head {self.kv_of_head} points outside the {len(self.kv_heads)} key/value heads")
        if self.gains is not None and len(self.gains) != len(self.heads):
            raise ValueError(f"{len(self.gains)} gains for {len(self.heads)} heads")

    @property
    def num_heads(self) -> int:
        return len(self.heads)

    @property
    def num_kv_heads(self) -> int:
        return len(self.kv_heads)

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
        """The result depends on comparisons that rounding may flip: of blocks, or of heads."""
        return self.selection is not None or self.route is not None

    @property
    def is_constant(self) -> bool:
        """Every head outputs the same for every token, whatever the queries, keys and values."""
        return len(constant_heads(self.after)) == self.num_heads

    @property
    def constants(self) -> tuple[Constant, ...]:
        """The constants of all edits, in order."""
        return tuple(c for edit in self.after for c in edit.constants)

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
            gains=None if self.gains is None else tuple(self.gains[i] for i in places),
            pattern=self.pattern.for_heads(places),
            seen_as=None if self.seen_as is None else self.seen_as.for_heads(places),
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

    def scaled(self, gains: Iterable[float]) -> AttentionSpec:
        """The same attention with the output of each remaining head multiplied by its gain."""
        old = self.gains or (1.0,) * self.num_heads
        return replace(self, gains=tuple(a * float(b) for a, b in zip(old, gains, strict=True)))

    def followed_by(self, edit: HeadEdit) -> AttentionSpec:
        """The same attention with an edit of its head outputs, after the gains."""
        gains = dict(zip(self.heads, self.gains or (1.0,) * self.num_heads, strict=True))
        first = tuple((h, gains[h]) for h in edit.changed if gains[h] != 1.0)
        before = (Scaled(first),) if first and not edit.overwrites else ()
        left = tuple(1.0 if h in edit.changed else gains[h] for h in self.heads)
        return replace(self, after=(*self.after, *before, edit), gains=None if self.gains is None else left)


def _both(a: Pattern, b: Pattern) -> Pattern:
    if isinstance(a, Full) or a == b:
        return b
    return a if isinstance(b, Full) else a & b
