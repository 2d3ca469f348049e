"""Rewriting a model inside its own class, so that generation, saving and training keep working."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from torch import fx, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.options import LARGEST
from attnopt.base.user_warning import warn
from attnopt.capture.calibration import Batch, Calibration
from attnopt.compiler.job import Options
from attnopt.compiler.policy import Policy
from attnopt.conversion.class_settings import Counts, Setting, attributes, configurations, settle
from attnopt.conversion.judge import Decoding, Judge
from attnopt.conversion.layer_heads import forget_heads, note_heads
from attnopt.conversion.partial_capture import Part, joined_report, parts_of
from attnopt.conversion.reordered_weights import REMEDY, head_order, put_into, reshaped
from attnopt.errors import ConversionError, PolicyError
from attnopt.ir.eviction import Eviction
from attnopt.lower.lower import Plan, lower
from attnopt.patterns import Sinks, Window
from attnopt.patterns.algebra import Full, Pattern

Model = TypeVar("Model", bound=nn.Module)
T = TypeVar("T")

LEAST = 4  # tokens, for a pattern to show


@compiling()
def convert(
    model: Model,
    policy: object,
    args: object = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    calibration: Iterable[Batch] | Calibration | None = None,
    tolerance: float | None = None,
    strict: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> Model:
    """Return a copy of ``model``, of its own class, with the rewrites of ``policy`` in its weights, settings and
    attention layers.

    Removed or merged heads make the projections smaller.  The head counts are changed in the configuration if the class
    then builds the same model, so that the saved copy is an ordinary checkpoint; otherwise in the modules, with an
    AttnoptWarning.
    Patterns are applied through transformers' AttentionInterface, and caches keep of each head only what its pattern can
    still see (see ``apply_patterns``).
    The copy computes what the graph of ``optimize`` computes: compared on the example inputs, at other sizes, and token
    by token if the model has a cache.  ``copy.attnopt_report`` is its report.
    If the model cannot be captured as a whole, its attention modules are captured separately.

    ``args``, ``kwargs``: example inputs, of at least 4 tokens with patterns; the model is captured without a cache.
    The other options are those of ``optimize``, which supports what a class cannot represent.

    Raises ConversionError if the class cannot represent the result of the policy, and whatever ``optimize`` raises.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"expected an nn.Module, found {type(model).__name__}", hint="pass the model itself")
    inputs, batches = _inputs(model, args, kwargs, calibration)
    chosen = Policy.of(policy)
    if chosen.inputs:
        listed = ", ".join(dict.fromkeys(i.name for i in chosen.inputs))
        raise ConversionError(f"no model class hands {listed} of each call to its attentions", hint=REMEDY)
    parts = parts_of(model, chosen, inputs, batches, Options(tolerance, strict, limit, seed, decodes=True))
    plans = [plan for part in parts for plan in part.plans]
    for plan in plans:
        _check_class(plan)
    values = reshaped(model, plans)
    converted = copy.deepcopy(model)
    put_into(converted, values)
    patterns = {_name(p): seen for p in plans if (seen := _new_pattern(p)) is not None}
    found = [d.found for part in parts for d in part.made.decisions]
    evictions = {_name(p): p.spec.eviction for p in plans if p.spec.eviction is not None}
    made = {_name(plan): plan.spec for plan in plans}
    counts = {f.site.name: Counts.of(f.raised.spec, made.get(f.site.name, f.raised.spec)) for f in found}
    meant, decoding = [(part, part.made.module) for part in parts], Decoding(model, inputs)
    if patterns:
        _check_lengths(plans)
        narrow = {name: _probe(pattern) for name, pattern in patterns.items()}
        _install(converted, {name: pattern & narrow[name] for name, pattern in patterns.items()})
        _settle(converted, counts, Judge([(part, _narrowed(part, narrow)) for part in parts], decoding))
        _install(converted, patterns)
        if not Judge(meant, decoding).agrees(converted):
            raise _differs(converted)
    else:
        _settle(converted, counts, Judge(meant, decoding))
    if evictions:
        _install_evictions(converted, evictions, decoding)
    report = joined_report(parts)
    if patterns and decoding.matters:
        from attnopt.conversion.cache_notes import with_cache_notes

        report = with_cache_notes(report, converted, plans, inputs)
    converted.attnopt_report = report  # type: ignore[assignment]
    return converted


