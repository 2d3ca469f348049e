"""Replace head outputs by zeros, their mean, or the values of another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.errors import PolicyError
from attnopt.fit.head_scores import mean_outputs
from attnopt.ir.constant import Constant
from attnopt.ir.head_edits import Replaced
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import distinct_heads, refuse_no_data, refuse_unknown_heads

NAMED = ("silence", "mean", "run")


@dataclass(frozen=True)
class HeadPatch(Pass):
    """Replace the outputs of ``heads`` before the output projection; earlier gains of theirs have no effect.

    ``values``: "silence": zeros; "mean": the mean output of each head over the calibration tokens without padding, in
    all calls of its weights (mean ablation); "run": the outputs in the first calibration batch (activation patching);
    or a tensor, [heads, Dv] for every token alike, or [batch or 1, heads, tokens, Dv] for sequences of exactly this
    length, in the order of ``heads``.
    Heads that were already pruned are ignored.  Apply it after passes that change weights: their fit uses the trained
    model.  Raises PolicyError.
    """

    name: ClassVar[str] = "head-patch"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    heads: Sequence[int]
    values: str | Tensor | Constant | Mapping[str, object] = "silence"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", distinct_heads(self.name, self.heads))
        object.__setattr__(self, "values", self._read(self.values))

    def _read(self, given: object) -> str | Constant:
        if isinstance(given, str) and given in NAMED:
            return given
        try:
            found = Constant.of(given) if isinstance(given, Tensor) else given
            found = Constant.from_json(found) if isinstance(found, Mapping) else found
            assert isinstance(found, Constant)
            Replaced(tuple(self.heads), found)
        except (ValueError, KeyError, TypeError, OverflowError, AssertionError) as error:
            named = ", ".join(map(repr, NAMED))
            shown = f"of shape {list(given.shape)}" if isinstance(given, Tensor) else repr(given)[:60]
            n = len(self.heads)
            raise PolicyError(
                f"{self.name}: invalid values {shown}",
                hint=f"use {named}, or a floating-point tensor [{n}, Dv] or [batch, {n}, tokens, Dv]",
            ) from error
        return found

    def check(self, site: Site) -> Refusal | None:
        refused = refuse_unknown_heads(site, self.heads)
        if refused is None and self.values in ("mean", "run"):
            refused = refuse_no_data(site)
        if refused is None and self.values == "run" and site.activations is not None and site.activations.calls > 1:
            found = f"{site.activations.calls} calls with different values"
            hint = "give each call its own rule, as in {'attention#2': ...}"
            return site.refuse("several-calls", expected="weights that are used by one call", found=found, hint=hint)
        return refused or self._refuse_sizes(site)

    def rewrite(self, site: Site) -> Rewrite:
        kept = [h for h in self.heads if h in site.spec.heads]
        if not kept:
            return Rewrite(site.spec)
        made = (
            Replaced(tuple(self.heads), self.values, "values of another run")
            if isinstance(self.values, Constant)
            else None
        )
        edit = self._named(site, kept) if made is None else made.keeping(kept)
        assert edit is not None
        return Rewrite(site.spec.followed_by(edit))

    def _named(self, site: Site, kept: Sequence[int]) -> Replaced:
        places = torch.tensor([site.spec.heads.index(h) for h in kept])
        now = site.activations
        if self.values == "silence" or now is None:
            return Replaced(tuple(kept), Constant.of(torch.zeros(len(kept), site.value_dim)), "zeros")
        if self.values == "mean":
            return Replaced(tuple(kept), Constant.of(mean_outputs(site).cpu()[places]), "the mean output")
        first = next(now.outputs(site.spec)).cpu()
        return Replaced(tuple(kept), Constant.of(first[:, places]), "values of the first calibration batch")

    def _refuse_sizes(self, site: Site) -> Refusal | None:
        """Refuse values that do not fit the head outputs."""
        sizes: list[int] = []
        if isinstance(self.values, Constant):
            shape = self.values.shape
            if shape[-1] != site.value_dim:
                found = f"values of {shape[-1]}"
                return site.refuse("other-sizes", expected=f"values of {site.value_dim} features", found=found)
            sizes = [shape[2]] if len(shape) == 4 else []
        elif self.values == "run" and site.activations is not None:
            sizes = [site.activations.batches[0].q.shape[2]]
        if not sizes or (sizes == [site.q_len] and not site.is_dynamic):
            return None
        expected, found = f"values for {site.q_len} tokens in every call", f"values for {sizes[0]} tokens"
        hint = "remove the sequence axis from dynamic_shapes" if site.is_dynamic else ""
        return site.refuse("other-sizes", expected=expected, found=found, hint=hint)
