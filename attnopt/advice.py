"""Predictions before anything runs: the possible gain of a pattern, what each kernel reaches of it, and better fitting
patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from attnopt.errors import PolicyError
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Pattern, parse
from attnopt.patterns.tile_cost import KERNELS, Tiles
from attnopt.report.advice import Advice, Better, Reached

_NOTICEABLE = 1.01  # smaller gains do not justify another pattern
_SHOWN = 3  # of the better patterns, for each kernel

Share = Callable[[Pattern], float]


def advise(
    attention: Site | AttentionSpec,
    pattern: Pattern | str,
    q_len: int | None = None,
    kv_len: int | None = None,
    *,
    tile: int | Sequence[int] | None = None,
) -> Advice:
    """Predict the gain of ``Sparse(pattern)`` on an attention, at its own or the given lengths.

    For a ``Neighborhood``, this includes kernels whose tiles are boxes of the grid, with the sizes ``tile`` (default:
    64 tokens).  Speed-ups are relative to a kernel that computes exactly the currently visible pairs.
    Raises PolicyError if lengths are missing or do not fit the pattern.
    """
    spec = attention.spec if isinstance(attention, Site) else attention
    if spec.between_channels:
        raise PolicyError("advise: a pattern hides tokens, and this attention is between channels")
    if spec.linear is not None:
        raise PolicyError(
            "advise: the cost of this attention does not grow with the pairs that queries see: it has no softmax"
        )
    if isinstance(attention, Site):
        q_len, kv_len = attention.q_len if q_len is None else q_len, attention.kv_len if kv_len is None else kv_len
    if q_len is None:
        raise PolicyError("advise: a spec has no sequence lengths", hint="pass q_len, and kv_len if it differs")
    kv_len = q_len if kv_len is None else kv_len
    wanted = (parse(pattern) if isinstance(pattern, str) else pattern).for_heads(spec.heads)
    if wanted.lengths is not None and kv_len not in wanted.lengths:
        raise PolicyError(
            f"advise: {wanted} does not fit {kv_len} tokens", hint="pass the lengths that the pattern was built for"
        )
    return _advice(spec, wanted, q_len, kv_len, tile)


def _advice(spec: AttentionSpec, wanted: Pattern, q_len: int, kv_len: int, tile: int | Sequence[int] | None) -> Advice:
    heads = spec.num_heads
    before = spec.pattern.density(q_len, kv_len, num_heads=heads)

    def density(p: Pattern) -> float:
        return spec.restricted(p).pattern.density(q_len, kv_len, num_heads=heads)

    def computed(kernel: Tiles, p: Pattern) -> float:
        return float(kernel.share(spec.restricted(p).pattern, q_len, kv_len, heads))

    shares: dict[str, Share] = {kernel.name: partial(computed, kernel) for kernel in KERNELS}
    sizes: dict[str, tuple[int, ...]] = {kernel.name: (kernel.block_kv,) for kernel in KERNELS if kernel.group is None}
    box = wanted.box(tile)
    if box is not None and spec.restricted(wanted).pattern == wanted:
        name = f"tiles of {'x'.join(map(str, box))} tokens"
        shares[name] = lambda p: p.box_share(box)
        sizes[name] = box
    own = density(wanted)
    kernels, better = [], []
    for name, share in shares.items():
        computes = share(wanted)
        kernels.append(Reached(name, computes, _ratio(before, computes), _ratio(own, computes)))
        if name in sizes:
            better += _better(name, wanted, own, computes, before, sizes[name], share, density)
    return Advice(str(wanted), q_len, kv_len, own, _ratio(before, own), tuple(kernels), tuple(better))


def _better(
    kernel: str,
    wanted: Pattern,
    own: float,
    computes: float,
    before: float,
    tile: tuple[int, ...],
    share: Share,
    density: Share,
) -> list[Better]:
    found: list[tuple[float, float, Pattern]] = []
    for candidate in dict.fromkeys(wanted.neighbours(tile)):
        cost = share(candidate)
        if candidate == wanted or cost > computes:
            continue
        seen = density(candidate)
        if cost * _NOTICEABLE < computes or seen > own * _NOTICEABLE:
            found.append((cost, -seen, candidate))
    found.sort(key=lambda entry: entry[:2])
    return [Better(kernel, str(p), -seen, _ratio(before, cost)) for cost, seen, p in found[:_SHOWN]]


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("inf")
