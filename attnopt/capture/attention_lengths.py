"""One length of keys and values: on a CPU, torch's fused attention takes two, and reads beyond the shorter one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class KeysAndValuesAlike(TorchFunctionMode):
    """Inside, a traced ``F.scaled_dot_product_attention`` says that its keys and values have the same free length."""

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            _check(*_keys_and_values(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _keys_and_values(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return key, value


def _check(key: Tensor, value: Tensor) -> None:
    lengths = key.size(-2), value.size(-2)
    if any(isinstance(n, torch.SymInt) for n in lengths):
        torch._check(lengths[0] == lengths[1], lambda: "keys and values of one attention have two lengths")  # type: ignore[no-untyped-call]
