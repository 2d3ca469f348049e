"""Where queries, keys, values and outputs are projected, and the weights of each head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.ir.spec import AttentionSpec


@dataclass(frozen=True)
class Projection:
    """Where the queries, keys, values or outputs of a site are projected.

    ``rows[h]``: the indices of the output features of head h ("out": input features) in the weight, in head order; None
    if unknown, with the reason in ``why``.
    ``transposed``: the weight is stored as (in, out).
    ``direct``: for "out", the head outputs reach it unchanged apart from their layout.
    """

    weight: str | None = None
    bias: str | None = None
    transposed: bool = False
    rows: tuple[tuple[int, ...], ...] | None = None
    why: str | None = None
    direct: bool = True
    keeps_size: bool = False  # removing heads reduces no weight

    def __repr__(self) -> str:
        rows = "unknown" if self.rows is None else f"{len(self.rows)} heads of {len(self.rows[0])}"
        told = {"bias": self.bias, "rows": rows, "why": self.why, "transposed": self.transposed}
        return f"Projection({self.weight!r}, {', '.join(f'{k}={v!r}' for k, v in told.items() if v)})"


@dataclass(frozen=True)
class Projected:
    """An attention with its projections and their parameters."""

    name: str
    spec: AttentionSpec
    projections: Mapping[str, Projection]
    parameters: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    @property
    def num_heads(self) -> int:
        return self.spec.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.spec.num_kv_heads

    @property
    def trained_heads(self) -> int:
        """The number of query heads in the trained model, according to the projections or the remaining heads."""
        known = [len(p.rows) for role in ("q", "out") if (p := self.projections.get(role)) and p.rows is not None]
        return max([*known, *(h + 1 for h in self.spec.heads)])

    @property
    def head_dim(self) -> int:
        return self.spec.head_dim

    @property
    def value_dim(self) -> int:
        return self.spec.value_dim

    def knows(self, *roles: str) -> bool:
        """Whether the rows of these projections are known, and the output projection, if asked, reads head outputs alone."""
        found = [self.projections.get(role) for role in roles]
        return all(p is not None and p.rows is not None and p.direct for p in found)

    def head_weight(self, role: str, head: int) -> Tensor | None:
        """Rows of one head in the projection ``role`` ("q", "k", "v"): [D, in], or its columns for "out": [Dv, out].

        ``head`` is an original number (of a K/V head for "k" and "v").  None if the projection is unknown.
        """
        p = self.projections.get(role)
        if p is None or p.rows is None or p.weight is None:
            return None
        stored_by_input = p.transposed != (role == "out")
        weight = self.parameters[p.weight].detach()
        rows = torch.as_tensor(p.rows[head], device=weight.device)
        return weight[:, rows].transpose(0, 1).flatten(1) if stored_by_input else weight[rows].flatten(1)

    def head_bias(self, role: str, head: int) -> Tensor | None:
        """Bias of one head in the projection ``role``: [D]; None if there is none."""
        p = self.projections.get(role)
        if p is None or p.rows is None or p.bias is None or role == "out":
            return None
        bias = self.parameters[p.bias].detach()
        return bias[torch.as_tensor(p.rows[head], device=bias.device)]

    def out_bias(self) -> Tensor | None:
        """Bias of the output projection [out]; None if there is none."""
        p = self.projections.get("out")
        return None if p is None or p.bias is None else self.parameters[p.bias].detach()
