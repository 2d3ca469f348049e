"""Patterns and evictions in a transformers model, through its AttentionInterface and AttentionMaskInterface, layer by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask

from attnopt.conversion.hf_attention import attend
from attnopt.conversion.hf_cache_hook import EVICTION, PATTERN, PrepareCache
from attnopt.errors import ConversionError
from attnopt.ir.eviction import Eviction
from attnopt.patterns import parse
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.registry import is_readable

# The attention implementation that replaces another, and the masks of that one: for fully masked padding queries,
# float masks give an average and bool masks nothing, which must stay the same.
NAMES = {"eager": ("attnopt-eager", eager_mask)}
OTHERWISE = ("attnopt", sdpa_mask)
PATTERNS = "attnopt_patterns"  # entry of a configuration: module name -> pattern, in its notation
EVICTIONS = "attnopt_evictions"  # the same, as the fields of an Eviction


def install(model: nn.Module, patterns: Mapping[str, Pattern | str] | None = None) -> None:
    """Give the attention modules of ``model`` that are named in ``patterns`` their patterns; see ``attnopt.apply_patterns``."""
    config = getattr(_transformers(model), "config", None)
    evictions = {} if patterns is not None else getattr(config, EVICTIONS, None) or {}
    given = patterns if patterns is not None else getattr(config, PATTERNS, None) or {}
    if not given and not evictions:
        raise ConversionError("the configuration of the model contains no patterns", hint="give patterns=")
    found = {name: p if isinstance(p, Pattern) else parse(p) for name, p in given.items()}
    unnamed = [pattern for pattern in found.values() if not is_readable(pattern)]
    if unnamed:
        raise ConversionError(
            f"pattern {unnamed[0]} is not reproduced by attnopt.patterns.parse from its text in the model configuration",
            hint="decorate its class with @attnopt.register",
        )
    _put(model, PATTERN, found)
    known = getattr(config, PATTERNS, None) or {}
    setattr(config, PATTERNS, {**known, **{name: pattern.to_json() for name, pattern in found.items()}})
    if evictions:
        install_evictions(model, {name: Eviction.from_json(data) for name, data in evictions.items()})


def install_evictions(model: nn.Module, evictions: Mapping[str, Eviction]) -> None:
    """Let the caches of these attention modules evict keys."""
    config = _transformers(model).config
    _put(model, EVICTION, evictions)
    known = getattr(config, EVICTIONS, None) or {}
    setattr(config, EVICTIONS, {**known, **{name: eviction.to_json() for name, eviction in evictions.items()}})


def _transformers(model: nn.Module) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        return model
    raise ConversionError(
        f"{type(model).__name__} is not a transformers model, so a pattern cannot be represented in it",
        hint="use attnopt.optimize",
    )


def _put(model: nn.Module, attribute: str, values: Mapping[str, object]) -> None:
    """Each value into its module, whose caches it then prepares."""
    modules = dict(model.named_modules())
    _check(model, modules, values)
    _switch(_transformers(model))
    for name, value in values.items():
        module = modules[name]
        setattr(module, attribute, value)
        if isinstance(getattr(module, "layer_idx", None), int) and not _prepares(module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(PrepareCache(), with_kwargs=True)


def _prepares(hooks: Iterable[object]) -> bool:
    return any(isinstance(hook, PrepareCache) for hook in hooks)


def _check(model: nn.Module, modules: Collection[str], names: Collection[str]) -> None:
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ConversionError(f"{type(model).__name__} has no module {', '.join(map(repr, unknown))}")
    if not getattr(model, "_supports_attention_backend", False):
        raise ConversionError(
            f"{type(model).__name__} does not use transformers' AttentionInterface",
            hint="use attnopt.optimize, whose graph applies the pattern",
        )


def _switch(model: PreTrainedModel) -> None:
    for name, masks in (*NAMES.values(), OTHERWISE):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, masks)
    now = model.config._attn_implementation
    if now in {name for name, _ in (*NAMES.values(), OTHERWISE)}:
        return
    name, _ = NAMES.get(now, OTHERWISE)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ConversionError(
            f"{type(model).__name__} does not let its attention implementation be set",
            hint="use attnopt.optimize, whose graph applies the pattern",
        )
