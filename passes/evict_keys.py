"""Bound the keys that the cache of a decoder keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from attnopt.base.options import choice, whole
from attnopt.errors import PolicyError
from attnopt.ir.eviction import Eviction
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import refuse_other_keys
from attnopt.patterns import Sinks, Window

METHODS = {"sinks": ("sinks",), "h2o": ("recent",), "snapkv": ("recent", "pool")}  # and their own options


@dataclass(frozen=True)
class EvictKeys(Pass):
    """Each key/value head keeps ``budget`` keys.

    ``method``:
      - "sinks": the first ``sinks`` tokens (default 4) and the newest (StreamingLLM, arXiv:2309.17453).  This is a pattern, and
        works in any model.  A query sees ``budget`` keys, itself included.
      - "h2o" (arXiv:2306.14048): those that received the most attention so far, and the ``recent`` newest (default: half of
        the budget).  A query sees ``budget`` keys, itself included.
      - "snapkv" (arXiv:2404.14469): of a prompt, those that received the most attention from its last ``recent`` tokens
        (default 32, at most half of the budget), and these.  Generated tokens come on top.  A key counts what the best of
        ``pool`` keys (default 7, an odd number) around it received.

    "h2o" and "snapkv" choose from what a cache holds: only ``attnopt.convert`` can carry them out.  Query heads that share keys
    choose them together, by the sum of their attention.  Raises PolicyError.
    """

    name: ClassVar[str] = "evict-keys"
    exact: ClassVar[bool] = False
    method: str
    budget: int
    sinks: int | None = None
    recent: int | None = None
    pool: int | None = None

    def __post_init__(self) -> None:
        choice(self.name, "method", self.method, tuple(METHODS))
        whole(self.name, "budget", self.budget, least=1)
        least = {"sinks": 0, "recent": 1, "pool": 1}
        for option, value in ((option, getattr(self, option)) for option in least):
            if value is None:
                continue
            if option not in METHODS[self.method]:
                raise PolicyError(f'{self.name}: method="{self.method}" has no option {option}')
            whole(self.name, option, value, least[option])
        if self.sinks is not None and self.sinks >= self.budget:
            raise PolicyError(
                f"{self.name}: {self.sinks} sinks leave no room for the query's own key in budget={self.budget}"
            )
        if self.recent is not None and self.recent > self.budget:
            raise PolicyError(f"{self.name}: recent={self.recent} exceeds budget={self.budget}")
        if self.pool is not None and self.pool % 2 == 0:
            raise PolicyError(f"{self.name}: invalid value pool={self.pool}: expected an odd number of keys")

    @classmethod
    def typical(cls) -> EvictKeys:
        return cls("sinks", budget=2)

    def check(self, site: Site) -> Refusal | None:
        return refuse_other_keys(site, past=True) or _refuse_later_keys(site) or self._refuse_another(site)

    def rewrite(self, site: Site) -> Rewrite:
        if self.method == "sinks":
            sinks = min(4, self.budget - 1) if self.sinks is None else self.sinks
            near = Window(self.budget - sinks - 1, 0)
            return Rewrite(site.spec.restricted(near | Sinks(sinks) if sinks else near))
        note = f"{self.name}: acts only while the model decodes from a cache; errors are measured without a cache"
        return Rewrite(replace(site.spec, eviction=self._eviction()), notes=(note,))

    def _eviction(self) -> Eviction:
        half = (self.budget + 1) // 2
        if self.method == "h2o":
            return Eviction("h2o", self.budget, half if self.recent is None else self.recent)
        pool = 7 if self.pool is None else self.pool
        return Eviction("snapkv", self.budget, min(32, half) if self.recent is None else self.recent, pool)

    def _refuse_another(self, site: Site) -> Refusal | None:
        if site.spec.eviction is None or self.method == "sinks":
            return None
        return site.refuse(
            "already-evicting",
            expected="a cache without eviction",
            found=str(site.spec.eviction),
            hint="use one method per site",
        )


def _refuse_later_keys(site: Site) -> Refusal | None:
    """Refuse queries that see later keys: they do not decode token by token."""
    if site.spec.is_causal:
        return None
    return site.refuse(
        "needs-causal",
        expected="queries that see no later keys",
        found=str(site.spec.visible_pattern),
        hint="use local-window or sparse to restrict the keys of an encoder",
    )
