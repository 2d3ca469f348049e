"""What matching found: sites, near misses, and the inspection that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from attnopt.refusal import Refusal
from attnopt.spec import AttentionSpec

if TYPE_CHECKING:
    from attnopt.activations import Activations

Alignment = Literal["first", "last", "none"]


@dataclass(frozen=True)
class Projection:
    """Where a site's queries, keys, values or outputs are projected.

    ``rows[h]`` are the indices of head h's output features ("out": input features) in the weight, in the order in which
    they stand in the head; None where they cannot be told, and then ``why`` says so.  ``transposed``: the weight is stored
    as (in, out).  ``direct``: of "out", that what the heads give reaches it as it is, only laid out anew.
    """

    weight: str | None = None
    bias: str | None = None
    transposed: bool = False
    rows: tuple[tuple[int, ...], ...] | None = None
    why: str | None = None
    direct: bool = True
    keeps_size: bool = False  # no weight becomes smaller where heads are removed

    def __repr__(self) -> str:
        rows = "unknown" if self.rows is None else f"{len(self.rows)} heads of {len(self.rows[0])}"
        told = {"bias": self.bias, "rows": rows, "why": self.why, "transposed": self.transposed}
        return f"Projection({self.weight!r}, {', '.join(f'{k}={v!r}' for k, v in told.items() if v)})"


@dataclass(frozen=True)
class Site:
    """One attention of the model, as it stands after the passes that were already applied to it."""

    name: str
    spec: AttentionSpec
    projections: Mapping[str, Projection]
    where: str = ""  # source line of the user's model
    notes: tuple[str, ...] = ()  # what a reader should know: weights returned to the user, shared weights, ...
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    parameters: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    batch: int = 1  # B, L and S at the sizes of the example inputs
    q_len: int = 0
    kv_len: int = 0
    activations: Activations | None = field(default=None, repr=False, compare=False)  # where there is calibration data
    is_dynamic: bool = False  # L or S may vary with the inputs
    device: str = "cpu"  # the kind of device that the attention runs on
    # "first": query i stands at key i.  "last": keys of a past come first, the last query stands at the last key.  "none":
    # the lengths are equal in the examples at most, and vary apart.
    alignment: Alignment = "first"

    @property
    def num_heads(self) -> int:
        return self.spec.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.spec.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.spec.head_dim

    @property
    def value_dim(self) -> int:
        return self.spec.value_dim

    @property
    def scale(self) -> float:
        return self.spec.scale

    @property
    def is_cross(self) -> bool:
        return self.spec.is_cross

    def refuse(self, code: str, *, expected: str = "", found: object = "", hint: str = "") -> Refusal:
        """A refusal that points at this site."""
        return Refusal(code, expected, str(found), self.where, hint)

    def head_weight(self, role: str, head: int) -> Tensor | None:
        """Rows of one head in the projection ``role`` ("q", "k", "v"): [D, in], or its columns for "out": [Dv, out].

        ``head`` is an original number (of a K/V head for "k" and "v").  None where the projection is not known.
        """
        p = self.projections.get(role)
        if p is None or p.rows is None or p.weight is None:
            return None
        stored_by_input = p.transposed != (role == "out")
        weight = self.parameters[p.weight].detach()
        rows = torch.as_tensor(p.rows[head], device=weight.device)
        return weight[:, rows].transpose(0, 1).flatten(1) if stored_by_input else weight[rows].flatten(1)

    def head_bias(self, role: str, head: int) -> Tensor | None:
        """Bias of one head in the projection ``role``: [D]; None where there is none."""
        p = self.projections.get(role)
        if p is None or p.rows is None or p.bias is None or role == "out":
            return None
        bias = self.parameters[p.bias].detach()
        return bias[torch.as_tensor(p.rows[head], device=bias.device)]

    def without_activations(self) -> Site:
        return replace(self, activations=None)

    def out_bias(self) -> Tensor | None:
        """Bias of the output projection [out]; None where there is none."""
        p = self.projections.get("out")
        return None if p is None or p.bias is None else self.parameters[p.bias].detach()


@dataclass(frozen=True)
class NearMiss:
    """Something that begins like an attention and is none, or is one that attnopt cannot yet express."""

    name: str
    refusal: Refusal
    where: str = ""
