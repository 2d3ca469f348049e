"""The patterns that texts may name, and the parser of pattern texts."""

from __future__ import annotations

from collections.abc import Callable

from attnopt.base.input import Input
from attnopt.base.notation import evaluate
from attnopt.base.registry import Registry
from attnopt.errors import PolicyError
from attnopt.patterns.algebra import Full, Pattern
from attnopt.patterns.block import BlockLayout, RandomBlocks
from attnopt.patterns.grid import Neighborhood, Prefix
from attnopt.patterns.halo import Blocks
from attnopt.patterns.part import Part
from attnopt.patterns.per_head import PerHead
from attnopt.patterns.segments import Segments
from attnopt.patterns.sequence import Causal, Dilated, Global, Keys, Periodic, Sinks, Strided, Window
from attnopt.patterns.span import Span

PATTERNS = Registry(
    "attnopt.patterns",
    "pattern",
    Pattern,  # type: ignore[type-abstract]
    {
        kind.__name__: kind
        for kind in (
            Full,
            Causal,
            Window,
            Span,
            Dilated,
            Keys,
            Sinks,
            Global,
            Strided,
            Periodic,
            Blocks,
            Neighborhood,
            Prefix,
            Segments,
            RandomBlocks,
            BlockLayout,
            PerHead,
            Part,
        )
    },
)


def constructor(name: str) -> Callable[..., object]:
    """The pattern class of this name, or ``Input``; an unknown name raises a PolicyError that lists the known ones."""
    return Input if name == "Input" else PATTERNS.load(name)


def is_readable(pattern: Pattern) -> bool:
    """``parse`` reproduces the pattern from its text.  False for unregistered classes, and for classes whose name
    belongs to another.
    """
    try:
        return parse(pattern.to_json()) == pattern
    except Exception:  # any error of a third-party constructor on its own repr
        return False


def parse(text: str) -> Pattern:
    """Read the notation that patterns print, e.g. ``"Causal() & (Window(3, 0) | Sinks(4))"``; raises PolicyError."""
    value = evaluate(text, constructor)
    if isinstance(value, Pattern):
        return value
    raise PolicyError(f"{text!r} is not a pattern", hint='write it as in "Causal() & Window(left=3, right=0)"')
