"""Published sparse attentions as one-liners: each returns a pattern, with the parameters of its paper."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from attnopt.base.options import whole, whole_tuple, wholes
from attnopt.errors import PolicyError
from attnopt.patterns import (
    Blocks,
    Causal,
    Dilated,
    Global,
    Neighborhood,
    Periodic,
    Prefix,
    RandomBlocks,
    Segments,
    Sinks,
    Strided,
    Window,
)
from attnopt.patterns.algebra import Full, Pattern, any_of
from attnopt.patterns.per_head import PerHead

Sizes = int | Sequence[int]  # one for all axes of a grid, or one for each


def longformer(window: int, global_tokens: int | Sequence[int] = (), dilation: int = 1) -> Pattern:
    """``window // 2`` tokens on each side, and global tokens that see all tokens and are visible to all
    (arXiv:2004.05150).
    """
    side = whole("longformer", "window", window) // 2
    near = Window(side) if dilation == 1 else Dilated(side, side, dilation)
    positions = wholes("longformer", "global_tokens", global_tokens)
    return near | Global(positions) if positions else near


def bigbird(
    block: int = 64, window: int = 3, random: int = 3, global_blocks: int = 2, blocks: int | None = None, seed: int = 0
) -> Pattern:
    """A window of blocks, random blocks and global first blocks, all counted in blocks (arXiv:2007.14062, ITC).

    ``blocks``: number of blocks in the sequence; None draws the random blocks from those up to the query's own.
    """
    side = whole("bigbird", "window", window, least=1) // 2
    others = None if blocks is None else blocks - whole("bigbird", "global_blocks", global_blocks)
    rest = any_of([Blocks(block, halo=side * block), RandomBlocks(block, random, others, seed)])
    return Prefix(global_blocks * block, rest) if global_blocks else rest


def sparse_transformer_strided(stride: int) -> Pattern:
    """The last ``stride`` tokens and every ``stride``-th earlier token (arXiv:1904.10509, both in one head)."""
    return Causal() & (Window(stride, 0) | Strided(stride))


def sparse_transformer_fixed(stride: int, c: int) -> Pattern:
    """The own block of ``stride`` tokens and the last ``c`` tokens of every earlier block (arXiv:1904.10509, in one
    head).
    """
    return Causal() & (Blocks(stride) | Periodic(stride, stride - whole("sparse_transformer_fixed", "c", c), c))


def streaming_llm(window: int, sinks: int = 4) -> Pattern:
    """The ``sinks`` first tokens and the ``window`` latest ones, the query included (arXiv:2309.17453)."""
    return Causal() & (Window(whole("streaming_llm", "window", window, least=1) - 1, 0) | Sinks(sinks))


def s2_attn(group: int, heads: int, causal: bool = True, sinks: int = 0) -> Pattern:
    """Groups of tokens, shifted by half a group in the second half of the heads (LongLoRA, arXiv:2309.12307).

    The paper rolls the sequence, so its first half group also sees the END of the text, even in causal models.  Here,
    that half group is separate.  ``sinks``: number of first tokens visible to all (SinkLoRA, arXiv:2406.05678).
    """
    whole("s2_attn", "group", group, least=2)
    shifted = tuple(range(whole("s2_attn", "heads", heads, least=2) // 2, heads))
    groups: Pattern = PerHead({shifted: Blocks(group, shift=group // 2)}, default=Blocks(group))
    seen = groups | Sinks(sinks) if sinks else groups
    return Causal() & seen if causal else seen


def longnet(segments: Sequence[int], dilations: Sequence[int], heads: int, causal: bool = True) -> Pattern:
    """Segments of several lengths; in each, head h keeps the tokens h, h + r, h + 2r, ... (arXiv:2307.02486).

    The paper sums over segment lengths, weighted by their softmax denominators, so a pair in several segments counts
    several times; here it counts once.  Each dilation must divide its segment length.
    """
    lengths = whole_tuple("longnet", "segments", segments, None, least=1)
    steps = whole_tuple("longnet", "dilations", dilations, len(lengths), least=1)
    for length, step in zip(lengths, steps, strict=True):
        if length % step:
            raise PolicyError(f"longnet: dilation {step} does not divide segments of {length} tokens")

    def of(head: int) -> Pattern:
        return any_of(
            Blocks(w) if r == 1 else Blocks(w) & Strided(r) & Periodic(r, head % r)
            for w, r in zip(lengths, steps, strict=True)
        )

    seen: Pattern = PerHead({head: of(head) for head in range(whole("longnet", "heads", heads, least=1))})
    return Causal() & seen if causal else seen


def swin(grid: Sizes, window: Sizes, shift: Sizes = 0) -> Pattern:
    """Windows that tile an image, shifted by ``shift`` in every other layer (arXiv:2103.14030).

    As in the paper, tokens that the cyclic shift joins from opposite borders do not see each other.
    """
    sizes = whole_tuple("swin", "grid", grid, None, least=1)
    windows = whole_tuple("swin", "window", window, len(sizes), least=1)
    shifts = whole_tuple("swin", "shift", shift, len(sizes))
    if not any(shifts):
        return Neighborhood(sizes, windows, stride=windows, edge="clip")
    places = product(*(range(n) for n in sizes))
    of_window = [tuple((c - s) // w for c, w, s in zip(place, windows, shifts, strict=True)) for place in places]
    number = {window: n for n, window in enumerate(dict.fromkeys(of_window))}
    return Segments([number[window] for window in of_window])


def halonet(grid: Sizes, block: Sizes, halo: Sizes, edge: str = "clip") -> Pattern:
    """Blocks of an image see themselves and ``halo`` tokens around them (arXiv:2103.12731).

    ``edge``: at the border of the image, that window is clipped ("clip") or moved inside ("shift").
    """
    sizes = whole_tuple("halonet", "grid", grid, None, least=1)
    blocks = whole_tuple("halonet", "block", block, len(sizes), least=1)
    halos = whole_tuple("halonet", "halo", halo, len(sizes))
    kernel = [b + 2 * h for b, h in zip(blocks, halos, strict=True)]
    return Neighborhood(sizes, kernel, stride=blocks, edge=edge)


def nat(grid: Sizes, kernel: Sizes) -> Pattern:
    """Every token of an image sees its ``kernel`` nearest tokens along each axis (arXiv:2204.07143)."""
    return Neighborhood(grid, kernel)


def dinat(grid: Sizes, kernel: Sizes, dilation: Sizes) -> Pattern:
    """``nat`` among every ``dilation``-th token, alternating with undilated layers (arXiv:2209.15001)."""
    return Neighborhood(grid, kernel, dilation=dilation)


def gna(
    grid: Sizes, kernel: Sizes, stride: Sizes, dilation: Sizes = 1, causal: bool | Sequence[bool] = False
) -> Pattern:
    """Neighbourhoods shared by groups of ``stride`` tokens, so that tiles can be skipped (arXiv:2504.16922)."""
    return Neighborhood(grid, kernel, stride, dilation, causal)


def axial(grid: Sequence[int]) -> Pattern:
    """Every token sees the tokens that differ from it along one axis only (arXiv:1912.12180, all axes in one head)."""
    sizes = whole_tuple("axial", "grid", grid, None, least=1)
    lines = ([n if a == axis else 1 for a, n in enumerate(sizes)] for axis in range(len(sizes)))
    return any_of(Neighborhood(sizes, line) for line in lines)


def local_global_heads(global_heads: int | Sequence[int], window: int, sinks: int = 0, causal: bool = True) -> Pattern:
    """``global_heads`` see all tokens; the others see ``window`` tokens, including the query, and ``sinks`` first
    tokens.

    LS-attention (arXiv:2505.15548); with sinks, the retrieval and streaming heads of DuoAttention (arXiv:2410.10819).
    ``causal``: the window covers the latest tokens, and no head looks ahead; otherwise it is symmetric.
    """
    side = whole("local_global_heads", "window", window, least=1) - 1
    near: Pattern = Window(side, 0 if causal else side)
    heads = wholes("local_global_heads", "global_heads", global_heads)
    seen: Pattern = PerHead({heads: Full()}, default=near | Sinks(sinks) if sinks else near)
    return Causal() & seen if causal else seen
