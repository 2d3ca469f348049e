"""Choices for a policy that leaves them to the search: windows, fewer key/value heads, fewer heads or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import fx

from attnopt.base.call_inputs import CallInputs
from attnopt.compiler.choices import SiteChoices
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.errors import CalibrationError
from attnopt.ir.interfaces import Pass
from attnopt.ir.site import Site
from attnopt.match.find import Found
from attnopt.passes.fuse import Fuse
from attnopt.passes.grouped_query import GroupedQuery
from attnopt.passes.local_window import LocalWindow
from attnopt.passes.prune_heads import PruneHeads
from attnopt.policy_search.budget import Budget
from attnopt.policy_search.targets import TOKEN
from attnopt.statistics.distance import Locality

SHARES = (0.5, 0.25, 0.125)  # of the keys, in a window
SINKS = 4
LEAST = 8  # keys of a window
PRUNED = (0.25, 0.5, 0.75)  # shares of the heads
LOOKED_AT = 3  # batches that tell where heads look
Passes = tuple[Pass, ...]


def default_choices(
    gm: fx.GraphModule, found: Sequence[Found], batches: Sequence[CallInputs], budget: Budget
) -> list[SiteChoices]:
    """For each attention what may save what is limited; it may refuse some of it."""
    wanted, sinks = {*budget.given}, SINKS
    near = near_heads(gm, found, batches) if wanted - {"parameters"} else {}
    if budget.target == TOKEN:  # its caches keep the last keys of all heads alike
        near, sinks = {}, 0
    return [SiteChoices(f.site.name, ((), *_offered(f.site, wanted, near.get(f.site.name, ()), sinks))) for f in found]


def near_heads(gm: fx.GraphModule, found: Sequence[Found], batches: Sequence[CallInputs]) -> dict[str, tuple[int, ...]]:
    """By attention the heads that look at the nearest keys: those of half of its key/value heads, so that a cache can drop keys.

    None where distances mean nothing."""
    how, near = Locality(), dict[str, tuple[int, ...]]()
    asked = [f for f in found if f.site.num_kv_heads > 1 and how.check(f.site) is None]
    for f, activations in Stream(gm, asked, batches[:LOOKED_AT]).sites():
        spec = f.site.spec
        try:
            scores = how.scores(replace(f.site, activations=activations))
        except CalibrationError:  # a head sees nothing
            continue
        of_group = [
            [s for s, g in zip(scores, spec.kv_of_head, strict=True) if g == n] for n in range(len(spec.kv_heads))
        ]
        ranked = sorted(range(len(of_group)), key=lambda n: -sum(of_group[n]) / len(of_group[n]))
        chosen = {*ranked[: len(ranked) // 2]}
        near[f.site.name] = tuple(h for h, g in zip(spec.heads, spec.kv_of_head, strict=True) if g in chosen)
    return near


def _offered(site: Site, resources: set[str], near: tuple[int, ...], sinks: int) -> Iterator[Passes]:
    if "latency" in resources:
        yield (Fuse(),)
    windows = [*_windows(site, sinks)] if resources - {"parameters"} else []
    fewer = [(PruneHeads(share, budget="site"),) for share in PRUNED if int(share * site.num_heads) >= 1]
    grouped = [(GroupedQuery(n, budget="site"),) for n in _kv_heads(site)] if resources - {"latency"} else []
    yield from ((w,) for w in windows)
    yield from ((replace(w, heads=near),) for w in windows[-2:] if near)
    yield from fewer
    yield (PruneHeads(heads=range(site.num_heads), whole_layers=True),)
    yield from grouped
    half = fewer[len(fewer) // 2 :][:1] if resources & {"latency", "flops"} else grouped[:1]
    yield from ((*passes, w) for passes in half for w in windows[-2:])


def _windows(site: Site, sinks: int) -> Iterator[LocalWindow]:
    for share in SHARES:
        keys = int(site.kv_len * share)
        if keys >= LEAST:
            yield LocalWindow(keys - 1 - sinks if site.spec.is_causal else (keys - 1 - sinks) // 2, sinks=sinks)


def _kv_heads(site: Site) -> list[int]:
    """A half, a quarter and one of them."""
    own = site.num_kv_heads
    return sorted({n for n in (own // 2, own // 4, 1) if 0 < n < own and own % n == 0}, reverse=True)
