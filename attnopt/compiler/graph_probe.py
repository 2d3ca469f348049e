"""The captured graph of a model as what importance methods ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.program import Program
from attnopt.capture.run_unchanged import kept
from attnopt.compiler.head_gates import Gated, gated
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.errors import CalibrationError
from attnopt.fit.head_scores import mean_outputs
from attnopt.ir.head_probe import Behaviour, HeadProbe, Loss
from attnopt.ir.site import Site
from attnopt.match.find import Found


@dataclass(frozen=True)
class GraphProbe(HeadProbe):
    """The sites in ``found``, in the graph of ``program``."""

    program: Program
    found: Sequence[Found]
    batches: Sequence[CallInputs]
    more: Sequence[CallInputs] = ()
    loss: Loss | None = None
    behaviour: Behaviour | None = None
    seed: int = 0
    made: dict[str, Gated] = field(default_factory=dict, repr=False)  # by kind of ablation

    @cached_property
    def heads(self) -> Mapping[str, Sequence[int]]:
        order = Stream(self.program.module, self.found, ()).found
        return {f.site.name: f.site.spec.heads for f in order}

    def sites(self, batches: Sequence[CallInputs] | None = None) -> Iterator[Site]:
        given = self.batches if batches is None else batches
        for f, activations in Stream(self.program.module, self.found, given).sites():
            yield replace(f.site, activations=activations)

    def output(self, batch: CallInputs, off: Mapping[str, Sequence[int]] | None = None, kind: str = "zero") -> Any:
        model = self._gated(kind if off else "zero")
        with torch.no_grad():
            try:
                for site, heads in (off or {}).items():
                    model.gates[site][0, list(heads)] = 0.0
                with kept(model.module):
                    return model.module(*batch.args, **batch.kwargs)
            finally:
                for gate in model.gates.values():
                    gate.fill_(1.0)

    def slopes(self, loss: Loss, repeats: int = 1) -> Mapping[str, Tensor]:
        model = self._gated("zero")
        gates, found = list(model.gates.values()), list[list[Tensor]]()
        for batch in [batch for batch in self.batches for _ in range(repeats)]:
            with torch.enable_grad(), kept(model.module):
                value = loss(model.module(*batch.args, **batch.kwargs), batch)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    raise CalibrationError(
                        "the loss does not return a scalar that depends on the model output",
                        hint="return a scalar tensor computed from the output",
                    )
                grads = torch.autograd.grad(value.sum(), gates, allow_unused=True)
            given = zip(gates, grads, strict=True)
            found.append([(torch.zeros_like(p) if g is None else g).flatten().double().cpu() for p, g in given])
        return {site: torch.stack([grads[i] for grads in found]) for i, site in enumerate(model.gates)}

    def _gated(self, kind: str) -> Gated:
        if kind not in self.made:
            means = {site.name: mean_outputs(site) for site in self.sites()} if kind == "mean" else None
            if kind == "resample":
                self._require_alike()
            self.made[kind] = gated(self.program.module, self.found, kind, means)
        return self.made[kind]

    def _require_alike(self) -> None:
        """Raises CalibrationError if a sequence has no other one of its length beside it."""
        for site in self.sites():
            assert site.activations is not None
            for i, t in enumerate(site.activations.batches):
                alone, padded = len(t.q) < 2, bool((t.real != t.real[:1]).any())
                if alone or padded:
                    why = "has one sequence" if alone else "has sequences of several lengths"
                    raise CalibrationError(
                        f"calibration batch {i} {why}, so outputs of another one cannot be put in their place",
                        site=site.name,
                        hint='give batches of several sequences of one length, or use kind="mean"',
                    )
