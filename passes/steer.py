"""Add a constant to head outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.base.options import positions
from attnopt.errors import PolicyError
from attnopt.ir.constant import Constant
from attnopt.ir.head_additions import Shifted
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import distinct_heads, note_absent_tokens, refuse_unknown_heads, refuse_unknown_tokens


@dataclass(frozen=True)
class Steer(Pass):
    """Add ``delta`` to the outputs of ``heads`` before the output projection.

    This is activation steering by head, as in inference-time intervention (arXiv:2306.03341) and in the shift within heads of
    In-Context Brush (arXiv:2505.20271).
    ``delta``: a tensor or numbers, [Dv] for each of the heads, or [heads, Dv] in the order of ``heads``.  ``heads``: None for
    all heads of the trained model; those that were already pruned are ignored.  ``tokens``: the positions of the queries, as
    integers or a ``range``, negative from the end as in Python; None for all.  With a cache, positions count the earlier
    tokens, too; padding counts, and in cross-attention the queries do.  A position that a sequence does not have is ignored
    there.
    Earlier gains do not scale ``delta``, later ones do.  Apply it after passes that change weights: their fit uses the trained
    model.  Raises PolicyError.
    """

    name: ClassVar[str] = "steer"
    exact: ClassVar[bool] = False
    delta: Tensor | Constant | Sequence[Any] | Mapping[str, Any]
    heads: Sequence[int] | None = None
    tokens: Iterable[int] | None = None

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", distinct_heads(self.name, self.heads))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", positions(self.name, "tokens", self.tokens))
        object.__setattr__(self, "delta", self._read(self.delta))

    def _read(self, given: Any) -> Constant:
        try:
            found = Constant.from_json(given) if isinstance(given, Mapping) else given
            found = torch.tensor(found, dtype=torch.float64) if isinstance(found, (list, tuple)) else found
            found = Constant.of(found) if isinstance(found, Tensor) else found
            rows = () if self.heads is None else (len(tuple(self.heads)),)
            fits = isinstance(found, Constant) and (
                len(found.shape) == 1 or (len(found.shape) == 2 and found.shape[:1] == (rows or found.shape[:1]))
            )
            assert fits
            assert bool(found.tensor().isfinite().all())
        except (ValueError, KeyError, TypeError, OverflowError, RuntimeError, AssertionError) as error:
            shown = f"of shape {list(given.shape)}" if isinstance(given, (Tensor, Constant)) else repr(given)[:60]
            n = "heads" if self.heads is None else len(tuple(self.heads))
            raise PolicyError(
                f"{self.name}: invalid delta {shown}", hint=f"use finite floating-point numbers, [Dv] or [{n}, Dv]"
            ) from error
        assert isinstance(found, Constant)
        return found

    def check(self, site: Site) -> Refusal | None:
        return (
            refuse_unknown_heads(site, self.heads or ())
            or self._refuse_sizes(site)
            or refuse_unknown_tokens(site, self._tokens, self._length(site))
        )

    def rewrite(self, site: Site) -> Rewrite:
        by_head = self._by_head(site)
        moved = tuple(h for h in by_head if h in site.spec.heads and bool(by_head[h].any()))
        if not moved or self._tokens == ():
            return Rewrite(site.spec)
        by = Constant.of(torch.stack([by_head[h] for h in moved]))
        edit = Shifted(moved, by, self._tokens, self._tokens is not None and site.alignment == "last")
        return Rewrite(site.spec.followed_by(edit), notes=note_absent_tokens(self.name, site, self._tokens))

    def _by_head(self, site: Site) -> dict[int, Tensor]:
        """[Dv] by head."""
        assert isinstance(self.delta, Constant)
        heads = range(site.trained_heads) if self.heads is None else self.heads
        rows = self.delta.tensor()
        return dict(zip(heads, rows if rows.dim() == 2 else rows.expand(len(heads), -1), strict=True))

    @property
    def _tokens(self) -> tuple[int, ...] | None:
        return None if self.tokens is None else tuple(self.tokens)

    def _length(self, site: Site) -> int:
        return site.kv_len if site.alignment == "last" else site.q_len

    def _refuse_sizes(self, site: Site) -> Refusal | None:
        assert isinstance(self.delta, Constant)
        *rows, features = self.delta.shape
        if features != site.value_dim:
            expected, found = f"a delta of {site.value_dim} features", f"a delta of {features}"
            return site.refuse("other-sizes", expected=expected, found=found)
        if self.heads is None and rows and rows[0] != site.trained_heads:
            expected = f"one delta for all heads, or one for each of the {site.trained_heads}"
            return site.refuse("other-sizes", expected=expected, found=f"{rows[0]}", hint="name the heads")
        return None
