"""A whole plugin for attnopt: an example of each kind."""

from acme_attnopt.clipped import Clip, Clipped
from acme_attnopt.diagonal import Diagonal
from acme_attnopt.every import Every
from acme_attnopt.flips import Flips
from acme_attnopt.key_alike import KeyAlike
from acme_attnopt.key_norm import KeyNorm
from acme_attnopt.l1 import L1
from acme_attnopt.last_k import LastK
from acme_attnopt.median import Median
from acme_attnopt.neighbours import Neighbours
from acme_attnopt.peak import Peak
from acme_attnopt.plain import Plain
from acme_attnopt.rescale import Rescale
from acme_attnopt.strided import Strided
from acme_attnopt.usual_key import UsualKey

__all__ = [
    "L1", "Clip", "Clipped", "Diagonal", "Every", "Flips", "KeyAlike", "KeyNorm", "LastK", "Median", "Neighbours", "Peak",
    "Plain", "Rescale", "Strided", "UsualKey",
]  # fmt: skip
