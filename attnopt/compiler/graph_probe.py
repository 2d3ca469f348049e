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
from attnopt.compiler.head_sweep import HeadSweep, with_each
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.errors import CalibrationError
from attnopt.fit.head_scores import mean_outputs
from attnopt.ir.head_probe import HeadProbe, Loss, ToLogits
from attnopt.ir.site import Site
from attnopt.match.find import Found


@dataclass(frozen=True)
class Ablated:
    """The captured model with one kind of replacement for each head, and what runs it."""

    model: Gated
    sweep: HeadSweep


@dataclass(frozen=True)
class GraphProbe(HeadProbe):
    """The sites in ``found``, in the graph of ``program``."""

    program: Program
    found: Sequence[Found]
    batches: Sequence[CallInputs]
    more: Sequence[CallInputs] = ()
    loss: Loss | None = None
    behaviour: ToLogits | None = None
    seed: int = 0
    made: dict[tuple[str, bool], Ablated] = field(default_factory=dict, repr=False)  # by kind, without and with gates

    @cached_property
    def heads(self) -> Mapping[str, Sequence[int]]:
        order = Stream(self.program.module, self.found, ()).found
        return {f.site.name: f.site.spec.heads for f in order}

    def sites(self, batches: Sequence[CallInputs] | None = None) -> Iterator[Site]:
        given = self.batches if batches is None else batches
        for f, activations in Stream(self.program.module, self.found, given).sites():
            yield replace(f.site, activations=activations)

    def output(self, batch: CallInputs, off: Mapping[str, Sequence[int]] | None = None, kind: str = "zero") -> Any:
        made = self._ablated(kind, True) if off else self._ablated("zero", False)
        with torch.no_grad():
            return made.sweep.output(batch, made.model.closed(off or {}))

    @torch.no_grad()
    def sweep(
        self, batch: CallInputs, kind: str = "zero", off: Mapping[str, Sequence[int]] | None = None
    ) -> Iterator[tuple[str, int, Any]]:
        made = self._ablated(kind, bool(off))
        sweep, others, gone = made.sweep, made.model.replacements, off or {}
        call = sweep.call_to([*sweep.nodes.values(), *others.values()], batch, made.model.closed(gone))
        for site, node in sweep.nodes.items():
            values = call.read([node, others[site]])
            left = [h for h in range(values[node].shape[1]) if h not in gone.get(site, ())]
            ablated = with_each(values[node], values[others[site]], left)
            for h, output in zip(left, sweep.rest(site, call, batch)(ablated), strict=True):
                yield site, h, output

    def slopes(self, loss: Loss, repeats: int = 1) -> Mapping[str, Tensor]:
        model = self._ablated("zero", True).model
        module, by_site, found = model.graph.module, model.parameters(), list[list[Tensor]]()
        gates = list(by_site.values())
        for batch in [batch for batch in self.batches for _ in range(repeats)]:
            with torch.enable_grad(), kept(module):
                value = loss(module(*batch.args, **batch.kwargs), batch)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    raise CalibrationError(
                        "the loss does not return a scalar that depends on the model output",
                        hint="return a scalar tensor computed from the output",
                    )
                grads = torch.autograd.grad(value.sum(), gates, allow_unused=True)
            given = zip(gates, grads, strict=True)
            found.append([(torch.zeros_like(p) if g is None else g).flatten().double().cpu() for p, g in given])
        return {site: torch.stack([grads[i] for grads in found]) for i, site in enumerate(by_site)}

    def _ablated(self, kind: str, has_gates: bool) -> Ablated:
        """Gates cost little, but replacements that are computed again behind each ablated head do; one head needs none."""
        if (kind, has_gates) not in self.made:
            if kind == "resample":
                self._require_alike()
            means = self._means if kind == "mean" else None
            model = gated(self.program.module, self.found, kind, means, has_gates)
            self.made[kind, has_gates] = Ablated(model, HeadSweep(self.program, model.graph))
        return self.made[kind, has_gates]

    @cached_property
    def _means(self) -> Mapping[str, Tensor]:
        return {site.name: mean_outputs(site) for site in self.sites()}

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
