"""Every run of an attention, as the user's own model makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import oracle
from models import Attention
from torch import Tensor, nn

from fuzzing.grammar import Block, Case


@dataclass(frozen=True)
class Call:
    """One run of an attention: its module, which of that module's runs it is, and the number of its normaliser."""

    path: str
    block: Block
    time: int
    normaliser: int
    kv_len: int
    q_len: int
    batch: int

    @property
    def site(self) -> str:
        return self.path if self.time == 1 else f"{self.path}#{self.time}"


def calls(case: Case, model: nn.Module, given: Mapping[str, Tensor]) -> list[Call]:
    """Every run of an attention, in order, as the user's model makes them."""
    blocks = {id(m): b for m, b in zip(attentions(model), case.attentions, strict=True)}
    paths = {id(m): name for name, m in model.named_modules() if isinstance(m, Attention)}
    found: list[Call] = []
    with oracle.edited({}, exponentials=True) as counter:

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            path = paths[id(module)]
            memory = args[1] if len(args) > 1 and args[1] is not None else args[0]
            time = 1 + sum(c.path == path for c in found)
            found.append(
                Call(path, blocks[id(module)], time, counter.seen, memory.shape[1], args[0].shape[1], len(args[0]))
            )

        hooks = [m.register_forward_pre_hook(note) for m in attentions(model)]
        try:
            oracle.run(model, (), given)
        finally:
            for hook in hooks:
                hook.remove()
    return found


def attentions(model: nn.Module) -> list[Attention]:
    return [m for m in model.modules() if isinstance(m, Attention)]
