"""Merging key/value heads, and what the output projection does about it, in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnopt.fit.compensation_methods import compensated, held_out_error
from attnopt.fit.merge_methods import KIND, shared
from attnopt.ir.activations import merged
from attnopt.ir.blame import blamed
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
    if not how.needs_calibration:
        return made.then(compensated(how, site.edited(made), spec))
    first, error = _fitted(site, made, how)
    with blamed(merge, KIND, "refined", site.name):
        values = merge.refined(site, groups, site.edited(first))
    if values is None:
        return first
    second, again = _fitted(site, replace(first, edits=merged(first.edits, values), notes=()), how)
    return second if again < error else first


def _fitted(site: Site, made: Rewrite, how: Compensation) -> tuple[Rewrite, float]:
    """With new output weights, and the error of the layer with them."""
    after = site.edited(made)
    fit = compensated(how, after, after.spec)
    return made.then(fit), held_out_error(after, fit)
