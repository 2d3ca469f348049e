"""The two sides of a comparison, and the calls in which they are compared."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnopt.audit.inputs import Given, given_to_both, longer, padded, unpadded
from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import TOLERANCE, difference
from attnopt.capture.capture import require_values
from attnopt.capture.run_unchanged import outputs_of
from attnopt.compiler.analyze import Analyzed, analyze, analyze_in_eval
from attnopt.errors import CaptureError
from attnopt.onnx.load.free_axes import as_declared
from attnopt.onnx.load.load import opened
from attnopt.onnx.load.read import read
from attnopt.onnx.load.source import Source
from attnopt.onnx.load.unread import Runs, is_half
from attnopt.report.audit import ComparedOutputs

EXACT, HALF, FEW_BITS = 1e-3, 3e-2, 0.3  # relative norm of a difference of scores or values that rounding explains
_OUTPUTS = 100.0  # multiples of the tolerance for tensors: rounding grows from layer to layer, in two runtimes
_WORK = 5e11  # operations of a call of a longer example
_SCORES = 2**26  # elements of the scores of one attention
_STEP = 5

_FEW = ("quantize", "matmulnbits", "matmulinteger", "qlinear", "convinteger", "bnb4")


@dataclass(frozen=True)
class Call:
    """``tokens``: of the longest attention in the example."""

    given: Given
    setting: Literal["example", "padded", "longer"]
    tokens: int


@dataclass(frozen=True)
class Sides:
    """``eager``: the model itself; ``tolerance``: see ``EXACT``."""

    eager: nn.Module
    model: Analyzed
    file: Analyzed
    source: Source
    given: Given
    tolerance: float
    notes: tuple[str, ...]

    def calls(self) -> tuple[Call, Call | None]:
        """The example without padding, and one with some, if the model takes a mask."""
        found = self.file.findings.found or self.model.findings.found
        tokens = max((f.site.own_sizes.get("keys", f.site.kv_len) for f in found), default=0)
        hidden = padded(self.given)
        return (
            Call(unpadded(self.given), "example", tokens),
            None if hidden is None else Call(hidden, "padded", tokens),
        )

    def longer(self, base: Call, wanted: int) -> Iterator[Call]:
        lengths = dict.fromkeys((max(wanted, base.tokens + _STEP), base.tokens + _STEP))
        for tokens in lengths:
            made = longer(base.given, self.source, base.tokens, tokens)
            if made is not None and self._fits(tokens):
                yield Call(made, "longer", tokens)

    def _fits(self, tokens: int) -> bool:
        sites = [f.site for f in self.model.findings.found]
        scores = [s.batch * s.num_heads * tokens**2 for s in sites]
        attention = sum(2.0 * n * (s.head_dim + s.value_dim) for n, s in zip(scores, sites, strict=True))
        work = attention + 2.0 * tokens * sum(p.numel() for p in self.eager.parameters())
        return work <= _WORK and max(scores, default=0) <= _SCORES


def sides_of(model: nn.Module, file: str | os.PathLike[str], inputs: CallInputs, own: Mapping[str, Tensor]) -> Sides:
    """``own``: inputs of the file.  Raises CaptureError."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected an nn.Module, found {type(model).__name__}", hint="pass the model itself")
    require_values(model)
    if not any(inputs):
        raise CaptureError("diff needs example inputs of the model", hint="pass args or kwargs")
    source = read(file, opens_fused=True)
    given = given_to_both(model, inputs, source, own)
    feed = tuple(given.feed.values())
    module = opened(file, feed, {}, opens_fused=True)
    wide, shapes = as_declared(module, CallInputs(feed, {}), None)
    of_file = analyze(module, wide, shapes)
    few = sorted({n.op_type for n in source.nodes if any(word in n.op_type.lower() for word in _FEW)})
    tolerance = FEW_BITS if few else HALF if is_half(source) or _is_half(model) else EXACT
    notes = (
        (f"the file computes in few bits ({', '.join(few)}): differences below {FEW_BITS:.0%} are rounding",)
        if few
        else ()
    )
    return Sides(model, analyze_in_eval(model, inputs, "auto"), of_file, source, given, tolerance, notes)


def _is_half(model: nn.Module) -> bool:
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())


def output_errors(sides: Sides, call: Call) -> list[ComparedOutputs]:
    """Both whole, the file in ONNX Runtime; nothing where their outputs cannot be paired."""
    modes = [(m, m.training) for m in sides.eager.modules()]
    try:
        want = outputs_of(sides.eager.eval(), call.given.call)
    finally:
        for m, was_training in modes:
            m.training = was_training
    feed: dict[str, Any] = {name: x.numpy() for name, x in call.given.feed.items()}
    found = Runs(sides.source, (feed,)).values(sides.source.outputs)[0]
    got = [torch.as_tensor(x) for x in found.values()]
    pairs = [(g.to(w.dtype), w) for g, w in zip(got, want, strict=False) if g.shape == w.shape]
    if not pairs or not want or got[0].shape != want[0].shape:
        return []
    kind = {EXACT: torch.float32, HALF: torch.float16}.get(sides.tolerance)
    limit = None if kind is None else _OUTPUTS * TOLERANCE[kind]
    return [ComparedOutputs(call.tokens, difference(*map(list, zip(*pairs, strict=True))), limit)]
