"""Mix a fixed map into the attention weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.base.input import Input
from attnopt.base.options import number, numbers
from attnopt.errors import PolicyError
from attnopt.ir.call_tensor import BATCH, KEYS, QUERIES, CallTensor, Source
from attnopt.ir.constant import Constant
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.mixed_maps import Mixed
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import distinct_heads, refuse_unfit_inputs, refuse_unknown_heads
from attnopt.passes.tensor_options import Shape, TensorOption, tensor_option


@dataclass(frozen=True)
class MixMap(Pass):
    """The attention map A of head h becomes ``(1 - gate) A + gate * map``; no input changes ``map``.

    This is the gated positional self-attention of ConViT (arXiv:2103.10697) with its positional map at hand, for self- and
    cross-attention.  It equals ``(1 - gate) o + gate * map @ v`` of the head outputs o, and A is not needed for it.
    ``map``: finite numbers of any kind, a tensor or nested lists, [L, S] for all heads or [heads, L, S], for sequences of
    exactly these lengths; or an ``Input``, for which each call brings [B or 1, heads or 1, L, S].  Known numbers below the
    smallest normal one of their type, about 1e-38, count as zero.  Neither masks nor patterns, those of the model or of other
    passes, hide anything in it.
    ``gate``: a number from 0 to 1, or one for each head.  0 changes nothing; with 1, the map alone counts, and where it does
    in all heads, queries and keys are not computed.
    ``heads``: None for all heads of the trained model; those that were already pruned are ignored.  A head with shared values
    reads the shared values.  Raises PolicyError.
    """

    name: ClassVar[str] = "mix-map"
    exact: ClassVar[bool] = False
    map: TensorOption | Sequence[Any]
    gate: float | Sequence[float] | Tensor
    heads: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", distinct_heads(self.name, self.heads))
        object.__setattr__(self, "gate", self._read_gate(self.gate))
        n = "heads" if self.heads is None else len(self.heads)
        hint = f"use finite floating-point numbers, [queries, keys] or [{n}, queries, keys], or an Input"
        object.__setattr__(self, "map", tensor_option(self.name, "map", self.map, self._fits, hint))

    def _read_gate(self, given: Any) -> float | tuple[float, ...]:
        is_one = isinstance(given, (int, float)) or (isinstance(given, Tensor) and given.dim() == 0)
        one = given.item() if isinstance(given, Tensor) and is_one else given
        read = number(self.name, "gate", one) if is_one else numbers(self.name, "gate", given)
        listed = read if isinstance(read, tuple) else (read,)
        if any(not 0 <= gate <= 1 for gate in listed):
            raise PolicyError(f"{self.name}: invalid value gate={given!r}: expected numbers from 0 to 1")
        if isinstance(read, tuple) and len(read) != (len(self.heads) if self.heads is not None else len(read) or 1):
            n = "one for each head" if self.heads is None else f"{len(self.heads)} of them"
            raise PolicyError(f"{self.name}: invalid value gate={given!r}: expected one number or {n}")
        return read

    def _fits(self, shape: Shape) -> bool:
        return len(shape) == 2 or (len(shape) == 3 and (self.heads is None or shape[0] == len(self.heads)))

    def check(self, site: Site) -> Refusal | None:
        return (
            refuse_unknown_heads(site, self.heads or ()) or self._refuse_other_heads(site) or self._refuse_lengths(site)
        )

    def rewrite(self, site: Site) -> Rewrite:
        gates = self._gates(site)
        mixed = tuple(h for h in site.spec.heads if gates.get(h))
        if not mixed:
            return Rewrite(site.spec)
        order = list(gates)
        maps = self._maps(site, [order.index(h) for h in mixed])
        return Rewrite(site.spec.followed_by(Mixed(mixed, tuple(gates[h] for h in mixed), maps)))

    def _maps(self, site: Site, places: Sequence[int]) -> Source:
        """Those of the heads at these places, or one for all of them."""
        if isinstance(self.map, Input):
            given = self._input(site)
            return given if given.shape[1] == 1 else given.keeping(places)
        assert isinstance(self.map, Constant)
        maps = self.map.tensor()
        # A softmax over distances has many subnormal numbers, and a CPU takes a hundred times as long for each.
        maps = maps.masked_fill(maps.abs() < torch.finfo(maps.dtype).tiny, 0.0)
        return Constant.of(maps[None] if maps.dim() == 2 else maps[list(places)])

    def _input(self, site: Site) -> CallTensor:
        assert isinstance(self.map, Input)
        example = site.inputs.get(self.map.name)
        one = example is not None and len(example.shape) > 2 and example.shape[-3] == 1
        heads = 1 if one else site.trained_heads if self.heads is None else len(self.heads)
        return CallTensor(self.map, (BATCH, heads, QUERIES, KEYS))

    def _gates(self, site: Site) -> dict[int, float]:
        """By head, in the order of the map."""
        heads: Iterable[int] = range(site.trained_heads) if self.heads is None else self.heads
        if isinstance(self.gate, tuple):
            return dict(zip(heads, self.gate, strict=True))
        assert isinstance(self.gate, float)
        return dict.fromkeys(heads, self.gate)

    def _refuse_other_heads(self, site: Site) -> Refusal | None:
        """Refuse a map or gates for another number of heads."""
        counts = {
            "maps": self.map.shape[0] if isinstance(self.map, Constant) and len(self.map.shape) == 3 else None,
            "gates": len(self.gate) if isinstance(self.gate, tuple) else None,
        }
        for what, count in counts.items():
            if self.heads is None and count not in (None, site.trained_heads):
                expected = f"one for all heads, or {site.trained_heads} {what}"
                return site.refuse("other-sizes", expected=expected, found=f"{count} {what}", hint="name the heads")
        return None

    def _refuse_lengths(self, site: Site) -> Refusal | None:
        if isinstance(self.map, Input):
            return refuse_unfit_inputs(site, [self._input(site)], "give [batch, heads, queries, keys]")
        assert isinstance(self.map, Constant)
        *_, rows, columns = self.map.shape
        if (rows, columns) == (site.q_len, site.kv_len) and not site.is_dynamic:
            return None
        expected, found = f"{rows} queries and {columns} keys in every call", f"{site.q_len} and {site.kv_len}"
        if site.is_dynamic:
            hint = "remove the sequence axis from dynamic_shapes"
            return site.refuse("other-sizes", expected=expected, found="a dynamic length", hint=hint)
        return site.refuse("other-sizes", expected=expected, found=found, hint="give a map of the site's lengths")
