"""Induction heads: attention to the successor of an earlier occurrence of the query token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.base.call_inputs import CallInputs
from attnopt.errors import CalibrationError
from attnopt.ir.head_probe import HeadProbe
from attnopt.ir.importance import ModelImportance
from attnopt.ir.site import Site
from attnopt.statistics.calibrated import calibrated, rows_of
from attnopt.statistics.token_ids import token_ids


@dataclass(frozen=True)
class Induction(ModelImportance):
    """Mean attention from each token to those that followed its earlier occurrences, over the tokens that have any (induction
    heads, arXiv:2209.11895), for models that take token ids.  Raises CalibrationError."""

    name: ClassVar[str] = "induction"

    def of_model(self, probe: HeadProbe) -> Mapping[str, Sequence[float]]:
        return {site.name: _of_site(site, probe.batches) for site in probe.sites()}


def _of_site(site: Site, batches: Sequence[CallInputs]) -> tuple[float, ...]:
    total, rows, of_batch = torch.zeros(site.num_heads, dtype=torch.float64), 0, dict[int, Tensor]()
    for block in rows_of(site):
        if block.queries != len(block.keys):
            raise CalibrationError(
                f"its {block.queries} queries and {len(block.keys)} keys are not the same tokens",
                site=site.name,
                hint="choose another method, or leave the site out with sites=",
            )
        ids = of_batch.get(block.batch)
        if ids is None:
            shape = len(calibrated(site).batches[block.batch].q), block.queries
            ids = of_batch[block.batch] = token_ids(batches[block.batch], shape, site.name).cpu()
        own, places = ids[block.sequence], block.rows.cpu()
        follows = torch.zeros(len(places), len(own), dtype=torch.bool)
        follows[:, 1:] = own[places, None] == own[None, :-1]
        follows &= torch.arange(len(own)) <= places[:, None]
        counted = follows.any(1)
        total += (block.weights.cpu()[:, counted] * follows[counted]).sum((1, 2))
        rows += int(counted.sum())
    if not rows:
        raise CalibrationError("no token occurs twice in the calibration data", site=site.name, hint="use longer texts")
    return tuple((total / rows).tolist())
