"""A case as a module with its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import decoys
import torch
from any_linear import AnyLinear
from caches import Lists
from models import OTHER, Attention
from torch import Tensor, nn

from fuzzing.grammar import Block, Case


class Adapted(nn.Module):
    """A block between the width of the model and its own: [B, L, E] -> [B, L, E], or (that, inner values)."""

    def __init__(self, inner: nn.Module, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = before, inner, after

    def forward(self, x: Tensor, *others: Any) -> Any:
        found = self.inner(self.before(x), *others)
        return (self.after(found[0]), *found[1:]) if isinstance(found, tuple) else self.after(found)


class Wrapped(nn.Module):
    """One more level in the names of modules."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"self": nn.ModuleList([inner])})

    def forward(self, x: Tensor, *others: Any) -> Any:
        return self.block["self"][0](x, *others)


class Model(nn.Module):
    """The blocks of a case one after the other; returns y, or (y, inner values)."""

    def __init__(self, case: Case, built: list[nn.Module]) -> None:
        super().__init__()
        self.case = case
        names = [f"b{i}" for i in range(len(built))]
        if case.container == "dict":
            self.blocks: Any = nn.ModuleDict(dict(zip(names, built, strict=True)))
        elif case.container == "attributes":
            for name, module in zip(names, built, strict=True):
                self.add_module(name, module)
        else:
            self.blocks = nn.ModuleList(Wrapped(m) if case.container == "wrapped" else m for m in built)

    def _modules_in_order(self) -> list[nn.Module]:
        c = self.case
        if c.container == "dict":
            found = list(self.blocks.values())
        elif c.container == "attributes":
            found = [getattr(self, f"b{i}") for i in range(len(c.blocks))]
        else:
            found = list(self.blocks)
        return [*found, found[0]] if c.reuse == "twice" else found

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        padding: Tensor | None = None,
        memory_padding: Tensor | None = None,
        given: Tensor | None = None,
        cache: Lists | None = None,
    ) -> Any:
        c = self.case
        past = 0 if cache is None else cache.seen()
        if c.branch == "data" and x.sum() > 0:
            x = -x
        if (c.branch == "shape" and x.shape[-2] > 4) or (c.branch == "training" and not self.training):
            x = x * 2
        leading = x.shape[:-2]
        y = x if c.axes == "batched" else x.reshape(-1, *x.shape[-2:])
        kept: list[Tensor] = []
        blocks = (*c.blocks, c.blocks[0]) if c.reuse == "twice" else c.blocks
        for layer, (block, module) in enumerate(zip(blocks, self._modules_in_order(), strict=True)):
            others = () if block.decoy else _others(block, memory, padding, memory_padding, given)
            found = module(y, *others) if cache is None else module(y, *others, cache, layer, past)
            made, *inner = found if isinstance(found, tuple) else (found,)
            if c.extras == "used":
                for t in inner:
                    made = made * (1 + t.amax() / 8)
            else:
                kept += inner
            y = y + (made if made.shape == y.shape else made.mean(-2, keepdim=True))
        if c.axes != "batched":
            y = y.reshape(*leading, *y.shape[-2:])
        return (y, *kept) if kept else y


def _others(
    block: Block, memory: Tensor | None, padding: Tensor | None, memory_padding: Tensor | None, given: Tensor | None
) -> tuple[Tensor | None, ...]:
    s = block.spelling
    seen = memory_padding if s.cross else padding
    if seen is not None and "float-padding" in s.mask:
        seen = seen.to(given.dtype if given is not None else torch.float32)
    padded = {"padding", "float-padding"} & set(s.mask)
    return memory if s.cross else None, seen if padded else None, given if "given" in s.mask else None


def groups(block: Block) -> dict[int, int]:
    """For each K/V head the head whose weights it gets too, where ``equal`` asks for that."""
    target = group_target(block)
    size = block.spelling.kv_heads // target
    return {g: g // size * size for g in range(block.spelling.kv_heads)} if block.equal else {}


def group_target(block: Block) -> int:
    """How many K/V heads the group rewrite leaves."""
    n = block.spelling.kv_heads
    return max((t for t in range(1, n) if n % t == 0), default=1)


def build(case: Case) -> nn.Module:
    """The model of ``case`` in eval mode."""
    torch.manual_seed(case.seed)
    width, built = case.blocks[0].spelling.width, list[nn.Module]()
    for i, block in enumerate(case.blocks):
        s = block.spelling
        if block.decoy:
            drawn = block.decoy == "AnyLinear"
            inner: nn.Module = AnyLinear(block.number) if drawn else getattr(decoys, block.decoy)()
            built.append(Adapted(inner, nn.Linear(width, decoys.E), nn.Linear(decoys.E, width)))
            continue
        inner = Attention(s, seed=case.seed + i, equal=groups(block))
        if case.reuse == "tied" and i == 1:
            inner.load_state_dict(_attention_in(built[0]).state_dict())
            _tie(inner, _attention_in(built[0]))
        ends = nn.Identity() if s.out else nn.Linear(s.heads * s.value_dim, width)
        built.append(inner if s.out else Adapted(inner, nn.Identity(), ends))
    model = nn.Sequential(*built) if case.container == "sequential" else Model(case, built)
    return model.to(getattr(torch, case.dtype)).eval()


def _attention_in(module: nn.Module) -> Attention:
    return next(m for m in module.modules() if isinstance(m, Attention))


def _tie(module: nn.Module, source: nn.Module) -> None:
    for name, parameter in source.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, parameter)


def inputs(case: Case, length: int | None = None, batch: int | None = None) -> dict[str, Tensor]:
    """Inputs of the model, as keywords."""
    length, batch = length or case.length, batch or case.batch
    r = torch.Generator().manual_seed(case.seed + length)
    kind, width = getattr(torch, case.dtype), case.blocks[0].spelling.width
    leading = {"batched": (batch,), "unbatched": (), "folded": (batch, 2)}[case.axes]

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=r).to(kind)

    if case.container == "sequential":
        return (
            {"input": noise(*leading, length, width)} if case.axes == "batched" else {"input": noise(2, length, width)}
        )
    found: dict[str, Tensor] = {"x": noise(*leading, length, width)}
    masks = {(b.spelling.cross, m) for b in case.attentions for m in b.spelling.mask}
    if any(b.spelling.cross for b in case.attentions):
        found["memory"] = noise(batch, OTHER, width)
    for name, cross, size in (("padding", False, length), ("memory_padding", True, OTHER)):
        if {(cross, "padding"), (cross, "float-padding")} & masks:
            found[name] = _seen(batch, size)
    if "given" in {m for _, m in masks}:
        found["given"] = noise(batch, 1, length, length)
    return found


def _seen(batch: int, size: int) -> Tensor:
    seen = torch.ones(batch, size, dtype=torch.bool)
    if size > 1:
        seen[-1, -1] = False  # the first key is always seen: no query sees nothing
    return seen


def padding_of(block: Block, given: Mapping[str, Tensor]) -> Tensor | None:
    """What the block's padding mask is made from."""
    return given.get("memory_padding" if block.spelling.cross else "padding")
