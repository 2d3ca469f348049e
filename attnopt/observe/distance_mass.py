"""How far heads look, batch by batch: their attention at each distance, in octaves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnopt.ir.curves import Curves
from attnopt.ir.site import Site
from attnopt.statistics.distance import Distance

AXIS = "distance in tokens, in octaves"


class DistanceMass:
    """The attention of the heads of one site at each distance, and the mean distance."""

    def __init__(self, how: Distance, site: Site) -> None:
        self.how, self.site = how, site
        self.total, self.moment = torch.zeros(()), torch.zeros(())
        self.at = torch.zeros(1, 1, dtype=torch.float64)

    def add(self, rows: Tensor, weights_BHRS: Tensor, real_BL: Tensor) -> None:
        """The weights of some queries."""
        L, S = real_BL.shape[1], weights_BHRS.shape[3]
        on_grid, apart = self.how.apart(self.site, rows.cpu(), L, S)
        counted = real_BL.index_select(1, rows)[:, None, :, None]
        p = weights_BHRS.masked_fill(~counted, 0.0).sum(0).double().cpu()  # distances are those of every sequence
        p = p[:, on_grid][..., self.how.prefix :]
        self.total = self.total + p.sum((1, 2))
        self.moment = self.moment + (p * apart).sum((1, 2))
        octave = (
            torch.frexp((apart + 0.5).floor()).exponent.long().flatten()
        )  # 0 of 0, 1 of 1, 2 of 2 to 3, 3 of 4 to 7
        width = max(self.at.shape[1], int(octave.max()) + 1 if len(octave) else 0)
        known = pad(self.at, (0, width - self.at.shape[1])).expand(len(p), -1)
        self.at = known.index_add(1, octave, p.flatten(1))

    @property
    def blind(self) -> list[int]:
        """The heads without any attention between the tokens."""
        return [i for i, mass in enumerate(self.total.tolist()) if not mass > 0]

    def curves(self) -> Curves:
        """The share of the attention in each octave, by the least distance in it."""
        shares = self.at / self.total.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(1)
        return Curves.of(AXIS, [0, *(2**k for k in range(self.at.shape[1] - 1))], shares)

    def mean(self) -> tuple[float, ...]:
        """The mean distance of each head; none may be blind."""
        return tuple((self.moment / self.total).tolist())
