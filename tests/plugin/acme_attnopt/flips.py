"""An importance method of the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from attnopt import AblationImportance, HeadProbe


@dataclass(frozen=True)
class Flips(AblationImportance):
    """How many predictions change without the heads."""

    name: ClassVar[str] = "acme.flips"
    kind: str = "mean"

    def before(self, probe: HeadProbe) -> list[Any]:
        return [probe.output(batch).argmax(-1) for batch in probe.batches]

    def read(self, probe: HeadProbe, before: Any, batch: int, output: Any) -> int:
        return int((output.argmax(-1) != before[batch]).sum())

    def moved(self, before: Any, read: Sequence[int]) -> float:
        return float(sum(read))
