"""A statistic of calibration data, and an importance method that reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt import Importance, Site, Statistic


@dataclass(frozen=True)
class Peaks(Statistic[Tensor]):
    """The largest output of each head [H], measured once for all that ask ``Peaks().of(site)``."""

    def measure(self, site: Site) -> Tensor:
        assert site.activations is not None
        return torch.stack([o.abs().amax((0, 2, 3)) for o in site.activations.outputs(site.spec)]).amax(0)


class Peak(Importance):
    """The largest output of the head on calibration data."""

    name: ClassVar[str] = "acme.peak"
    needs_calibration: ClassVar[bool] = True

    def scores(self, site: Site) -> Sequence[float]:
        return Peaks().of(site).tolist()
