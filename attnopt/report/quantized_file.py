"""What quantization made of an exported file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from attnopt.report.counted import counted


@dataclass(frozen=True)
class QuantizedFile:
    """``how``: "int8" or "int4".  ``products`` have quantized weights, ``floating`` stay in float: those of attentions, and
    those without constant float32 weights.  ``tables``: of embeddings, with int8 rows.

    ``bytes_before``, ``bytes_after``: of the file and its external weights.  ``cosine``, ``relative_error``: the worst of any
    output at any of ``sizes`` tried sizes, against the unquantized model; None where nothing was checked.
    """

    how: str
    products: int
    floating: int
    tables: int
    bytes_before: int
    bytes_after: int
    cosine: float | None = None
    relative_error: float | None = None
    sizes: int = 0

    def __str__(self) -> str:
        made = (
            f"{self.how}: {counted(self.products, 'product')} and {counted(self.tables, 'table')} quantized, "
            f"{counted(self.floating, 'product')} in float, "
            f"{self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB"
        )
        if self.cosine is None or self.relative_error is None:
            return f"{made}, not checked"
        return f"{made}, cosine {self.cosine:.4f}, relative error {self.relative_error:.2g}"

    def to_json(self) -> dict[str, Any]:
        """Plain strings and numbers."""
        return asdict(self)
