"""The cache layers of modules with patterns, put into the caches that they receive."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from attnopt.conversion.hf_cache import RollingLayer
from attnopt.conversion.hf_evicting_layer import EvictingLayer
from attnopt.conversion.hf_groups_layer import HeadGroupsLayer
from attnopt.errors import AttnoptError
from attnopt.patterns.algebra import FULL, Pattern

PATTERN = "attnopt_pattern"  # attributes of an attention module
EVICTION = "attnopt_eviction"


class PrepareCache:
    """A forward pre-hook of an attention module: a fresh cache that is handed to it gets, for the layer of the module, one that
    keeps what the pattern of the module can see, or that evicts keys.
    """

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        for cache in _caches((*args, *kwargs.values())):
            _prepare(cache, module)


def _prepare(cache: Any, module: nn.Module) -> None:
    layer: int = module.layer_idx  # type: ignore[assignment]
    pattern, eviction = getattr(module, PATTERN, FULL), getattr(module, EVICTION, None)
    if eviction is not None and torch.compiler.is_exporting():
        raise AttnoptError("a captured graph cannot evict keys from a cache", hint="capture it with use_cache=False")
    if isinstance(cache, DynamicCache) and cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer:
            cache.layers.append(cache.layer_class_to_replicate())
    now = cache.layers[layer]
    if type(now) is DynamicLayer and not now.is_initialized:
        cache.layers[layer] = _fresh(pattern) if eviction is None else EvictingLayer(eviction)
        return
    past = pattern.look_back
    from_the_end = eviction is None and past is not None and past.sinks == 0
    if isinstance(now, DynamicSlidingWindowLayer) and not from_the_end:
        raise AttnoptError(
            f"layer {layer} has its own sliding window, whose cache drops tokens that the pattern needs",
            hint="exclude the layer from the policy, or use a window without sinks",
        )
    if not isinstance(now, DynamicLayer):
        raise AttnoptError(
            f"layer {layer} of the cache is a {type(now).__name__}, whose last keys are not the newest",
            hint="generate with the default cache or another dynamic cache",
        )
    if eviction is not None and not isinstance(now, EvictingLayer):
        raise AttnoptError(
            f"layer {layer} of the cache already holds tokens, whose attention is unknown, so it cannot evict keys",
            hint="read the whole text with the model that evicts keys, from an empty cache",
        )


def _fresh(pattern: Pattern) -> DynamicLayer:
    heads = range(pattern.named_heads + 1)  # the last stands for all that are not named
    reaches = dict.fromkeys(pattern.for_head(h).look_back for h in heads)
    if len(reaches) > 1:
        return HeadGroupsLayer()
    (past,) = reaches
    return DynamicLayer() if past is None else RollingLayer(past)


def _caches(values: tuple[object, ...]) -> Iterator[object]:
    for value in values:
        if isinstance(value, EncoderDecoderCache):
            yield value.self_attention_cache
        elif isinstance(value, Cache):
            yield value
