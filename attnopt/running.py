"""Running a model only to see what it gives: it and its inputs stay as they are."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.calibration import Inputs
from attnopt.compare import tensors
from attnopt.compiling import as_called

_KEPT = (Tensor, int, float, str, type(None))


def outputs_of(module: nn.Module, inputs: Inputs, state: Sequence[str] = ()) -> list[Tensor]:
    """Every tensor of the output, then what the call leaves in the buffers named ``state``."""
    args, kwargs = cloned(inputs)
    with as_called(), kept(module):
        made = tensors(module(*args, **kwargs))
        return [t.clone() for t in (*made, *(operator.attrgetter(name)(module) for name in state))]


def cloned(inputs: Inputs) -> Inputs:
    """The inputs with tensors of their own, for a callee that may change or mark them."""
    copied: Inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    return copied


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Buffers, tensors and numbers that a call of ``module`` changes (a cache, a counter) are put back at the end."""
    found = [
        (table, name, held) for table in _tables(module) for name, held in table.items() if isinstance(held, _KEPT)
    ]
    before = [(held, held.clone()) for _, _, held in found if isinstance(held, Tensor) and _has_values(held)]
    try:
        yield
    finally:
        for table, name, held in found:
            table[name] = held
        for tensor, copied in before:
            if not torch.equal(tensor, copied):
                with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(copied)


def _tables(module: nn.Module) -> Iterator[dict[str, Any]]:
    for m in module.modules():
        if not any(
            nn.parameter.is_lazy(p) for p in m._parameters.values() if p is not None
        ):  # their first call is to change them
            yield m._buffers
            yield vars(m)


def _has_values(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_meta and not nn.parameter.is_lazy(x)
