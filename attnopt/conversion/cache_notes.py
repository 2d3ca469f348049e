"""What the caches of a converted model keep, for its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from attnopt.base.call_inputs import CallInputs
from attnopt.conversion.decoding_check import read_into_cache
from attnopt.conversion.head_groups import HeadGroup
from attnopt.conversion.hf_cache import RollingLayer
from attnopt.conversion.hf_groups_layer import HeadGroupsLayer
from attnopt.conversion.reordered_weights import head_order
from attnopt.lower.lower import Plan
from attnopt.patterns.lookback import Past
from attnopt.report.report import Report


def with_cache_notes(report: Report, model: nn.Module, plans: Sequence[Plan], inputs: CallInputs) -> Report:
    """With a note at each site whose cache keeps less than all tokens, as found in the cache of the example text."""
    cache = read_into_cache(model, inputs)
    notes = {plan.found.site.name: tuple(_notes(model, plan, cache)) for plan in plans}
    sites = (replace(s, notes=(*s.notes, *notes.get(s.name, ()))) for s in report.sites)
    return replace(report, sites=tuple(sites))


def _notes(model: nn.Module, plan: Plan, cache: object) -> Iterator[str]:
    layers: Sequence[object] = getattr(cache, "layers", ())
    place = getattr(model.get_submodule(plan.found.site.name.partition("#")[0]), "layer_idx", None)
    if not isinstance(place, int) or place >= len(layers):
        return
    layer = layers[place]
    if isinstance(layer, RollingLayer):
        yield f"its cache keeps {_kept(layer.past)}"
    elif isinstance(layer, HeadGroupsLayer) and any(group.past is not None for group in layer.groups):
        numbers = head_order(plan).keys
        yield "its cache keeps " + "; ".join(_of_group(group, numbers) for group in layer.groups)


def _of_group(group: HeadGroup, numbers: Sequence[int]) -> str:
    heads = ", ".join(str(numbers[g]) for g in group.kv_heads)
    return f"{_kept(group.past)} of key/value head{'s' if len(group.kv_heads) > 1 else ''} {heads}"


def _kept(past: Past | None) -> str:
    if past is None:
        return "all tokens"
    return (
        f"the first {past.sinks} and the last {past.recent} tokens" if past.sinks else f"the last {past.recent} tokens"
    )
