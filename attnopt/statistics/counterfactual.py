"""Counterfactual divergence: how much the output of a head depends on a segment of the input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attnopt.base.options import choice
from attnopt.errors import CalibrationError
from attnopt.ir.head_probe import HeadProbe
from attnopt.ir.importance import ModelImportance
from attnopt.ir.site import Site
from attnopt.statistics.calibrated import calibrated, last_outputs


@dataclass(frozen=True, eq=False)
class Counterfactual(ModelImportance):
    """The distance of a head's outputs with and without a segment of the input (vision-aware head divergence,
    arXiv:2412.13949, where the segment is the image)::

        mean over sequences of |z_h(x) - z_h(x')|_2     # before the output projection

    ``others``: for each calibration batch its counterpart x', in the same form: without the segment, or with another one in
    its place.  ``at="last"``: at the last token that is no padding, where the first token is generated; ``"all"``: the mean
    over the tokens that are padding in neither, for counterparts of the same length.  Raises PolicyError, CalibrationError.
    """

    name: ClassVar[str] = "counterfactual"
    others: Iterable[Any]
    at: str = "last"

    def __post_init__(self) -> None:
        object.__setattr__(self, "others", tuple(self.others))
        choice(self.name, "at", self.at, ("last", "all"))

    @property
    def more(self) -> Sequence[Any]:
        return tuple(self.others)

    def to_json(self) -> str:
        return self.name

    def of_model(self, probe: HeadProbe) -> Mapping[str, Sequence[float]]:
        if len(probe.more) != len(probe.batches):
            raise CalibrationError(
                f"{len(probe.more)} counterfactual batches for {len(probe.batches)} calibration batches",
                hint="give one counterpart for each calibration batch, in the same order",
            )
        pairs = zip(probe.sites(), probe.sites(probe.more), strict=True)
        return {site.name: self._apart(site, other) for site, other in pairs}

    def _apart(self, site: Site, other: Site) -> Sequence[float]:
        total, count = torch.zeros(site.num_heads, dtype=torch.float64), 0
        if self.at == "last":
            for z, without in zip(last_outputs(site), last_outputs(other), strict=True):
                _require(z.shape == without.shape, site, f"{len(z)} sequences and {len(without)} counterparts")
                total += (z - without).norm(dim=-1).sum(0).cpu()
                count += len(z)
            return (total / count).tolist()
        now, then = calibrated(site), calibrated(other)
        outputs = zip(now.outputs(site.spec), then.outputs(site.spec), now.batches, then.batches, strict=True)
        for z, without, t, u in outputs:
            lengths = f"sequences of {z.shape[2]} tokens and counterparts of {without.shape[2]}"
            _require(z.shape == without.shape, site, lengths)
            real = t.real & u.real
            total += (z - without).double().norm(dim=-1).transpose(1, 2)[real].sum(0).cpu()
            count += int(real.sum())
        return (total / count).tolist()


def _require(fits: bool, site: Site, found: str) -> None:
    if not fits:
        hint = 'give counterparts of the same shape, or use at="last", which compares the last tokens'
        raise CalibrationError(f"{found} cannot be compared", site=site.name, hint=hint)
