"""attnopt: a compiler for attention.

found = attnopt.inspect(model, args, kwargs)              # every attention, however it is written
fast = attnopt.optimize(model, policy, args, kwargs)      # rewritten, verified, on fused operators
fast.report; fast.save("dir"); attnopt.load("dir"); fast.export_onnx("m.onnx")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from attnopt import render as render
from attnopt.backends import attention_operator as attention_operator
from attnopt.ir import received_weights as received_weights

if TYPE_CHECKING:
    from attnopt import distributed, passes, patterns, plot, recipes, statistics, training
    from attnopt.advice import advise
    from attnopt.api import guidance, inspect, optimize
    from attnopt.audit.diff import diff
    from attnopt.base.input import Input
    from attnopt.base.intervals import Reach
    from attnopt.capture.calibration import Calibration
    from attnopt.compiler.calibration_distance import calibration_distance
    from attnopt.compiler.head_results import HeadImportance, HeadProfile, HeadSet
    from attnopt.compiler.importance import greedy_heads, head_importance, head_profile
    from attnopt.compiler.plugins import register
    from attnopt.compiler.policy import Policy
    from attnopt.compiler.where import where
    from attnopt.conversion.convert import apply_patterns, convert
    from attnopt.conversion.layer_heads import load_pretrained
    from attnopt.errors import (
        ArchiveError,
        AttnoptError,
        AttnoptWarning,
        CalibrationError,
        CaptureError,
        ConversionError,
        DistributedError,
        ExportError,
        PluginError,
        PolicyError,
        RewriteError,
        SearchError,
        VerificationError,
    )
    from attnopt.fit.attention_recall import kept_mass
    from attnopt.intervene.fit_path_gains import fit_path_gains
    from attnopt.intervene.guard import Behaviour, Kept, guard
    from attnopt.intervene.patch import patch
    from attnopt.intervene.path_gain import path_gain
    from attnopt.intervene.path_patch import path_patch
    from attnopt.intervene.search import search_heads
    from attnopt.ir.activations import Activations
    from attnopt.ir.alternatives import Choice, FirstOf
    from attnopt.ir.attend import Attend
    from attnopt.ir.block_scores import BlockSample, BlockScores
    from attnopt.ir.compensation import Compensation
    from attnopt.ir.constant import Constant
    from attnopt.ir.curves import Curves
    from attnopt.ir.dynamic_blocks import DynamicBlocks
    from attnopt.ir.head_edits import HeadEdit, HeadMap
    from attnopt.ir.head_probe import HeadProbe
    from attnopt.ir.head_weights import HeadWeights
    from attnopt.ir.importance import AblationImportance, Importance, ModelImportance
    from attnopt.ir.interfaces import Backend, Pass, Rewrite
    from attnopt.ir.kv_merge import KvMerge
    from attnopt.ir.kv_partition import KvPartition
    from attnopt.ir.linear_mixer import LinearMixer
    from attnopt.ir.mixer import Mixer, Pairs, Tokens
    from attnopt.ir.pooled_keys import PooledKeys
    from attnopt.ir.projection import Projection
    from attnopt.ir.query_rows import ChosenRows
    from attnopt.ir.refusal import Refusal
    from attnopt.ir.row_scores import RowScores
    from attnopt.ir.site import NearMiss, Site
    from attnopt.ir.spec import AttentionSpec
    from attnopt.ir.statistic import Statistic
    from attnopt.model import OptimizedModel, load
    from attnopt.observe.atlas import atlas
    from attnopt.observe.attribution import logit_attribution
    from attnopt.observe.collect import collect
    from attnopt.observe.expose import Columns, Exposed, Outputs, Rows, expose
    from attnopt.patterns.algebra import Pattern
    from attnopt.patterns.bands import Band
    from attnopt.patterns.lookback import Past
    from attnopt.policy_search.budget import Budget
    from attnopt.policy_search.result import FrontPoint, Search
    from attnopt.policy_search.search import Progress, search
    from attnopt.report.advice import Advice
    from attnopt.report.atlas import Atlas, HeadMaps
    from attnopt.report.attribution import Attribution
    from attnopt.report.audit import Audit
    from attnopt.report.collected import Collected
    from attnopt.report.head_effects import HeadEffects
    from attnopt.report.head_search import HeadSearch
    from attnopt.report.inspection import Inspection
    from attnopt.report.path_gains import PathGains
    from attnopt.report.policy_search import SearchReport
    from attnopt.report.report import Report
    from attnopt.training.distillation import distill
    from attnopt.version import __version__

__all__ = [
    "AblationImportance",
    "Activations",
    "Advice",
    "ArchiveError",
    "Atlas",
    "Attend",
    "AttentionSpec",
    "AttnoptError",
    "AttnoptWarning",
    "Attribution",
    "Audit",
    "Backend",
    "Band",
    "Behaviour",
    "BlockSample",
    "BlockScores",
    "Budget",
    "Calibration",
    "CalibrationError",
    "CaptureError",
    "Choice",
    "ChosenRows",
    "Collected",
    "Columns",
    "Compensation",
    "Constant",
    "ConversionError",
    "Curves",
    "DistributedError",
    "DynamicBlocks",
    "ExportError",
    "Exposed",
    "FirstOf",
    "FrontPoint",
    "HeadEdit",
    "HeadEffects",
    "HeadImportance",
    "HeadMap",
    "HeadMaps",
    "HeadProbe",
    "HeadProfile",
    "HeadSearch",
    "HeadSet",
    "HeadWeights",
    "Importance",
    "Input",
    "Inspection",
    "Kept",
    "KvMerge",
    "KvPartition",
    "LinearMixer",
    "Mixer",
    "ModelImportance",
    "NearMiss",
    "OptimizedModel",
    "Outputs",
    "Pairs",
    "Pass",
    "Past",
    "PathGains",
    "Pattern",
    "PluginError",
    "Policy",
    "PolicyError",
    "PooledKeys",
    "Progress",
    "Projection",
    "Reach",
    "Refusal",
    "Report",
    "Rewrite",
    "RewriteError",
    "RowScores",
    "Rows",
    "Search",
    "SearchError",
    "SearchReport",
    "Site",
    "Statistic",
    "Tokens",
    "VerificationError",
    "__version__",
    "advise",
    "apply_patterns",
    "atlas",
    "calibration_distance",
    "collect",
    "convert",
    "diff",
    "distill",
    "distributed",
    "expose",
    "fit_path_gains",
    "greedy_heads",
    "guard",
    "guidance",
    "head_importance",
    "head_profile",
    "inspect",
    "kept_mass",
    "load",
    "load_pretrained",
    "logit_attribution",
    "optimize",
    "passes",
    "patch",
    "path_gain",
    "path_patch",
    "patterns",
    "plot",
    "recipes",
    "register",
    "search",
    "search_heads",
    "statistics",
    "training",
    "where",
]

_NAMES = {
    "advice": "advise",
    "api": "guidance inspect optimize",
    "audit.diff": "diff",
    "base.input": "Input",
    "base.intervals": "Reach",
    "capture.calibration": "Calibration",
    "compiler.calibration_distance": "calibration_distance",
    "compiler.head_results": "HeadImportance HeadProfile HeadSet",
    "compiler.importance": "greedy_heads head_importance head_profile",
    "compiler.plugins": "register",
    "compiler.policy": "Policy",
    "compiler.where": "where",
    "conversion.convert": "apply_patterns convert",
    "conversion.layer_heads": "load_pretrained",
    "errors": "ArchiveError AttnoptError AttnoptWarning CalibrationError CaptureError "
    "ConversionError DistributedError ExportError PluginError PolicyError RewriteError SearchError VerificationError",
    "fit.attention_recall": "kept_mass",
    "intervene.fit_path_gains": "fit_path_gains",
    "intervene.guard": "Behaviour Kept guard",
    "intervene.patch": "patch",
    "intervene.path_gain": "path_gain",
    "intervene.path_patch": "path_patch",
    "intervene.search": "search_heads",
    "ir.activations": "Activations",
    "ir.alternatives": "Choice FirstOf",
    "ir.attend": "Attend",
    "ir.block_scores": "BlockSample BlockScores",
    "ir.compensation": "Compensation",
    "ir.constant": "Constant",
    "ir.curves": "Curves",
    "ir.dynamic_blocks": "DynamicBlocks",
    "ir.head_edits": "HeadEdit HeadMap",
    "ir.head_weights": "HeadWeights",
    "ir.head_probe": "HeadProbe",
    "ir.importance": "AblationImportance Importance ModelImportance",
    "ir.interfaces": "Backend Pass Rewrite",
    "ir.kv_merge": "KvMerge",
    "ir.kv_partition": "KvPartition",
    "ir.linear_mixer": "LinearMixer",
    "ir.mixer": "Mixer Pairs Tokens",
    "ir.pooled_keys": "PooledKeys",
    "ir.projection": "Projection",
    "ir.query_rows": "ChosenRows",
    "ir.refusal": "Refusal",
    "ir.row_scores": "RowScores",
    "ir.site": "NearMiss Site",
    "ir.spec": "AttentionSpec",
    "ir.statistic": "Statistic",
    "model": "OptimizedModel load",
    "observe.atlas": "atlas",
    "observe.attribution": "logit_attribution",
    "observe.collect": "collect",
    "observe.expose": "Columns Exposed Outputs Rows expose",
    "patterns.algebra": "Pattern",
    "patterns.bands": "Band",
    "patterns.lookback": "Past",
    "policy_search.budget": "Budget",
    "policy_search.result": "FrontPoint Search",
    "policy_search.search": "Progress search",
    "report.advice": "Advice",
    "report.atlas": "Atlas HeadMaps",
    "report.attribution": "Attribution",
    "report.audit": "Audit",
    "report.collected": "Collected",
    "report.head_effects": "HeadEffects",
    "report.head_search": "HeadSearch",
    "report.inspection": "Inspection",
    "report.policy_search": "SearchReport",
    "report.path_gains": "PathGains",
    "report.report": "Report",
    "training.distillation": "distill",
    "version": "__version__",
}  # module -> its public names
_MODULE_OF = {name: f"attnopt.{module}" for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Imported on first access (PEP 562), so ``import attnopt`` itself is cheap."""
    if name in _MODULE_OF:
        found: object = getattr(import_module(_MODULE_OF[name]), name)
    elif name in __all__:
        found = import_module(f"attnopt.{name}")
    else:
        raise AttributeError(f"module 'attnopt' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
