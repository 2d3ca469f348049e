"""What heads do: methods of ``attnopt.head_importance`` and ``attnopt.head_profile`` with options."""

from __future__ import annotations

from attnopt.statistics.ablation import Ablation, Ships
from attnopt.statistics.counterfactual import Counterfactual
from attnopt.statistics.distance import Distance, Locality
from attnopt.statistics.entropy import Entropy
from attnopt.statistics.gradients import Fisher, Taylor
from attnopt.statistics.induction import Induction
from attnopt.statistics.key_mass import SinkMass
from attnopt.statistics.massive import MassiveFeatures
from attnopt.statistics.max_logit import MaxLogit
from attnopt.statistics.norms import KeyNorm, QueryNorm
from attnopt.statistics.rank import OvRank, QkRank
from attnopt.statistics.retrieval import Retrieval, needle_task
from attnopt.statistics.sahara import Sahara
from attnopt.statistics.segment_mass import SegmentMass
from attnopt.statistics.unique_codes import UniqueCodes

__all__ = [
    "Ablation",
    "Counterfactual",
    "Distance",
    "Entropy",
    "Fisher",
    "Induction",
    "KeyNorm",
    "Locality",
    "MassiveFeatures",
    "MaxLogit",
    "OvRank",
    "QkRank",
    "QueryNorm",
    "Retrieval",
    "Sahara",
    "SegmentMass",
    "Ships",
    "SinkMass",
    "Taylor",
    "UniqueCodes",
    "needle_task",
]
