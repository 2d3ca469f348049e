"""Merging key/value heads, and what the output projection does about it, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnopt.fit.compensation_methods import compensated, held_out_error
from attnopt.fit.merge_methods import refined, shared
from attnopt.ir.activations import merged
from attnopt.ir.compensation import Compensation
from attnopt.ir.interfaces import Rewrite
from attnopt.ir.kv_merge import KvMerge
from attnopt.ir.kv_partition import Group
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec


def merged_and_fitted(
    merge: KvMerge, site: Site, groups: Sequence[Group], spec: AttentionSpec, how: Compensation
) -> Rewrite:
    """The rewrite to ``spec``, which has one key/value head for each group.  Raises CalibrationError, PluginError.

    A merge may refine its values for the output projection that was fitted to them, which is then fitted once more.
    """
    made = shared(merge, site, groups, spec)
    after = site.edited(made)
    first = compensated(how, after, spec)
    fitted = made.then(first)
    if not (how.needs_calibration and merge.adapts_readers):
        return fitted
    values = refined(merge, site, groups, after.edited(first))
    if values is None:
        return fitted
    other = replace(fitted, edits=merged(fitted.edits, values), notes=())
    turned = site.edited(other)
    second = compensated(how, turned, spec)
    return other.then(second) if held_out_error(turned, second) < held_out_error(after, first) else fitted
