"""New weights of heads, written into the parameters that hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.ir.head_weights import HeadWeights
from attnopt.ir.projection import Projected


def edited_parameters(
    site: Projected, edits: Sequence[HeadWeights], out_bias: Tensor | None = None
) -> dict[str, Tensor]:
    """Whole parameters with the edited heads in place, by name."""
    made: dict[str, Tensor] = {}
    if out_bias is not None:
        name = site.projections["out"].bias
        assert name is not None
        made[name] = out_bias.to(site.parameters[name].dtype)
    for edit in edits:
        p = site.projections[edit.role]
        assert p.rows is not None
        assert p.weight is not None
        rows = list(p.rows[edit.head])
        _write(made, site, p.weight, rows, edit.weight, by_column=p.transposed != (edit.role == "out"))
        if edit.bias is not None and p.bias is not None and edit.role != "out":
            _write(made, site, p.bias, rows, edit.bias, by_column=False)
    return made


def _write(made: dict[str, Tensor], site: Projected, name: str, rows: list[int], new: Tensor, by_column: bool) -> None:
    if name not in made:
        made[name] = site.parameters[name].detach().clone()
    target = made[name]
    index = torch.as_tensor(rows, device=target.device)
    if by_column:
        target[:, index] = new.to(target.dtype).mT.reshape(target[:, index].shape)
    else:
        target[index] = new.to(target.dtype).reshape(target[index].shape)
