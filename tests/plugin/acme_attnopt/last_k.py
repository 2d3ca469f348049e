"""A pass: from a spec to a spec."""

from dataclasses import dataclass
from typing import ClassVar

from attnopt import Pass, Refusal, Rewrite, Site, patterns


@dataclass(frozen=True)
class LastK(Pass):
    """Each query sees itself and the ``keys - 1`` keys before it."""

    name: ClassVar[str] = "acme.last-k"
    exact: ClassVar[bool] = False
    keys: int

    def check(self, site: Site) -> Refusal | None:
        return None if site.spec.is_causal else site.refuse("needs-causal", found=site.spec.pattern)

    def rewrite(self, site: Site) -> Rewrite:
        return Rewrite(site.spec.restricted(patterns.Window(left=self.keys - 1, right=0)))
