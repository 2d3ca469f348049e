"""Let heads read keys and values that are averaged over pools of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

from attnopt.base.options import wholes
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import (
    refuse_causal_pools,
    refuse_extended,
    refuse_pooled,
    refuse_rows,
    refuse_unknown_heads,
)


@dataclass(frozen=True)
class PoolKeys(Pass):
    """Heads read the means of pools of keys and values; each pool counts as one key ("Lo" heads of HiLo, arXiv:2205.13213).

    ``size``: tokens of a pool; on a ``grid`` of keys, (height, width) in row-major order, one size for both axes or one for
    each.  ``prefix``: first keys, such as a class token, that stay as they are.  ``heads``: by their number in the trained
    model; None for all.  The keys are pooled as the scores read them, after projection, norm and rotation.  Raises PolicyError.
    """

    name: ClassVar[str] = "pool-keys"
    exact: ClassVar[bool] = False
    size: int | Sequence[int]
    grid: int | Sequence[int] | None = None
    heads: Sequence[int] | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        read = PooledKeys(self.size, self.heads or (), self.grid, self.prefix, owner=self.name)
        object.__setattr__(self, "size", read.size[0] if len(set(read.size)) == 1 else read.size)
        object.__setattr__(self, "grid", read.grid)
        if self.heads is not None:
            object.__setattr__(self, "heads", wholes(self.name, "heads", self.heads))

    @classmethod
    def typical(cls) -> PoolKeys:
        return cls(size=1)

    def check(self, site: Site) -> Refusal | None:
        return (
            refuse_unknown_heads(site, self.heads or ())
            or _refuse_another_choice(site)
            or refuse_rows(site, "use either query-rows or pool-keys at a site")
            or self._refuse_hidden_keys(site)
            or self._refuse_other_lengths(site)
        )

    def rewrite(self, site: Site) -> Rewrite:
        chosen = self._chosen(site)
        if not chosen or self._pools(chosen).tokens == 1:
            return Rewrite(site.spec, notes=("pool-keys: pools of one key change nothing",) if chosen else ())
        return Rewrite(replace(site.spec, pooling=self._pools(chosen)))

    def _chosen(self, site: Site) -> tuple[int, ...]:
        return tuple(h for h in site.spec.heads if self.heads is None or h in self.heads)

    def _pools(self, heads: Sequence[int]) -> PooledKeys:
        return PooledKeys(self.size, heads, self.grid, self.prefix, owner=self.name)

    def _refuse_hidden_keys(self, site: Site) -> Refusal | None:
        """Refuse keys that would reach, through the mean of their pool, queries that must not see them."""
        if site.alignment == "last":
            return site.refuse(
                "cached-keys",
                expected="keys that are all computed in this call",
                found=f"{site.q_len} queries after {site.kv_len - site.q_len} past keys",
                hint="pools would change with every new token; capture the model without its cache",
            )
        pooled = replace(site.spec, pooling=self._pools(self._chosen(site)))
        causal = refuse_causal_pools(site, pooled, "use grouped-query or local-window")
        if causal is not None:
            return causal
        if site.spec.call_segments is not None:
            return site.refuse(
                "masked-pools",
                expected="keys that are never hidden",
                found=str(site.spec.segments or site.spec.weight_gains),
                hint="hidden keys would enter the means; use either segments or pool-keys at a site",
            )
        if site.spec.has_mask or site.bias_hides:
            return site.refuse(
                "masked-pools",
                expected="keys that are never hidden",
                found="a mask operand" if site.spec.has_mask else "a bias that may be a mask",
                hint="hidden keys, such as padding, would enter the means; capture the model without padding and its mask",
            )
        return None

    def _refuse_other_lengths(self, site: Site) -> Refusal | None:
        pools = self._pools(())
        if pools.fits(site.kv_len, site.kv_step):
            return None
        prefix = f"{self.prefix} and " if self.prefix else ""
        if pools.grid is not None:
            grid = " x ".join(map(str, pools.grid))
            expected = f"{prefix}{grid} keys, {self.prefix + prod(pools.grid)} in all"
        else:
            expected = f"{prefix}a multiple of {pools.tokens} keys"
        if site.kv_step:
            hint = "remove their axis from dynamic_shapes"
            hint += "" if pools.grid else f', or make it a multiple, such as {pools.tokens} * torch.export.Dim("pools")'
            return site.refuse("wrong-length", expected=expected, found="a dynamic number of keys", hint=hint)
        hint = "pad the tokens to whole pools, or choose a size that divides their number"
        if pools.grid is not None:
            hint = "give the grid of the keys, with the number of class and register tokens before it as prefix="
        elif not self.prefix and site.kv_len % pools.tokens == 1:
            hint += "; leave a class token out of the pools with prefix=1"
        return site.refuse("wrong-length", expected=expected, found=f"{site.kv_len} keys", hint=hint)


def _refuse_another_choice(site: Site) -> Refusal | None:
    """Refuse keys that are already pooled, or chosen at run time."""
    spec = site.spec
    if spec.pooling is not None:
        return refuse_pooled(site, "apply pool-keys only once per site")
    if spec.extension is not None:
        return refuse_extended(site, "use either extend-keys or pool-keys at a site")
    if spec.zero_keys is not None:
        return site.refuse(
            "zero-padded",
            expected="keys that are all tokens",
            found=str(spec.zero_keys),
            hint="use either zero_pad or pool-keys at a site",
        )
    if spec.selection is not None:
        return site.refuse(
            "already-selected",
            expected="an attention without block selection",
            found=str(spec.selection),
            hint="use either dynamic-sparse or pool-keys at a site",
        )
    return None
