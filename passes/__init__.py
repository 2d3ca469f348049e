"""The built-in passes, one file each."""

from __future__ import annotations

if __name__ != "attnopt.passes":
    raise ImportError(f"{__name__} would be a second copy of attnopt.passes; import attnopt.passes instead")

from attnopt.passes.add_values import AddValues
from attnopt.passes.dynamic_sparse import DynamicSparse
from attnopt.passes.evict_keys import EvictKeys
from attnopt.passes.extend_keys import ExtendKeys
from attnopt.passes.fuse import Fuse
from attnopt.passes.grouped_query import GroupedQuery
from attnopt.passes.head_patch import HeadPatch
from attnopt.passes.latent_kv import LatentKv
from attnopt.passes.local_window import LocalWindow
from attnopt.passes.mix_map import MixMap
from attnopt.passes.pool_keys import PoolKeys
from attnopt.passes.prune_heads import PruneHeads
from attnopt.passes.query_rows import QueryRows
from attnopt.passes.refit import Refit
from attnopt.passes.replace_attention import Replace
from attnopt.passes.route_heads import RouteHeads
from attnopt.passes.scale_heads import ScaleHeads
from attnopt.passes.segment_gain import SegmentGain
from attnopt.passes.soft_pag import SoftPAG
from attnopt.passes.sparse import Sparse
from attnopt.passes.steer import Steer
from attnopt.passes.transplant import Transplant

__all__ = [
    "AddValues",
    "DynamicSparse",
    "EvictKeys",
    "ExtendKeys",
    "Fuse",
    "GroupedQuery",
    "HeadPatch",
    "LatentKv",
    "LocalWindow",
    "MixMap",
    "PoolKeys",
    "PruneHeads",
    "QueryRows",
    "Refit",
    "Replace",
    "RouteHeads",
    "ScaleHeads",
    "SegmentGain",
    "SoftPAG",
    "Sparse",
    "Steer",
    "Transplant",
]
