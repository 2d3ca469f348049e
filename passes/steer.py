"""Add a constant to head outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.base.input import Input
from attnopt.base.options import positions
from attnopt.ir.call_tensor import CallTensor, Source
from attnopt.ir.constant import Constant
from attnopt.ir.head_additions import Shifted
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import (
    distinct_heads,
    note_absent_tokens,
    refuse_unfit_inputs,
    refuse_unknown_heads,
    refuse_unknown_tokens,
)
from attnopt.passes.tensor_options import Shape, TensorOption, tensor_option, values_of_heads

_HINT = "give [batch, heads, Dv], or [batch, heads, tokens, Dv] for each token its own"


@dataclass(frozen=True)
class Steer(Pass):
    """Add ``delta`` to the outputs of ``heads`` before the output projection.

    This is activation steering by head, as in inference-time intervention (arXiv:2306.03341) and in the shift within heads of
    In-Context Brush (arXiv:2505.20271).
    ``delta``: a tensor or numbers, [Dv] for each of the heads, or [heads, Dv] in the order of ``heads``; or an ``Input``, for
    which each call brings [B or 1, heads, Dv], or [B or 1, heads, L, Dv] for each token its own, with the same choice in every
    call.
    ``heads``: None for all heads of the trained model; those that were already pruned are ignored.
    ``tokens``: the positions of the queries, as integers or a ``range``, negative from the end as in Python; None for all.
    With a cache, positions count the earlier tokens, too; padding counts, and in cross-attention the queries do.  A position
    that a sequence does not have is ignored there.
    Earlier gains do not scale ``delta``, later ones do.  Apply it after passes that change weights: their fit uses the trained
    model.  Raises PolicyError.
    """

    name: ClassVar[str] = "steer"
    exact: ClassVar[bool] = False
    delta: TensorOption | Sequence[Any]
    heads: Sequence[int] | None = None
    tokens: Iterable[int] | None = None

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", distinct_heads(self.name, self.heads))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", positions(self.name, "tokens", self.tokens))
        n = "heads" if self.heads is None else len(self.heads)
        hint = f"use finite floating-point numbers, [Dv] or [{n}, Dv], or an Input"
        object.__setattr__(self, "delta", tensor_option(self.name, "delta", self.delta, self._fits, hint))

    def _fits(self, shape: Shape) -> bool:
        return len(shape) == 1 or (len(shape) == 2 and (self.heads is None or shape[0] == len(self.heads)))

    def check(self, site: Site) -> Refusal | None:
        return (
            refuse_unknown_heads(site, self.heads or ())
            or self._refuse_sizes(site)
            or refuse_unknown_tokens(site, self._tokens, self._length(site))
        )

    def rewrite(self, site: Site) -> Rewrite:
        if self._tokens == ():
            return Rewrite(site.spec)
        moved, by = self._brought(site) if isinstance(self.delta, Input) else self._known(site)
        if not moved:
            return Rewrite(site.spec)
        edit = Shifted(moved, by, self._tokens, self._tokens is not None and site.alignment == "last")
        return Rewrite(site.spec.followed_by(edit), notes=note_absent_tokens(self.name, site, self._tokens))

    def _known(self, site: Site) -> tuple[tuple[int, ...], Source]:
        by_head = self._by_head(site)
        moved = tuple(h for h in by_head if h in site.spec.heads and bool(by_head[h].any()))
        return moved, Constant.of(torch.stack([by_head[h] for h in moved or by_head]))

    def _brought(self, site: Site) -> tuple[tuple[int, ...], CallTensor]:
        heads, given = self._heads(site), self._input(site)
        moved = tuple(h for h in heads if h in site.spec.heads)
        return moved, given.keeping([heads.index(h) for h in moved])

    def _heads(self, site: Site) -> Sequence[int]:
        return range(site.trained_heads) if self.heads is None else self.heads

    def _input(self, site: Site) -> CallTensor:
        assert isinstance(self.delta, Input)
        return values_of_heads(site, self.delta, len(self._heads(site)))

    def _by_head(self, site: Site) -> dict[int, Tensor]:
        """[Dv] by head."""
        assert isinstance(self.delta, Constant)
        heads, rows = self._heads(site), self.delta.tensor()
        return dict(zip(heads, rows if rows.dim() == 2 else rows.expand(len(heads), -1), strict=True))

    @property
    def _tokens(self) -> tuple[int, ...] | None:
        return None if self.tokens is None else tuple(self.tokens)

    def _length(self, site: Site) -> int:
        return site.kv_len if site.alignment == "last" else site.q_len

    def _refuse_sizes(self, site: Site) -> Refusal | None:
        if isinstance(self.delta, Input):
            return refuse_unfit_inputs(site, [self._input(site)], _HINT)
        assert isinstance(self.delta, Constant)
        *rows, features = self.delta.shape
        if features != site.value_dim:
            expected, found = f"a delta of {site.value_dim} features", f"a delta of {features}"
            return site.refuse("other-sizes", expected=expected, found=found)
        if self.heads is None and rows and rows[0] != site.trained_heads:
            expected = f"one delta for all heads, or one for each of the {site.trained_heads}"
            return site.refuse("other-sizes", expected=expected, found=f"{rows[0]}", hint="name the heads")
        return None
