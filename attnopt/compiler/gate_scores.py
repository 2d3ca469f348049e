"""Whole-model head scores: from closing gates, or from the gradient of the output with respect to gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import tensors
from attnopt.base.progress import working
from attnopt.capture.program import Program
from attnopt.capture.run_unchanged import kept
from attnopt.compiler.head_gates import Gated, gated
from attnopt.compiler.head_sweep import HeadSweep
from attnopt.errors import CalibrationError
from attnopt.match.find import Found

PROBES = 4  # random directions of the output, for each batch

Scores = dict[str, tuple[float, ...]]


def ablation(
    program: Program, found: Sequence[Found], batches: Sequence[CallInputs], behaviour: Callable[[Any], Tensor] | None
) -> Scores:
    """The mean divergence of the model's output from the original's with one head silenced."""
    sweep = HeadSweep(program, found)
    apart = {f.site.name: torch.zeros(f.raised.spec.num_heads, dtype=torch.float64) for f in found}

    def told(output: Any) -> list[Tensor]:
        if behaviour is not None:
            return [behaviour(output).double().log_softmax(-1)]
        return [t.double() for t in tensors(output) if t.is_floating_point()]

    with torch.no_grad(), working("silencing one head after another", len(batches) * len(found)) as step:
        for batch in batches:
            original = told(sweep.output(batch))
            for name, o, run in sweep.sites(batch):
                silenced = (_without(o, h) for h in range(o.shape[1]))
                for h, output in enumerate(run(silenced)):
                    apart[name][h] += _divergence(told(output), original, behaviour is not None)
                step()
    return {name: tuple((total / len(batches)).tolist()) for name, total in apart.items()}


def _without(o_BHLD: Tensor, head: int) -> Tensor:
    silenced = o_BHLD.clone()
    silenced[:, head] = 0.0
    return silenced


def taylor(
    gm: fx.GraphModule, found: Sequence[Found], batches: Sequence[CallInputs], loss: Callable[[Any, CallInputs], Tensor]
) -> Scores:
    """Mean over batches of |d loss / d gate|."""
    return _mean([[g.abs() for g in grads] for grads in _gradients(gated(gm, found), batches, loss)], found)


def fisher(
    gm: fx.GraphModule, found: Sequence[Found], batches: Sequence[CallInputs], loss: Callable[[Any, CallInputs], Tensor]
) -> Scores:
    """Mean over batches of (d loss / d gate)^2."""
    return _mean([[g.square() for g in grads] for grads in _gradients(gated(gm, found), batches, loss)], found)


def sensitivity(gm: fx.GraphModule, found: Sequence[Found], batches: Sequence[CallInputs], seed: int) -> Scores:
    """|d output / d gate|^2 relative to |output|^2, estimated with random signs (Hutchinson)."""
    generator = torch.Generator().manual_seed(seed)

    def probe(output: Any, _: CallInputs) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for t in tensors(output):
            if t.is_floating_point():
                signs = torch.randint(0, 2, t.shape, generator=generator).to(t.device) * 2 - 1
                total = total + (t.double() * signs).sum() / t.detach().double().square().sum().clamp(min=1e-300).sqrt()
        return total

    repeated = [batch for batch in batches for _ in range(PROBES)]
    return _mean([[g.square() for g in grads] for grads in _gradients(gated(gm, found), repeated, probe)], found)


def _gradients(
    model: Gated, batches: Sequence[CallInputs], loss: Callable[[Any, CallInputs], Tensor]
) -> list[list[Tensor]]:
    """For each batch the gradient of each site's gates [H]."""
    found: list[list[Tensor]] = []
    gates = list(model.gates.values())
    for batch in batches:
        with torch.enable_grad(), kept(model.module):
            value = loss(model.module(*batch[0], **batch[1]), batch)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                raise CalibrationError(
                    "the loss does not return a scalar that depends on the model output",
                    hint="return a scalar tensor computed from the output",
                )
            grads = torch.autograd.grad(value.sum(), gates, allow_unused=True)
        given = zip(gates, grads, strict=True)
        found.append([(torch.zeros_like(p) if g is None else g).flatten().double().cpu() for p, g in given])
    return found


def _mean(of_batches: Sequence[Sequence[Tensor]], found: Sequence[Found]) -> Scores:
    names = [f.site.name for f in found]
    return {
        name: tuple(torch.stack([grads[i] for grads in of_batches]).mean(0).tolist()) for i, name in enumerate(names)
    }


def _divergence(got: Sequence[Tensor], want: Sequence[Tensor], is_log: bool) -> float:
    if is_log:
        return sum(float((w.exp() * (w - g)).sum(-1).mean()) for g, w in zip(got, want, strict=True))
    return sum(
        float((g - w).square().sum() / w.square().sum().clamp(min=1e-300)) for g, w in zip(got, want, strict=True)
    )
