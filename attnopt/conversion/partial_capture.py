"""A model as one captured program or, if that is impossible, as one per attention module."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from torch import nn
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.user_warning import warn
from attnopt.capture.submodules import InPlace, Region, attention_regions
from attnopt.compiler.compile import Compiled, compiled
from attnopt.compiler.job import Options
from attnopt.compiler.policy import Policy
from attnopt.errors import AttnoptWarning, CaptureError, PolicyError
from attnopt.lower.fold import folded
from attnopt.lower.lower import Plan
from attnopt.report.report import Report


@dataclass(frozen=True)
class Part:
    """What was captured of a model: the module ``name``, or all of it."""

    made: Compiled
    name: str = ""

    def of(self, model: nn.Module) -> nn.Module:
        """The part of ``model``, called as it was captured."""
        return InPlace(model, self.name) if self.name else model

    @property
    def plans(self) -> list[Plan]:
        """The changes, with everything possible folded into the weights."""
        plans = [d.plan for d in self.made.decisions if d.plan is not None and not d.plan.changes_nothing]
        return [folded(plan.found, plan) for plan in plans]


def parts_of(
    model: nn.Module, policy: object, inputs: CallInputs, batches: Sequence[CallInputs], options: Options
) -> list[Part]:
    """The whole model, or its attention modules with the inputs they receive from the example.  Raises CaptureError."""
    chosen = Policy.of(policy).without_choices()
    try:
        return [Part(compiled(model, chosen, inputs, batches, options))]
    except CaptureError as error:
        if chosen.conditions:
            raise PolicyError(
                f"{chosen.conditions[0]} chooses among all attentions of a model, and this one cannot be captured as a "
                f"whole: {error.message}",
                hint="choose attentions by their names, or see the error of attnopt.optimize",
            ) from error
        found = list(_regions(model, chosen, inputs, batches, options))
        if not found:
            raise
    names = [d.found.site.name for part in found for d in part.made.decisions]
    unmatched = [glob for glob in chosen.unmatched(names) if glob != "*"]
    if unmatched:
        listed = ", ".join(map(repr, names))
        raise PolicyError(f"no attention is named {', '.join(map(repr, unmatched))}", hint=f"the sites are {listed}")
    warn(f"the model could not be captured as a whole: {len(found)} of its modules were captured separately")
    return found


def joined_report(parts: Sequence[Part]) -> Report:
    """One report of all parts."""
    first, *others = (part.made.origin.report for part in parts)
    reports = (first, *others)
    return replace(
        first,
        sites=tuple(chain.from_iterable(r.sites for r in reports)),
        near_misses=tuple(chain.from_iterable(r.near_misses for r in reports)),
        warnings=tuple(dict.fromkeys(chain.from_iterable(r.warnings for r in reports))),
        error=max((r.error for r in reports if r.error is not None), default=None),
        policy={s.name: r.policy["*"] for r in reports for s in r.sites} if others else first.policy,
    )


def _regions(
    model: nn.Module, policy: Policy, inputs: CallInputs, batches: Sequence[CallInputs], options: Options
) -> list[Part]:
    found: list[Part] = []
    left = options.limit
    for region in attention_regions(model, [inputs, *batches]):
        if not region.inputs or any(_holds_cache(given) for given in region.inputs):
            continue  # a cache inside a captured module would not be updated
        made = _captured(model, region, policy, bool(batches), replace(options, limit=left))
        if made is None or not made.decisions:
            continue
        found.append(Part(made, region.name))
        if left is not None:
            left -= len([d for d in made.decisions if d.plan is not None])
    return found


def _captured(model: nn.Module, region: Region, policy: Policy, calibrates: bool, options: Options) -> Compiled | None:
    own = Policy((("*", policy.passes_for(region.name)),))
    example, *batches = region.inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttnoptWarning)  # a module without attention needs no warning
        try:
            return compiled(InPlace(model, region.name), own, example, batches if calibrates else [], options, None)
        except CaptureError:
            return None


def _holds_cache(given: CallInputs) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and any(isinstance(x, transformers.Cache) for x in pytree.tree_leaves(given))
