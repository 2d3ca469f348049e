"""attnopt: a compiler for attention.

found = attnopt.inspect(model, args, kwargs)              # every attention, whoever wrote it
fast = attnopt.optimize(model, policy, args, kwargs)      # rewritten, verified, on fused operators
fast.report; fast.save("dir"); attnopt.load("dir"); fast.export_onnx("m.onnx")
"""

from __future__ import annotations

from attnopt import passes, patterns, plot, recipes
from attnopt.advising import Advice, advise
from attnopt.attention_mass import kept_mass
from attnopt.calibration import Calibration
from attnopt.converting import apply_patterns, convert
from attnopt.dynamic_blocks import DynamicBlocks
from attnopt.errors import (
    ArchiveError,
    AttnoptError,
    AttnoptWarning,
    CalibrationError,
    CaptureError,
    ConversionError,
    ExportError,
    PluginError,
    PolicyError,
    RewriteError,
    VerificationError,
)
from attnopt.importance import HeadImportance, head_importance
from attnopt.inspection import Inspection
from attnopt.model import OptimizedModel, load
from attnopt.optimizing import inspect, optimize
from attnopt.policy import Policy
from attnopt.refusal import Refusal
from attnopt.report import Report
from attnopt.rewriting import Backend, HeadWeights, Pass, Rewrite
from attnopt.site import NearMiss, Projection, Site
from attnopt.spec import AttentionSpec
from attnopt.version import __version__

__all__ = [
    "Advice",
    "ArchiveError",
    "AttentionSpec",
    "AttnoptError",
    "AttnoptWarning",
    "Backend",
    "Calibration",
    "CalibrationError",
    "CaptureError",
    "ConversionError",
    "DynamicBlocks",
    "ExportError",
    "HeadImportance",
    "HeadWeights",
    "Inspection",
    "NearMiss",
    "OptimizedModel",
    "Pass",
    "PluginError",
    "Policy",
    "PolicyError",
    "Projection",
    "Refusal",
    "Report",
    "Rewrite",
    "RewriteError",
    "Site",
    "VerificationError",
    "__version__",
    "advise",
    "apply_patterns",
    "convert",
    "head_importance",
    "inspect",
    "kept_mass",
    "load",
    "optimize",
    "passes",
    "patterns",
    "plot",
    "recipes",
]
