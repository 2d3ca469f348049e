"""Which keys each query sees, and what is added to the scores, whether a pattern, a mask or a bias says so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.audit.trace import Attended
from attnopt.ir.operands import HIDING
from attnopt.ir.semantics import visible


@dataclass(frozen=True)
class Seen:
    """``hidden`` bool, ``added`` float32 with 0 where hidden, both [B|1, H|1, L, S]; ``defined`` bool, [B|1, H|1, L, 1]: the
    query sees a key at all; the output of others is a matter of how a mask is spelled."""

    hidden: Tensor
    added: Tensor
    defined: Tensor

    @classmethod
    def of(cls, x: Attended) -> Seen:
        t = x.operands
        shape = (1, 1, t.q.shape[2], t.k.shape[2])
        bias = torch.zeros(shape) if t.bias is None else (t.bias.float() + torch.zeros(shape))
        top = bias.amax(-1, keepdim=True)
        hidden = (bias < HIDING) | (bias - top < HIDING)
        seen = visible(x.spec, t.q, t.k, t.mask)
        if seen is not None:
            hidden = hidden | ~seen
        added = torch.where(hidden, 0.0, bias.expand(hidden.shape))
        return cls(hidden, added, ~hidden.all(-1, keepdim=True))


@dataclass(frozen=True)
class Apart:
    """``dropped``: what the model hides and the file does not; ``more``: what the file hides beside; ``added``: the largest
    difference of what is added, up to one number for each query; ``largest`` of what either adds."""

    dropped: Tensor
    more: Tensor
    added: float
    largest: float

    @classmethod
    def of(cls, model: Seen, file: Seen) -> Apart:
        dropped = model.hidden & ~file.hidden & model.defined
        more = file.hidden & ~model.hidden & model.defined
        both = ~(model.hidden | file.hidden) & model.defined
        first, second = _centred(model.added, both), _centred(file.added, both)
        largest = max(float(first.abs().max()), float(second.abs().max()), 1.0)
        return cls(dropped, more, float((first - second).abs().max()), largest)


def _centred(x: Tensor, seen: Tensor) -> Tensor:
    """Less the mean over the keys that are seen: a softmax does not see what is the same for all."""
    own = torch.where(seen, x.expand(seen.shape), 0.0)
    return torch.where(seen, own - own.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1), 0.0)


def ahead(pairs: Tensor, positions: Tensor | None = None) -> tuple[bool, bool]:
    """Whether some of the pairs [..., L, S] are of a query and a later key, and whether some are not.  ``positions`` of the
    queries: by default the last is at the last key."""
    L, S = pairs.shape[-2:]
    at = torch.arange(L) + (S - L) if positions is None else positions
    later = torch.arange(S)[None, :] > at[:, None]
    return bool((pairs & later).any()), bool((pairs & ~later).any())
