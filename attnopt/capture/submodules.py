"""The attention modules of a model that cannot be captured as a whole, each with the inputs of its call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.run_unchanged import cloned, outputs_of


@dataclass
class Region:
    """A module by its name in the model, and its inputs in each of the model's calls: only the first in a call."""

    name: str
    inputs: list[CallInputs] = field(default_factory=list)


class InPlace(nn.Module):
    """A module on its own, under its name in the model, so that findings get the same names as there."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        *path, leaf = name.split(".")
        place: nn.Module = self
        for part in path:
            inner = nn.Module()
            place.add_module(part, inner)
            place = inner
        place.add_module(leaf, model.get_submodule(name))
        self.name = name
        self.training = model.training  # of the module inside, each part keeps its own mode

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.get_submodule(self.name)(*args, **kwargs)


def attention_regions(model: nn.Module, calls: Sequence[CallInputs]) -> list[Region]:
    """The modules whose own code contains a softmax, in execution order.

    The matcher decides whether it is an attention; an expert router is included, too.
    """
    regions = {name: Region(name) for name in _normalising(model, calls[0])}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_Recorder(region), with_kwargs=True)
        for name, region in regions.items()
    ]
    try:
        for number, call in enumerate(calls):
            _run(model, call)
            for region in regions.values():
                del region.inputs[number + 1 :]
    finally:
        for handle in handles:
            handle.remove()
    return list(regions.values())


class _Recorder:
    def __init__(self, region: Region) -> None:
        self.region = region

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        self.region.inputs.append(cloned(CallInputs.of(args, kwargs)))


def _run(model: nn.Module, call: CallInputs) -> None:
    with torch.random.fork_rng(devices=[]):
        outputs_of(model, call)


def _normalising(model: nn.Module, call: CallInputs) -> list[str]:
    """Names of the modules that are running when a softmax or a fused attention is called."""
    found: dict[str, None] = {}
    with _running(model) as stack, _Watch(stack, found):
        _run(model, call)
    return [name for name in found if name]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, stack: list[str], found: dict[str, None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack, self.found = stack, found

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        if self.stack and any(word in func.__name__ for word in ("softmax", "attention")):
            self.found[self.stack[-1]] = None
        return func(*args, **(kwargs or {}))


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, the innermost last."""
    stack: list[str] = []
    handles = []

    def left(*_: object) -> None:
        stack.pop()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(left, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()
