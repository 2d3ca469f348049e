"""An importance method of the whole model."""

from collections.abc import Mapping, Sequence
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

    def moved(self, probe: HeadProbe, before: Any, off: Mapping[str, Sequence[int]]) -> float:
        after = [probe.output(batch, off, self.kind).argmax(-1) for batch in probe.batches]
        return float(sum((x != y).sum() for x, y in zip(before, after, strict=True)))
