"""attnopt: a compiler for attention.

found = attnopt.inspect(model, args, kwargs)              # every attention, whoever wrote it
fast = attnopt.optimize(model, policy, args, kwargs)      # rewritten, verified, on fused operators
fast.report; fast.save("dir"); attnopt.load("dir"); fast.export_onnx("m.onnx")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnopt import attention_operator as attention_operator

if TYPE_CHECKING:
    from attnopt import passes, patterns, plot, recipes
    from attnopt.advising import Advice, advise
    from attnopt.attention_mass import kept_mass
    from attnopt.bands import Band
    from attnopt.block_scores import BlockScores
    from attnopt.calibration import Calibration
    from attnopt.constant import Constant
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
    from attnopt.head_edits import HeadEdit
    from attnopt.importance import HeadImportance, head_importance
    from attnopt.inspection import Inspection
    from attnopt.model import OptimizedModel, load
    from attnopt.optimizing import inspect, optimize
    from attnopt.past import Past
    from attnopt.pattern import Pattern
    from attnopt.plugins import register
    from attnopt.policy import Policy
    from attnopt.ranges import Reach
    from attnopt.refusal import Refusal
    from attnopt.report import Report
    from attnopt.rewriting import Attend, Backend, HeadWeights, Pass, Rewrite
    from attnopt.site import NearMiss, Projection, Site
    from attnopt.spec import AttentionSpec
    from attnopt.version import __version__

__all__ = [
    "Advice",
    "ArchiveError",
    "Attend",
    "AttentionSpec",
    "AttnoptError",
    "AttnoptWarning",
    "Backend",
    "Band",
    "BlockScores",
    "Calibration",
    "CalibrationError",
    "CaptureError",
    "Constant",
    "ConversionError",
    "DynamicBlocks",
    "ExportError",
    "HeadEdit",
    "HeadImportance",
    "HeadWeights",
    "Inspection",
    "NearMiss",
    "OptimizedModel",
    "Pass",
    "Past",
    "Pattern",
    "PluginError",
    "Policy",
    "PolicyError",
    "Projection",
    "Reach",
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
    "register",
]

_NAMES = {
    "attnopt.advising": (
        "Advice",
        "advise",
    ),
    "attnopt.attention_mass": ("kept_mass",),
    "attnopt.bands": ("Band",),
    "attnopt.block_scores": ("BlockScores",),
    "attnopt.calibration": ("Calibration",),
    "attnopt.constant": ("Constant",),
    "attnopt.converting": (
        "apply_patterns",
        "convert",
    ),
    "attnopt.dynamic_blocks": ("DynamicBlocks",),
    "attnopt.errors": (
        "ArchiveError",
        "AttnoptError",
        "AttnoptWarning",
        "CalibrationError",
        "CaptureError",
        "ConversionError",
        "ExportError",
        "PluginError",
        "PolicyError",
        "RewriteError",
        "VerificationError",
    ),
    "attnopt.head_edits": ("HeadEdit",),
    "attnopt.importance": (
        "HeadImportance",
        "head_importance",
    ),
    "attnopt.inspection": ("Inspection",),
    "attnopt.model": (
        "OptimizedModel",
        "load",
    ),
    "attnopt.optimizing": (
        "inspect",
        "optimize",
    ),
    "attnopt.past": ("Past",),
    "attnopt.pattern": ("Pattern",),
    "attnopt.plugins": ("register",),
    "attnopt.policy": ("Policy",),
    "attnopt.ranges": ("Reach",),
    "attnopt.refusal": ("Refusal",),
    "attnopt.report": ("Report",),
    "attnopt.rewriting": (
        "Attend",
        "Backend",
        "HeadWeights",
        "Pass",
        "Rewrite",
    ),
    "attnopt.site": (
        "NearMiss",
        "Projection",
        "Site",
    ),
    "attnopt.spec": ("AttentionSpec",),
    "attnopt.version": ("__version__",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imported when first asked for (PEP 562), so that ``import attnopt`` itself costs nothing."""
    if name in _MODULE_OF:
        found: Any = getattr(import_module(_MODULE_OF[name]), name)
    elif name in __all__:
        found = import_module(f"attnopt.{name}")
    else:
        raise AttributeError(f"module 'attnopt' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
