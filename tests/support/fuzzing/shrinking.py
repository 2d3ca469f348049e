"""The smallest case that fails in the same way: one field after the other goes back to its default while it still fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace

from models import Spelling

from fuzzing.grammar import Block, Case


def shrunk(case: Case, fails: Callable[[Case], bool], tries: int = 120) -> Case:
    """A smaller case for which ``fails`` holds too, after at most ``tries`` calls of it."""
    progress = True
    while progress and tries > 0:
        progress = False
        for candidate in _smaller(case):
            if candidate == case:
                continue
            tries -= 1
            if fails(candidate):
                case, progress = candidate, True
                break
            if tries <= 0:
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Cases that are one step simpler, the largest steps first."""
    for i in range(len(case.blocks)):
        if len(case.blocks) > 1:
            yield replace(case, blocks=case.blocks[:i] + case.blocks[i + 1 :]).repaired()
    for f in dataclasses.fields(Case):
        if f.name not in ("blocks", "seed") and getattr(case, f.name) != f.default:
            yield replace(case, **{f.name: f.default}).repaired()
    for i, block in enumerate(case.blocks):
        for simpler in _simpler(block):
            yield replace(case, blocks=(*case.blocks[:i], simpler, *case.blocks[i + 1 :])).repaired()


def _simpler(block: Block) -> Iterator[Block]:
    for f in dataclasses.fields(Block):
        if f.name not in ("spelling", "decoy") and getattr(block, f.name) != f.default:
            yield replace(block, **{f.name: f.default})
    if "+" in block.rewrite:
        for part in block.rewrite.split("+"):
            yield replace(block, rewrite=part)
    for f in dataclasses.fields(Spelling):
        if getattr(block.spelling, f.name) != f.default:
            yield replace(block, spelling=replace(block.spelling, **{f.name: f.default}).repaired())
