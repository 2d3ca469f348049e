"""Large tensors of differences as few numbers, of which lengths and angles are nearly those of the tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Direction = NDArray[np.float16]  # of unit length, or zeros
SIZE = 512  # numbers of a sketch; what is no larger is kept as it is


@dataclass(frozen=True)
class Sketch:
    """Each entry of a matrix is added to one of ``SIZE`` numbers with a random sign, each of both by its row and its column
    (TensorSketch; Pham and Pagh, KDD 2013).

    ``places`` and ``signs``: of all rows, then of all columns."""

    rows: int
    places: Tensor
    signs: Tensor

    @classmethod
    def of(cls, rows: int, columns: int, seed: int, device: torch.device) -> Sketch:
        count = rows + columns
        if rows * columns <= SIZE:
            places = torch.cat([columns * torch.arange(rows), torch.arange(columns)])
            return cls(rows, places.to(device), torch.ones(count, dtype=torch.float64, device=device))
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(SIZE, (count,), generator=generator)
        signs = 2.0 * torch.randint(2, (count,), generator=generator, dtype=torch.float64) - 1.0
        return cls(rows, places.to(device), signs.to(device))

    def start(self) -> Tensor:
        """Nothing yet."""
        return self.signs.new_zeros(SIZE)

    def add(self, to: Tensor, x: Tensor, first: int) -> None:
        """Rows ``x`` [rows, columns], of which ``first`` is the number of the first one."""
        rows, columns = slice(first, first + len(x)), slice(self.rows, None)
        places = (self.places[rows, None] + self.places[None, columns]) % SIZE
        signed = x * self.signs[rows, None] * self.signs[None, columns]
        to.index_add_(0, places.flatten(), signed.flatten())


def direction(sketch: Tensor) -> Direction:
    made: Direction = torch.nn.functional.normalize(sketch, dim=0).cpu().numpy().astype(np.float16)
    return made
