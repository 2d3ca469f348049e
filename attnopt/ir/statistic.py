"""What is measured on the calibration data of one attention: once, however many read it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Generic, TypeVar

from attnopt.errors import CalibrationError
from attnopt.ir.activations import Activations
from attnopt.ir.blame import blamed
from attnopt.ir.site import Site

T = TypeVar("T")


class Statistic(ABC, Generic[T]):
    """A measurement of one site.  Subclasses are frozen dataclasses: equal ones are measured once and shared.

    ``merges``: ``merged`` makes of measurements on parts of the data that on all of it, for data that several processes share.
    """

    merges: ClassVar[bool] = False

    @abstractmethod
    def measure(self, site: Site) -> T:
        """From ``site.activations``, which is not None, the spec and the weights of the site."""

    def merged(self, parts: Sequence[T]) -> T:
        """The measurement on all data, from those on its parts, in their order."""
        raise NotImplementedError

    def of(self, site: Site) -> T:
        """The measurement at this site, cached.  Raises CalibrationError without calibration data, PluginError."""
        now = site.activations
        if now is None:
            raise CalibrationError(
                "there is no calibration data for it", site=site.name, hint="pass calibration batches"
            )
        with blamed(self, "statistic", "measure", site.name):
            key = self, site.spec
            if key not in now.memo:
                now.memo[key] = self._measured(site, now)
        found: T = now.memo[key]
        return found

    def _measured(self, site: Site, now: Activations) -> T:
        if now.own is None or now.peers is None or not self.merges:
            return self.measure(site)  # which cannot read data that are withheld
        return self.merged(now.peers.everyone(self.measure(replace(site, activations=now.own))))
