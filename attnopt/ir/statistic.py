"""What is measured on the calibration data of one attention: once, however many read it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from attnopt.errors import CalibrationError
from attnopt.ir.blame import blamed
from attnopt.ir.site import Site

T = TypeVar("T")


class Statistic(ABC, Generic[T]):
    """A measurement of one site.  Subclasses are frozen dataclasses: equal ones are measured once and shared."""

    @abstractmethod
    def measure(self, site: Site) -> T:
        """From ``site.activations``, which is not None, the spec and the weights of the site."""

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
                now.memo[key] = self.measure(site)
        found: T = now.memo[key]
        return found
