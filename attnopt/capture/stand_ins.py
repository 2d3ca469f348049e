"""Tracing of models with split weights, of which it needs the form alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attnopt.base.split_weight import SplitWeight
from attnopt.errors import CaptureError


class StandIns:
    """Tensors of the same form without memory, which take the places of split weights while a model is traced."""

    def __init__(self) -> None:
        self._of: dict[int, Tensor] = {}  # by the weight
        self._for: dict[int, Tensor] = {}  # by the stand-in

    def placed(self, model: nn.Module) -> nn.Module:
        """``model``, a copy of the user's, with stand-ins in it."""
        for table, name, x in _tensors(model):
            if isinstance(x, SplitWeight):
                table[name] = self._stand_in(x)
        return model

    def restore(self, model: nn.Module) -> None:
        """Put the weights back, in the graph that was traced.  Raises CaptureError."""
        for table, name, x in _tensors(model):
            if id(x) in self._for:
                table[name] = self._for[id(x)]
            elif self._for and x.numel() and not isinstance(x, SplitWeight) and not x.untyped_storage().size():
                raise CaptureError(
                    f"tracing copied {name}, which is split over several processes",
                    hint="optimize the model before it is split",
                )

    def _stand_in(self, x: SplitWeight) -> Tensor:
        if id(x) not in self._of:
            made: Tensor = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            made.untyped_storage().resize_(0)
            held = nn.Parameter(made, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else made
            self._of[id(x)], self._for[id(held)] = held, x
        return self._of[id(x)]


def _tensors(model: nn.Module) -> Iterator[tuple[dict[str, Tensor | None], str, Tensor]]:
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, x in list(table.items()):
                if x is not None:
                    yield table, name, x  # type: ignore[misc]
