"""Training of rewritten models: distillation, and less memory for the backward pass of attention."""

from __future__ import annotations

from attnopt.training.distillation import distill
from attnopt.training.saved_tensors import QuantizedSaved, SavedReport, quantize_saved

__all__ = ["QuantizedSaved", "SavedReport", "distill", "quantize_saved"]
