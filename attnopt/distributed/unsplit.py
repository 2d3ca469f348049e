"""A copy of a split model that runs as before it was split: without the hooks and classes of torch.distributed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))
_OF_SPLITTING = "__composable_api_state_key"  # under which torch.distributed keeps its state in a module


def without_splitting(model: nn.Module, split: Callable[[Tensor, str], Tensor]) -> nn.Module:
    """The copy, with ``split(tensor, name)`` in the place of each parameter and buffer."""
    memo: dict[int, Any] = {id(x): split(x, name) for name, x in (*model.named_parameters(), *model.named_buffers())}
    split_ones = [m for m in model.modules() if isinstance(m, FSDPModule) or any(map(_splits, _hooks(m)))]
    memo |= {id(m): object.__new__(_own_class(m)) for m in split_ones}
    for module in split_ones:
        own = {name: x for name, x in vars(module).items() if not name.startswith(_OF_SPLITTING)}
        state = {name: _kept(x) if name in _HOOKS else x for name, x in own.items()}
        vars(memo[id(module)]).update(copy.deepcopy(state, memo))
    made: nn.Module = copy.deepcopy(model, memo)
    return made


def _own_class(module: nn.Module) -> type:
    """``fully_shard`` gives a module a class of its own, made of FSDPModule and the module's."""
    classes = type(module).__mro__
    return classes[classes.index(FSDPModule) + 1] if isinstance(module, FSDPModule) else type(module)


def _hooks(module: nn.Module) -> Iterator[object]:
    return (hook for name in _HOOKS for hook in vars(module).get(name, {}).values())


def _kept(hooks: Any) -> Any:
    made = type(hooks)()
    made.update((key, hook) for key, hook in hooks.items() if not _splits(hook))
    return made


def _splits(hook: object) -> bool:
    """The hook is of torch.distributed: it gathers weights, or turns activations into DTensors and back."""
    run = getattr(hook, "hook", hook)
    return str(getattr(run, "__module__", "")).startswith("torch.distributed.")
