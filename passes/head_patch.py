"""Replace head outputs by zeros, their mean, or the values of another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnopt.base.input import Input
from attnopt.fit.head_scores import mean_outputs
from attnopt.ir.constant import Constant
from attnopt.ir.head_edits import Replaced
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import (
    distinct_heads,
    refuse_no_data,
    refuse_no_single_run,
    refuse_unfit_inputs,
    refuse_unknown_heads,
)
from attnopt.passes.tensor_options import Shape, TensorOption, tensor_option, values_of_heads

_HINT = "give [batch, heads, Dv], or [batch, heads, tokens, Dv] for each token its own"
NAMED = ("silence", "mean", "run")


@dataclass(frozen=True)
class HeadPatch(Pass):
    """Replace the outputs of ``heads`` before the output projection; earlier gains of theirs have no effect.

    ``values``: "silence": zeros; "mean": the mean output of each head over the calibration tokens without padding, in
    all calls of its weights (mean ablation); "run": the outputs in the first calibration batch (activation patching);
    or a tensor, [heads, Dv] for every token alike, or [batch or 1, heads, tokens, Dv] for sequences of exactly this
    length, in the order of ``heads``; or an ``Input``, for which each call brings [batch or 1, heads, Dv], or
    [batch or 1, heads, tokens, Dv] for each token its own, with the same choice in every call.
    Heads that were already pruned are ignored.  Apply it after passes that change weights: their fit uses the trained
    model.  Raises PolicyError.
    """

    name: ClassVar[str] = "head-patch"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    heads: Sequence[int]
    values: str | TensorOption = "silence"

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", distinct_heads(self.name, self.heads))
        object.__setattr__(self, "values", self._read(self.values))

    def _read(self, given: object) -> str | Constant | Input:
        if isinstance(given, str) and given in NAMED:
            return given
        n, named = len(self.heads), ", ".join(map(repr, NAMED))
        hint = f"use {named}, a floating-point tensor [{n}, Dv] or [batch, {n}, tokens, Dv], or an Input"
        return tensor_option(self.name, "values", given, self._fits, hint)

    def _fits(self, shape: Shape) -> bool:
        return len(shape) in (2, 4) and shape[0 if len(shape) == 2 else 1] == len(self.heads)

    def check(self, site: Site) -> Refusal | None:
        refused = refuse_unknown_heads(site, self.heads)
        if refused is None and self.values in ("mean", "run"):
            refused = refuse_no_data(site) if self.values == "mean" else refuse_no_single_run(site)
        return refused or self._refuse_sizes(site)

    def rewrite(self, site: Site) -> Rewrite:
        kept = [h for h in self.heads if h in site.spec.heads]
        if not kept:
            return Rewrite(site.spec)
        edit = self._named(site, kept) if isinstance(self.values, str) else self._given(site).keeping(kept)
        assert edit is not None
        return Rewrite(site.spec.followed_by(edit))

    def _given(self, site: Site) -> Replaced:
        heads = tuple(self.heads)
        if isinstance(self.values, Input):
            return Replaced(heads, values_of_heads(site, self.values, len(heads)), f"values of {self.values.name}")
        assert isinstance(self.values, Constant)
        return Replaced(heads, self.values, "values of another run")

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
        if isinstance(self.values, Input):
            return refuse_unfit_inputs(site, [values_of_heads(site, self.values, len(self.heads))], _HINT)
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
