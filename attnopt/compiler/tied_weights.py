"""Weight sharing: attentions that call the same weights are decided together, so the weights stay shared.

A module that runs twelve times (ALBERT, arXiv:1909.11942) gets one rewrite, fitted on the activations of all its calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from attnopt.compiler.decide import Decision
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.ir.activations import Activations
from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.operands import OperandTensors
from attnopt.match.find import Found

Group = tuple[Found, ...]


def tied(found: Sequence[Found], passes: Mapping[str, tuple[object, ...]]) -> list[Group]:
    """The sites by their weights, those of the same weights, meaning and passes together."""
    groups: dict[object, list[Found]] = {}
    for f in found:
        weights = tuple((role, p.weight, p.bias, p.rows) for role, p in sorted(f.site.projections.items()))
        known = all(p.rows is not None for p in f.site.projections.values())
        key = (f.site.spec, weights, passes[f.site.name]) if known else f.site.name
        groups.setdefault(key, []).append(f)
    return [tuple(g) for g in groups.values()]


def jointly(stream: Stream, groups: Sequence[Group]) -> Iterator[tuple[Group, Activations]]:
    """Each group after its last call, with the activations of all its calls."""
    group_of = {f.site.name: n for n, group in enumerate(groups) for f in group}
    waiting: dict[int, list[Activations]] = {}
    for f, activations in stream.sites():
        n = group_of[f.site.name]
        waiting.setdefault(n, []).append(activations)
        if len(waiting[n]) == len(groups[n]):
            yield groups[n], _joined(waiting.pop(n))


def of_all(group: Group, decision: Decision) -> list[Decision]:
    """What was decided for the first of the group, for each of its calls."""
    made: list[Decision] = []
    for f in group:
        site = replace(f.site, spec=decision.site.spec)
        plan = None if decision.plan is None else replace(decision.plan, found=f)
        made.append(replace(decision, found=f, site=site, plan=plan))
    return made


def _joined(calls: Sequence[Activations]) -> Activations:
    if len(calls) == 1:
        return calls[0]

    def compute(edits: Sequence[HeadWeights], first_alone: bool = False) -> list[OperandTensors]:
        return [o for call in calls[: 1 if first_alone else None] for o in call.compute(edits, first_alone)]

    invented = [call.invented for call in calls if call.invented is not None]  # all of them, or none
    return Activations(
        calls[0].site,
        tuple(o for call in calls for o in call.batches),
        compute,
        calls=len(calls),
        invented=_joined(invented) if invented else None,
    )
