"""Running a model without side effects: it and its inputs stay unchanged."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import tensors
from attnopt.base.compile_lock import as_called
from attnopt.base.containers import copied
from attnopt.capture.flat_call import Form
from attnopt.graph.nodes import get_attr

_KEPT = (Tensor, int, float, str, type(None), list, dict)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def outputs_of(
    module: nn.Module,
    inputs: CallInputs,
    state: Sequence[str] = (),
    counted: list[str] | None = None,
    form: Form | None = None,
) -> list[Tensor]:
    """Every tensor of the output, then the buffers named ``state`` after the call.

    ``counted`` receives the names of number attributes that the call changes.  ``form``: of a model that is called
    with objects where a graph takes their tensors; then numbers are given as tensors."""
    args, kwargs = cloned(inputs)
    with torch.no_grad(), as_called(), kept(module):
        before = None if counted is None else _numbers(module)
        if form is None:
            made = tensors(module(*args, **kwargs))
        elif isinstance(module, fx.GraphModule):
            made = _with_numbers(pytree.tree_leaves(module(*args, **kwargs)))
        else:
            made = _with_numbers(form.run(module, args, kwargs))
        if counted is not None and before is not None:
            counted += [name for name, number in _numbers(module).items() if before.get(name, number) != number]
        return [t.clone() for t in (*made, *(get_attr(module, name) for name in state))]


def _with_numbers(leaves: Sequence[object]) -> list[Tensor]:
    return [
        torch.tensor(x) if isinstance(x, (int, float)) else x for x in leaves if isinstance(x, (int, float, Tensor))
    ]


def called(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Call ``module`` for its effects on these inputs."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), as_called(), kept(module):
        module(*args, **kwargs)


def _numbers(module: nn.Module) -> dict[str, int | float]:
    return {
        f"{path}.{name}".lstrip("."): x
        for path, m in module.named_modules()
        for name, x in vars(m).items()
        if isinstance(x, (int, float)) and not isinstance(x, bool) and not _is_lazy(m)
    }


def holds(module: nn.Module, name: str) -> bool:
    """``module`` has a tensor of this name."""
    try:
        return isinstance(operator.attrgetter(name)(module), Tensor)
    except AttributeError:
        return False


def cloned(inputs: CallInputs) -> CallInputs:
    """The inputs with copied tensors and objects, for a callee that may change or mark them."""
    made: CallInputs = copied(inputs)
    return made


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Buffers and attributes that a call of ``module`` changes (a cache, a counter, a list) are put back at the end."""
    found = [
        (table, name, held) for table in _tables(module) for name, held in table.items() if isinstance(held, _KEPT)
    ]
    tensors_before = [(x, x.clone()) for _, _, x in found if isinstance(x, Tensor) and _has_values(x)]
    lists_before = [(x, list(x)) for _, _, x in found if isinstance(x, list)]
    dicts_before = [(x, dict(x)) for _, name, x in found if isinstance(x, dict) and name not in _OF_EVERY_MODULE]
    try:
        yield
    finally:
        for table, name, held in found:
            table[name] = held
        for things, listed in lists_before:
            if not _same_objects(things, listed):
                things[:] = listed
        for named, copied in dicts_before:
            if not (_same_objects(named, copied) and _same_objects(named.values(), copied.values())):
                named.clear()
                named.update(copied)
        for tensor, values in tensors_before:
            if not torch.equal(tensor, values):
                with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(values)


def trains_otherwise(module: nn.Module) -> bool:
    """``module`` is in eval mode and computes something else in training."""
    if module.training:
        return False
    return any(_has_modes(m) for m in module.modules())


def _has_modes(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any("dropout" in name and isinstance(x, float) and x > 0 for name, x in vars(module).items())


def _same_objects(now: Collection[object], before: Collection[object]) -> bool:
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _tables(module: nn.Module) -> Iterator[dict[str, Any]]:
    for m in module.modules():
        if not _is_lazy(m):
            yield m._buffers
            yield vars(m)


def _is_lazy(module: nn.Module) -> bool:
    """The first call of ``module`` will change it."""
    return any(p is not None and nn.parameter.is_lazy(p) for p in module._parameters.values())


def _has_values(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_meta and not nn.parameter.is_lazy(x)
