"""Which keys each query sees, as expressions that print themselves: ``Causal() & (Window(left=255, right=0) |
Sinks(4))``.
"""

from attnopt.patterns.algebra import And, Full, Not, Or, Pattern
from attnopt.patterns.block import BlockLayout, RandomBlocks
from attnopt.patterns.grid import Neighborhood, Prefix
from attnopt.patterns.halo import Blocks
from attnopt.patterns.part import Part
from attnopt.patterns.per_head import PerHead
from attnopt.patterns.registry import parse
from attnopt.patterns.segments import Segments
from attnopt.patterns.sequence import Causal, Dilated, Global, Keys, Periodic, Sinks, Strided, Window
from attnopt.patterns.span import Span

__all__ = [
    "And",
    "BlockLayout",
    "Blocks",
    "Causal",
    "Dilated",
    "Full",
    "Global",
    "Keys",
    "Neighborhood",
    "Not",
    "Or",
    "Part",
    "Pattern",
    "PerHead",
    "Periodic",
    "Prefix",
    "RandomBlocks",
    "Segments",
    "Sinks",
    "Span",
    "Strided",
    "Window",
    "parse",
]