def apply_patterns(model: nn.Module, patterns: Mapping[str, Pattern | str] | None = None) -> None:
    """Restrict attention modules of a transformers model to patterns, in place.

    ``patterns``: names of attention modules -> patterns; by default those that ``convert`` stored in the configuration,
    which restores the patterns of a checkpoint loaded with ``from_pretrained``, and the keys that its caches evict.
    Positions are those of the tokens in the sequence, including padding; the last query is aligned with the last key.
    If a pattern bounds the visible past of a head, the caches of the model keep no more than that of it.

    Raises ConversionError if the class does not use AttentionInterface.
    """
    from attnopt.conversion.hf_install import install

    install(model, patterns)


def _inputs(
    model: nn.Module,
    args: object,
    kwargs: Mapping[str, object] | None,
    calibration: Iterable[Batch] | Calibration | None,
) -> tuple[CallInputs, list[CallInputs]]:
    """The example inputs and the calibration batches, all without a cache: a captured cache would not be updated."""
    batches = [] if calibration is None else list(Calibration.of(calibration).batches)
    example = CallInputs.of(args, kwargs)
    if not any(example):
        if not batches:
            raise PolicyError("convert needs example inputs", hint="pass args, kwargs or calibration")
        example = batches[0]
    parameters = list(inspect.signature(model.forward).parameters)

    def without_cache(given: CallInputs) -> CallInputs:
        positional, named = given
        known = "use_cache" in parameters and parameters.index("use_cache") >= len(positional)
        return CallInputs(positional, {**named, "use_cache": False} if known else named)

    return without_cache(example), [without_cache(b) for b in batches]


def _check_class(plan: Plan) -> None:
    """Raise ConversionError for what no model class can represent."""
    before, after = plan.found.raised.spec, plan.spec
    if after.selection is not None:
        raise ConversionError(
            "blocks chosen at run time cannot be represented in this model class", site=_name(plan), hint=REMEDY
        )
    if after.pooling is not None:
        raise ConversionError(
            "pooled keys and values cannot be represented in this model class", site=_name(plan), hint=REMEDY
        )
    if after.rows is not None:
        raise ConversionError(
            "rows chosen at run time cannot be represented in this model class", site=_name(plan), hint=REMEDY
        )
    if after.other_weights and (after.heads, after.pattern) != (before.heads, before.pattern):
        raise ConversionError(
            f"an attention keeps its heads and its pattern in this model class if it has {after.other_weights}",
            site=_name(plan),
            hint=REMEDY,
        )
    if after.before:
        raise ConversionError(
            f"{after.before[0]} cannot be represented in this model class", site=_name(plan), hint=REMEDY
        )
    if after.is_causal and after.visible_pattern.reads_length:
        raise ConversionError(
            f"{after.visible_pattern} depends on the length of the text, which grows while the model decodes: earlier tokens "
            "would see other keys at each step",
            site=_name(plan),
            hint="use a window of one length, such as local-window without share",
        )
    if after.extension is not None:
        raise ConversionError(
            "keys and values of other tokens cannot be represented in this model class", site=_name(plan), hint=REMEDY
        )
    if (after.has_map or after.mixes_heads) and after.pattern != before.pattern:
        beside = "a map across heads" if after.mixes_heads else "a map that is mixed into the weights"
        raise ConversionError(
            f"a pattern beside {beside} cannot be represented in this model class",
            site=_name(plan),
            hint=REMEDY,
        )
    kept = replace(
        after,
        heads=before.heads,
        kv_heads=before.kv_heads,
        kv_of_head=before.kv_of_head,
        after=before.after,  # see ``reshaped``
        pattern=before.pattern,
        seen_as=before.seen_as,
        eviction=before.eviction,
    )
    if kept != before:
        raise ConversionError(
            f"{', '.join(plan.passes)} changes more than heads and patterns, which no model class can represent",
            site=_name(plan),
            hint=REMEDY,
        )


def _name(plan: Plan) -> str:
    return plan.found.site.name


def _new_pattern(plan: Plan) -> Pattern | None:
    """The effective mask of the site after the passes, in the order of the converted heads; None if unchanged."""
    before, after = plan.found.raised.spec, plan.spec
    seen, was = (spec.visible_pattern for spec in (after, before))
    order = [after.heads.index(h) for h in head_order(plan).queries]
    if seen == was.for_heads([before.heads.index(h) for h in after.heads]):
        return None
    return seen.for_heads(order)


