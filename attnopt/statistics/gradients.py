"""Head scores from the derivative of a loss, or of the output, with respect to factors on heads' outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import tensors
from attnopt.ir.head_probe import HeadProbe
from attnopt.ir.importance import ModelImportance

PROBES = 4  # random directions of the output, for each batch


@dataclass(frozen=True)
class Taylor(ModelImportance):
    """Mean over batches of |d loss / d gate| (arXiv:1905.10650).  Without a loss |d output / d gate|^2 relative to |output|^2
    (Gauss-Newton), estimated with random signs (Hutchinson)."""

    name: ClassVar[str] = "taylor"
    uses_loss: ClassVar[bool] = True

    def of_model(self, probe: HeadProbe) -> Mapping[str, Sequence[float]]:
        if probe.loss is not None:
            return {site: g.abs().mean(0).tolist() for site, g in probe.slopes(probe.loss).items()}
        generator = torch.Generator().manual_seed(probe.seed)

        def projected(output: Any, _: CallInputs) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for t in tensors(output):
                if t.is_floating_point():
                    signs = torch.randint(0, 2, t.shape, generator=generator).to(t.device) * 2 - 1
                    size = t.detach().double().square().sum().clamp(min=1e-300).sqrt()
                    total = total + (t.double() * signs).sum() / size
            return total

        return {site: g.square().mean(0).tolist() for site, g in probe.slopes(projected, PROBES).items()}


@dataclass(frozen=True)
class Fisher(ModelImportance):
    """Mean over batches of (d loss / d gate)^2 (arXiv:2204.09656)."""

    name: ClassVar[str] = "fisher"
    uses_loss: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = True

    def of_model(self, probe: HeadProbe) -> Mapping[str, Sequence[float]]:
        assert probe.loss is not None
        return {site: g.square().mean(0).tolist() for site, g in probe.slopes(probe.loss).items()}
