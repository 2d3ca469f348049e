"""A whole plugin for attnopt: a pass, a backend, a pattern, a head edit, a block score, an importance method, a KV merge."""

from acme_attnopt.clipped import Clip, Clipped
from acme_attnopt.every import Every
from acme_attnopt.key_norm import KeyNorm
from acme_attnopt.l1 import L1
from acme_attnopt.last_k import LastK
from acme_attnopt.median import Median
from acme_attnopt.plain import Plain

__all__ = ["L1", "Clip", "Clipped", "Every", "KeyNorm", "LastK", "Median", "Plain"]
