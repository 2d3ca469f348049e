"""The operands of an attention as values of a file."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Operands:
    """Queries, keys and values as [B, H, L, D], or with ``is_flat`` as [B, L, H * D], and the rest as 4-D or None."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    bias: ir.Value | None
    mask: ir.Value | None
    sinks: ir.Value | None
    is_flat: bool

    @property
    def axis(self) -> int:
        """Where the tokens are."""
        return 1 if self.is_flat else 2
