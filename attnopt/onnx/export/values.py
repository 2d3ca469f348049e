"""The operands of an attention as values of a file."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from attnopt.ir.operands import Operands


@dataclass(frozen=True)
class Values(Operands[ir.Value]):
    """Queries, keys and values are [B, H, L, D], or with ``is_flat`` [B, L, H * D]."""

    is_flat: bool = False

    @property
    def axis(self) -> int:
        """Where the tokens are."""
        return 1 if self.is_flat else 2
