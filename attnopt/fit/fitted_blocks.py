"""Block selections whose scores are fitted to the calibration data of a site, and what these keep of the attention there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnopt.errors import CalibrationError
from attnopt.fit.attention_recall import kept_of_rows
from attnopt.ir.blame import blamed, fault
from attnopt.ir.constant import Constant
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.semantics import heads_of
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec

_KIND = "block score"


def fitted(site: Site, selection: DynamicBlocks) -> DynamicBlocks:
    """``selection`` with scores fitted to the tokens that are not held back.  Raises CalibrationError, PluginError."""
    now, spec, scores = site.activations, site.spec, selection.scores
    assert now is not None
    samples = [
        selection.sample(t.q, heads_of(spec, t.k), spec.scale, spec.is_causal, counts, counts)
        for t, counts in zip(now.operands(spec), now.counted(False), strict=True)
    ]
    try:
        with blamed(scores, _KIND, "fit", site.name), torch.no_grad():
            made = scores.fit(samples)
    except CalibrationError as e:
        raise CalibrationError(e.message, site=site.name, hint=e.hint) from e
    if not isinstance(made, tuple) or not made or not all(isinstance(c, Constant) for c in made):
        raise fault(scores, _KIND, f"fit returned {made!r}, expected a tuple of Constants", site.name)
    for constant in made:
        if constant.shape[0] != spec.num_heads or not bool(constant.tensor().isfinite().all()):
            expected = f"expected finite numbers for each of {spec.num_heads} heads"
            raise fault(scores, _KIND, f"fit returned {constant}, {expected}", site.name)
    return replace(selection, fitted=made)


def recall_on_held_back(site: Site, spec: AttentionSpec) -> Tensor:
    """The attention recall of ``spec.selection`` of each head, on the tokens that are held back, [H]."""
    now = site.activations
    assert now is not None
    kept = whole = torch.zeros(spec.num_heads, dtype=torch.float64)
    for t, counts in zip(now.operands(spec), now.counted(True), strict=True):
        with torch.no_grad():
            rows = kept_of_rows(t.q, t.k, spec, bias=t.bias, mask=t.mask, sinks=t.sinks)
        of_batch = [(x * counts[:, None]).double().sum((0, 2)).cpu() for x in rows]
        kept, whole = kept + of_batch[0], whole + of_batch[1]
    return kept / whole.clamp(min=torch.finfo(torch.float64).tiny)
