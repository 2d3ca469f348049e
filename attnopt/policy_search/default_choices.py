"""Choices for a policy that leaves them to the search: windows, fewer key/value heads, fewer heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from attnopt.compiler.choices import SiteChoices
from attnopt.ir.interfaces import Pass
from attnopt.ir.site import Site
from attnopt.match.find import Found
from attnopt.passes.fuse import Fuse
from attnopt.passes.grouped_query import GroupedQuery
from attnopt.passes.local_window import LocalWindow
from attnopt.passes.prune_heads import PruneHeads

SHARES = (0.5, 0.25, 0.125)  # of the keys, in a window
SINKS = 4
LEAST = 8  # keys of a window
PRUNED = (0.25, 0.5, 0.75)  # shares of the heads
Passes = tuple[Pass, ...]


def default_choices(found: Sequence[Found], resources: Iterable[str]) -> list[SiteChoices]:
    """For each attention what may save what is limited; it may refuse some of it."""
    wanted = {*resources}
    return [SiteChoices(f.site.name, ((), *_offered(f.site, wanted))) for f in found]


def _offered(site: Site, resources: set[str]) -> Iterator[Passes]:
    if "latency" in resources:
        yield (Fuse(),)
    windows = [*_windows(site)] if resources - {"parameters"} else []
    fewer = [(PruneHeads(share, budget="site"),) for share in PRUNED if int(share * site.num_heads) >= 1]
    grouped = [(GroupedQuery(n, budget="site"),) for n in _kv_heads(site)] if resources - {"latency"} else []
    yield from ((w,) for w in windows)
    yield from fewer
    yield from grouped
    half = fewer[len(fewer) // 2 :][:1] if resources & {"latency", "flops"} else grouped[:1]
    yield from ((*passes, w) for passes in half for w in windows[-2:])


def _windows(site: Site) -> Iterator[LocalWindow]:
    for share in SHARES:
        keys = int(site.kv_len * share)
        if keys >= LEAST:
            yield LocalWindow(keys - 1 - SINKS if site.spec.is_causal else (keys - 1 - SINKS) // 2, sinks=SINKS)


def _kv_heads(site: Site) -> list[int]:
    """A half, a quarter and one of them."""
    own = site.num_kv_heads
    return sorted({n for n in (own // 2, own // 4, 1) if 0 < n < own and own % n == 0}, reverse=True)
