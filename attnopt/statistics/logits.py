"""Logits of a model's output at the tokens that count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import CalibrationError
from attnopt.ir.head_probe import HeadProbe
from attnopt.statistics.calibrated import last_tokens


def logits_of_output(probe: HeadProbe, output: Any) -> Tensor:
    """[B, L, classes] or [B, classes]: of the behaviour, or else the output's ``logits``, or the output itself if it is one
    tensor.  Raises CalibrationError."""
    return _tensor_of(probe, output, ("logits",), "logits")


def hidden_of_output(probe: HeadProbe, output: Any) -> Tensor:
    """[B, L, features] or [B, features]: of the behaviour, or else the output's ``last_hidden_state``, the last of its
    ``hidden_states``, or the output itself if it is one tensor.  Raises CalibrationError."""
    return _tensor_of(probe, output, ("last_hidden_state", "hidden_states"), "hidden states")


def at_place(x: Tensor, place_B: Tensor) -> Tensor:
    """[B, classes]: of [B, L, classes] one token of each sequence."""
    return x if x.dim() == 2 else x[torch.arange(len(x), device=x.device), place_B]


def last_places(probe: HeadProbe, of_batches: Sequence[Tensor]) -> list[Tensor]:
    """The place of the last token of each sequence [B] that is no padding, by the last attention between the tokens of the
    output: an encoder before a decoder may have as many tokens."""
    found = [torch.full((len(x),), x.shape[1] - 1, device=x.device) for x in of_batches]
    if all(x.dim() == 2 for x in of_batches):
        return found
    for site in probe.sites():
        assert site.activations is not None
        seen = [t.real for t in site.activations.batches]
        pairs = list(zip(seen, of_batches, strict=True))
        if not site.is_cross and all(real.shape == x.shape[:2] for real, x in pairs):
            found = [last_tokens(real).to(x.device) for real, x in pairs]
    return found


def _tensor_of(probe: HeadProbe, output: Any, names: tuple[str, ...], what: str) -> Tensor:
    found = output if probe.behaviour is None else probe.behaviour(output)
    if probe.behaviour is None and not isinstance(output, Tensor):
        members = output if isinstance(output, dict) else vars(output) if hasattr(output, "__dict__") else {}
        found = next((members[n] for n in names if members.get(n) is not None), None)
        found = found[-1] if isinstance(found, (tuple, list)) else found
        if found is None and isinstance(output, (tuple, list)) and len(output) == 1:
            (found,) = output
    if isinstance(found, Tensor) and found.is_floating_point() and found.dim() in (2, 3):
        return found
    odd = output if found is None else found
    shown = f"a tensor {list(odd.shape)} of {odd.dtype}" if isinstance(odd, Tensor) else type(odd).__name__
    raise CalibrationError(
        f"the output of the model gives no {what}: found {shown}",
        hint="pass behaviour=, a function from the model's output to them, [batch, tokens, features]"
        + (", or batches with output_hidden_states=True" if what == "hidden states" else ""),
    )
