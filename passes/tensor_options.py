"""Options that are tensors: known numbers, or the name of what each call brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnopt.base.input import Input
from attnopt.errors import PolicyError
from attnopt.ir.call_tensor import BATCH, QUERIES, CallTensor
from attnopt.ir.constant import Constant
from attnopt.ir.site import Site

Shape = tuple[int, ...]
TensorOption = Tensor | Constant | Input | Mapping[str, Any]


def tensor_option(owner: str, option: str, given: Any, fits: Callable[[Shape], bool], hint: str) -> Constant | Input:
    """``given``: an ``Input``, or finite floating-point numbers, as a tensor, as nested lists or as what ``to_json`` wrote of
    either; ``fits`` says whether numbers of a shape are possible.  Raises PolicyError, with ``hint``."""
    try:
        found = _read(given)
        assert isinstance(found, Input) or (found.dtype != "bool" and fits(found.shape))
        assert isinstance(found, Input) or bool(found.tensor().isfinite().all())
    except (ValueError, KeyError, TypeError, OverflowError, RuntimeError, AssertionError) as error:
        shown = f"of shape {list(given.shape)}" if isinstance(given, (Tensor, Constant)) else repr(given)[:60]
        raise PolicyError(f"{owner}: invalid {option} {shown}", hint=hint) from error
    return found


def input_of(given: object) -> Input | None:
    """``given`` if it is an ``Input``, or what its ``to_json`` wrote.  Raises PolicyError."""
    if isinstance(given, Mapping) and "input" in given:
        return Input(given["input"])
    return given if isinstance(given, Input) else None


def _read(given: Any) -> Constant | Input:
    if (brought := input_of(given)) is not None:
        return brought
    if isinstance(given, Mapping):
        return Constant.from_json(given)
    if isinstance(given, Constant):
        return given
    found = torch.tensor(given, dtype=torch.float64) if isinstance(given, (list, tuple)) else given
    if not isinstance(found, Tensor):
        raise TypeError(f"{type(given).__name__} is no tensor")
    return Constant.of(found)


def values_of_heads(site: Site, given: Input, heads: int) -> CallTensor:
    """[B, heads, Dv], or [B, heads, L, Dv] where the example is so."""
    example = site.inputs.get(given.name)
    tokens = (QUERIES,) if example is not None and len(example.shape) == 4 else ()
    return CallTensor(given, (BATCH, heads, *tokens, site.value_dim))
