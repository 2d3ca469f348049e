"""A pattern: which keys each query sees."""

from dataclasses import dataclass

from torch import Tensor

from attnopt import Pattern, Reach, register


@register
@dataclass(frozen=True, repr=False)
class Every(Pattern):
    """Every query sees every ``n``-th key."""

    n: int

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        return (i == i) & (j % self.n == 0)

    def reach(self, first: int, last: int, kv_len: int) -> Reach:
        keys = tuple((j, j + 1) for j in range(0, kv_len, self.n))
        return Reach(all=keys, some=keys)