def _probe(pattern: Pattern) -> Pattern:
    """A pattern narrow enough to have an effect on few tokens; without sinks if ``pattern`` has none."""
    past = pattern.look_back
    return Window(1, 1) if past is not None and past.sinks == 0 else Window(1, 1) | Sinks(1)


def _narrowed(part: Part, narrow: Mapping[str, Pattern]) -> fx.GraphModule:
    """The graph of a part in which sites with a pattern see even less."""
    probes = [replace(p, spec=p.spec.restricted(narrow.get(_name(p), Full()))) for p in part.plans]
    return lower(part.made.program.module, probes, plain=True)


def _check_lengths(plans: Sequence[Plan]) -> None:
    for plan in plans:
        if plan.found.site.q_len < LEAST:
            raise ConversionError(
                f"the example inputs have {plan.found.site.q_len} tokens, too few to see the effect of a pattern",
                site=_name(plan),
                hint=f"pass example inputs of at least {LEAST} tokens",
            )


def _homes(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost transformers models in ``model``, by name with a trailing dot ("" for itself)."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return {}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel) and not any(name.startswith(home) for home in found):
            found[f"{name}." if name else ""] = module
    return found


def _by_home(model: nn.Module, values: Mapping[str, T]) -> Iterator[tuple[nn.Module, dict[str, T]]]:
    """Each transformers model in ``model``, with the values of its own modules.  Raises ConversionError."""
    homes = _homes(model)
    for name in values:
        if not any(name.startswith(home) for home in homes):
            raise ConversionError(
                f"{type(model).__name__} is not a transformers model, so a pattern cannot be represented in it",
                site=name,
                hint=REMEDY,
            )
    for home, module in homes.items():
        own = {name.removeprefix(home): value for name, value in values.items() if name.startswith(home)}
        if own:
            yield module, own


def _install(model: nn.Module, patterns: Mapping[str, Pattern]) -> None:
    for home, own in _by_home(model, patterns):
        apply_patterns(home, own)


def _install_evictions(model: nn.Module, evictions: Mapping[str, Eviction], decoding: Decoding) -> None:
    """Verified with budgets of the whole text, under which the model must decode as before."""
    if not decoding.matters:
        raise ConversionError(
            f"{type(model).__name__} does not decode from a cache on the example inputs, so no keys can be evicted",
            hint="pass a language model and token ids of at least 4 tokens, with their mask",
        )
    from attnopt.conversion.hf_install import install_evictions

    for home, own in _by_home(model, evictions):
        install_evictions(home, {name: replace(eviction, budget=LARGEST) for name, eviction in own.items()})
    if not decoding.works(model):
        raise ConversionError(
            f"{type(model).__name__} does not decode as before from a cache that keeps keys by their attention",
            hint='use method="sinks"',
        )
    for home, own in _by_home(model, evictions):
        install_evictions(home, own)


def _settle(model: nn.Module, counts: Mapping[str, Counts], judge: Judge) -> None:
    """Find the settings with which ``model`` computes the expected result on its new weights.  Raises ConversionError."""
    changed = any(c.change for c in counts.values())
    candidates: Iterator[tuple[Setting, ...]] = iter([()])
    if changed:
        distinct = set(counts.values())
        ordinary = (configurations(home, c) for home in _homes(model).values() for c in distinct if len(distinct) == 1)
        around = [(_modules_around(model, name), c) for name, c in counts.items()]
        candidates = chain(*ordinary, [()], attributes(around))
    found = settle(candidates, lambda: judge.agrees(model))
    if found is None:
        raise _differs(model)
    if not changed or not _homes(model):
        return
    if any(not isinstance(s.owner, nn.Module) for s in found):
        for home in _homes(model).values():
            forget_heads(home)
        return
    noted = [note_heads(home, found) for home in _homes(model).values()]
    can = "attnopt.load_pretrained can" if all(noted) else "and its class cannot be built with them"
    warn(
        f"no configuration of {type(model).__name__} describes these heads: the converted model runs, but "
        f"from_pretrained cannot load what it saves; {can}"
    )


def _modules_around(model: nn.Module, site: str) -> list[nn.Module]:
    """The module of a site and the one that it is in."""
    name = site.partition("#")[0]
    return [model.get_submodule(name), *([model.get_submodule(name.rpartition(".")[0])] if name else [])]


def _differs(model: nn.Module) -> ConversionError:
    return ConversionError(
        f"{type(model).__name__} cannot represent what the policy asks for: no head counts in its configuration or its "
        "modules make it compute what the rewritten graph computes",
        hint=REMEDY,
    )
