"""A whole plugin for attnopt: a pass, a backend, a pattern, a head edit and a block score."""

from acme_attnopt.clipped import Clip, Clipped
from acme_attnopt.every import Every
from acme_attnopt.key_norm import KeyNorm
from acme_attnopt.last_k import LastK
from acme_attnopt.plain import Plain

__all__ = ["Clip", "Clipped", "Every", "KeyNorm", "LastK", "Plain"]
