"""A KV partition: which key/value heads become one."""

from collections.abc import Sequence
from typing import ClassVar

from attnopt import KvPartition, Site


class Strided(KvPartition):
    """Every ``count``-th head: {0, 2} and {1, 3} of four."""

    name: ClassVar[str] = "acme.strided"

    def groups(self, site: Site, count: int, loss: object) -> Sequence[Sequence[int]]:
        return [site.spec.kv_heads[first::count] for first in range(count)]
