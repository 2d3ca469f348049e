"""A refusal: why an attention was left unchanged.  Data first, text only when printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """``code``: a stable kebab-case word; ``expected`` and ``found``: what differed; ``where``: the operation or source
    line in the model; ``hint``: what the user can do.
    """

    code: str
    expected: str = ""
    found: str = ""
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        parts = [f"[{self.code}]"]
        if self.expected:
            parts.append(f"expected {self.expected},")
        if self.found:
            parts.append(f"found {self.found}")
        text = " ".join(parts).rstrip(",")
        if self.where:
            text += f" (at {self.where})"
        if self.hint:
            text += f"\n  hint: {self.hint}"
        return text

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
