"""The kinds of plugins, and the installed plugins of each kind."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, TypeVar

from attnopt.base.debug import debugging
from attnopt.base.registry import OURS, Plugin, Registry
from attnopt.errors import PluginError
from attnopt.fit.compensation_methods import COMPENSATIONS
from attnopt.fit.importance_methods import IMPORTANCE
from attnopt.fit.merge_methods import KV_MERGES
from attnopt.fit.partition_methods import KV_PARTITIONS
from attnopt.ir.edit_registry import HEAD_EDITS
from attnopt.ir.interfaces import Backend, Pass
from attnopt.ir.mixer_registry import MIXERS
from attnopt.ir.score_registry import ROW_SCORES, SCORES
from attnopt.patterns.registry import PATTERNS

__all__ = ["OURS", "Description", "backends", "describe", "load_backend", "load_pass", "passes", "register"]

PASSES = Registry(
    "attnopt.passes",
    "pass",
    Pass,  # type: ignore[type-abstract]
    {
        "fuse": "attnopt.passes.fuse:Fuse",
        "local-window": "attnopt.passes.local_window:LocalWindow",
        "sparse": "attnopt.passes.sparse:Sparse",
        "dynamic-sparse": "attnopt.passes.dynamic_sparse:DynamicSparse",
        "prune-heads": "attnopt.passes.prune_heads:PruneHeads",
        "grouped-query": "attnopt.passes.grouped_query:GroupedQuery",
        "scale-heads": "attnopt.passes.scale_heads:ScaleHeads",
        "route-heads": "attnopt.passes.route_heads:RouteHeads",
        "segment-gain": "attnopt.passes.segment_gain:SegmentGain",
        "soft-pag": "attnopt.passes.soft_pag:SoftPAG",
        "head-patch": "attnopt.passes.head_patch:HeadPatch",
        "steer": "attnopt.passes.steer:Steer",
        "add-values": "attnopt.passes.add_values:AddValues",
        "extend-keys": "attnopt.passes.extend_keys:ExtendKeys",
        "pool-keys": "attnopt.passes.pool_keys:PoolKeys",
        "mix-map": "attnopt.passes.mix_map:MixMap",
        "transplant": "attnopt.passes.transplant:Transplant",
        "evict-keys": "attnopt.passes.evict_keys:EvictKeys",
        "query-rows": "attnopt.passes.query_rows:QueryRows",
        "replace": "attnopt.passes.replace_attention:Replace",
        "latent-kv": "attnopt.passes.latent_kv:LatentKv",
    },
    lambda cls: getattr(cls, "name", None),
)
BACKENDS = Registry(
    "attnopt.backends",
    "backend",
    Backend,  # type: ignore[type-abstract]
    {
        "reference": "attnopt.backends.reference:Reference",
        "sdpa": "attnopt.backends.sdpa:Sdpa",
        "blocked": "attnopt.backends.blocked:Blocked",
        "chunked": "attnopt.backends.chunked:Chunked",
    },
    lambda cls: getattr(cls, "name", None),
)
KINDS: tuple[Registry[Any], ...] = (
    PASSES, BACKENDS, PATTERNS, HEAD_EDITS, MIXERS, SCORES, ROW_SCORES, IMPORTANCE, KV_PARTITIONS, KV_MERGES, COMPENSATIONS,
)  # fmt: skip
_LISTED = (PASSES, BACKENDS)

C = TypeVar("C", bound=type)


def register(cls: C) -> C:
    """Register a pass, backend, pattern, head edit, mixer, block score, row score, importance method, KV partition, KV merge
    or compensation under its name; a decorator.

    Policies, texts and saved models can then use the name, in this process.  An installed distribution does the same with
    an entry point in the group ``attnopt.passes``, ``attnopt.backends``, ``attnopt.patterns``, ``attnopt.head_edits``,
    ``attnopt.mixers``, ``attnopt.block_scores``, ``attnopt.row_scores``, ``attnopt.importance``, ``attnopt.kv_partitions``,
    ``attnopt.kv_merges`` or ``attnopt.compensations``.  Raises PluginError if the name is taken or the class is incomplete.
    """
    kind = next((k for k in KINDS if isinstance(cls, type) and issubclass(cls, k.base)), None)
    if kind is None:
        known = ", ".join(k.base.__name__ for k in KINDS)
        raise PluginError(f"{cls!r} cannot be registered", hint=f"make it a subclass of one of {known}")
    kind.register(cls)
    return cls


@dataclass(frozen=True)
class Description:
    """A row of a listing.

    ``options``: option names and defaults ("required" without a default); ``exact``: None for all but passes; ``error``:
    why it cannot be loaded, "" if it can.
    """

    kind: str
    name: str
    exact: bool | None
    options: dict[str, str]
    summary: str
    distribution: str
    error: str = ""


def passes() -> dict[str, Plugin]:
    """All known passes by name, without importing them."""
    return PASSES.listed()


def backends() -> dict[str, Plugin]:
    """All known backends by name, without importing them."""
    return BACKENDS.listed()


def load_pass(name: str) -> type[Pass]:
    """The pass class of this name.  Raises PolicyError for an unknown name, PluginError for a broken plugin."""
    return PASSES.load(name)


def load_backend(name: str) -> type[Backend]:
    """The backend class of this name.  Raises PolicyError for an unknown name, PluginError for a broken plugin."""
    return BACKENDS.load(name)


def typical_pass(name: str) -> Pass | None:
    """The pass to check without options; None if the answer depends on options, or it cannot be loaded."""
    try:
        return load_pass(name).typical()
    except Exception:  # of a third party; reported on use, and in the listing
        if debugging() and passes()[name].distribution == OURS:
            raise
        return None


def make_backend(name: str) -> Backend:
    """The backend of this name with default options.  Raises like ``load_backend``, or PluginError if options are required."""
    return BACKENDS.make(name, hint="pass an instance")


def describe() -> list[Description]:
    """Every pass and backend, and third-party plugins of other kinds; plugins that cannot be loaded carry their error."""
    found = [(kind, plugin) for kind in KINDS for plugin in kind.listed().values()]
    return [_described(kind, p) for kind, p in found if kind in _LISTED or p.distribution != OURS]


def _described(kind: Registry[Any], plugin: Plugin) -> Description:
    try:
        loaded = kind.load(plugin.name)
    except PluginError as error:
        return Description(plugin.kind, plugin.name, None, {}, "", plugin.distribution, error.message)
    summary = (inspect.getdoc(loaded) or "").partition("\n")[0]
    exact = getattr(loaded, "exact", None)
    return Description(plugin.kind, plugin.name, exact, _options(loaded), summary, plugin.distribution)


def _options(loaded: type) -> dict[str, str]:
    parameters = inspect.signature(loaded).parameters.values()
    return {p.name: "required" if p.default is p.empty else repr(p.default) for p in parameters}
