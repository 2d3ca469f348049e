"""How far a quantized file is from the unquantized model, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.base.closeness import agreement
from attnopt.errors import ExportError
from attnopt.onnx.export.quantizer import Quantization


@dataclass(frozen=True)
class Deviation:
    """The lowest cosine and the largest relative error of any output at any of ``sizes`` sizes."""

    cosine: float
    relative_error: float
    sizes: int = 1

    def joined(self, other: Deviation) -> Deviation:
        return Deviation(
            min(self.cosine, other.cosine),
            max(self.relative_error, other.relative_error),
            self.sizes + other.sizes,
        )


# What rounding of weights and activations may cost: trained encoders lose .005 of the cosine in int8, .01 to .04 in int4.
BOUNDS: dict[Quantization, Deviation] = {"int8": Deviation(0.98, 0.25), "int4": Deviation(0.9, 0.5)}


def deviation(
    got: Sequence[Tensor], want: Sequence[Tensor], names: Sequence[str], how: Quantization, when: str, remedy: str
) -> Deviation:
    """Of the outputs ``names`` of one run.  Raises ExportError beyond the bound of ``how``.  Integers are not compared.

    ``when``: of which inputs; ``remedy``: beside another quantization."""
    if len(got) != len(want):
        raise ExportError(
            f"the {how} file has {len(got)} outputs {when}, and the model {len(want)}; nothing was written"
        )
    worst = Deviation(1.0, 0.0, 0)
    for name, g, w in zip(names, got, want, strict=True):
        if g.shape != w.shape:
            raise ExportError(
                f"output {name!r} of the {how} file is {tuple(g.shape)} {when}, expected {tuple(w.shape)}; "
                "nothing was written"
            )
        if w.is_floating_point():
            worst = worst.joined(_of_output(g, w, name, how, when, remedy))
    if not worst.sizes:
        raise ExportError(
            f"the {how} file cannot be checked: the model returns no floating-point numbers",
            hint=f"return logits beside them, or {remedy}",
        )
    return Deviation(worst.cosine, worst.relative_error)


def _of_output(got: Tensor, want: Tensor, name: str, how: Quantization, when: str, remedy: str) -> Deviation:
    hint = 'use quantize="int8", or ' * (how == "int4") + remedy
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite):
        raise ExportError(
            f"output {name!r} of the {how} file has NaN or infinities {when} where the model has none, or the other way "
            "round, so nothing was written",
            hint=hint,
        )
    cosine, error = agreement(got[finite], want[finite]) if not finite.all() else agreement(got, want)
    bound = BOUNDS[how]
    if not (cosine >= bound.cosine and error <= bound.relative_error) or math.isnan(cosine):
        raise ExportError(
            f"output {name!r} of the {how} file has a cosine of {cosine:.3f} to the model's (at least {bound.cosine}) and a "
            f"relative error of {error:.2g} (at most {bound.relative_error}) {when}, so nothing was written",
            hint=hint,
        )
    return Deviation(cosine, error)
