"""Teacher forcing: a language model that decodes token by token from its cache must match its logits on the whole text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import difference
from attnopt.capture.run_unchanged import cloned, kept


def decoding_error(model: nn.Module, inputs: CallInputs) -> float | None:
    """Largest relative difference of the logits on the example text if half of it is read at once, some tokens one by one
    and the rest at once; None for a model without a cache, or with inputs other than token ids and their mask."""
    text = _text(model, *cloned(inputs))
    if text is None:
        return None
    ids, mask = text["input_ids"], text.get("attention_mask")
    length = ids.shape[1]
    stops = [length // 2, *range(length // 2 + 1, min(length // 2 + 4, length)), length]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), kept(model):
        whole = model(**text, use_cache=False).logits
        cache, pieces, start = None, list[Tensor](), 0
        for stop in stops:
            part = {"input_ids": ids[:, start:stop]}
            if mask is not None:
                part["attention_mask"] = mask[:, :stop]
            out = model(**part, past_key_values=cache, use_cache=True)
            cache, start = getattr(out, "past_key_values", None), stop
            if cache is None:
                return None
            pieces.append(out.logits)
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return difference([torch.cat(pieces, dim=1)[seen]], [whole[seen]])


def read_into_cache(model: nn.Module, inputs: CallInputs) -> object:
    """The cache of the example text; None as for ``decoding_error``."""
    text = _text(model, *cloned(inputs))
    if text is None:
        return None
    with torch.no_grad(), torch.random.fork_rng(devices=[]), kept(model):
        return getattr(model(**text, use_cache=True), "past_key_values", None)


def _text(model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Tensor] | None:
    """The token ids [B, L] and their mask among the example inputs, if these are the only inputs."""
    parameters = inspect.signature(model.forward).parameters
    if not {"past_key_values", "use_cache"} <= set(parameters) or not getattr(model, "can_generate", bool)():
        return None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    text = {name: value for name, value in given.items() if isinstance(value, Tensor) and name != "labels"}
    ids = text.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.shape[1] < 4 or not set(text) <= {"input_ids", "attention_mask"}:
        return None
    return text
