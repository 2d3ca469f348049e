"""A mixer: what stands in the place of attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnopt import LinearMixer


@dataclass(frozen=True)
class Neighbours(LinearMixer):
    """The tokens ``step`` before and after, around the ends, each with a weight for each channel."""

    name: ClassVar[str] = "acme.neighbours"
    step: int = 1

    def terms(self, v: Tensor, seen: Tensor | None) -> Sequence[Tensor]:
        return [v.roll(self.step, 2), v.roll(-self.step, 2)]
