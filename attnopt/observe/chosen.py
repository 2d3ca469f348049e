"""What is asked for of which queries and keys, checked against those that there are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from attnopt.base.options import choice, positions
from attnopt.errors import PolicyError

KINDS = ("q", "k", "v", "scores", "weights", "lse", "outputs", "contribution", "input")
OF_QUERIES = ("q", "scores", "weights", "lse", "outputs", "contribution", "input")
OF_KEYS = ("k", "v", "scores", "weights")
REDUCTIONS = ("mean", "sum", "column-mean")


def kinds(owner: str, what: object) -> tuple[str, ...]:
    """One kind or several, each once, in the order in which they are asked for.  Raises PolicyError."""
    listed = [what] if isinstance(what, str) else list(what) if isinstance(what, Iterable) else [what]
    if not listed:
        raise PolicyError(f"{owner}: what is empty", hint=f"name one or several of {', '.join(map(repr, KINDS))}")
    return tuple(dict.fromkeys(choice(owner, "what", kind, KINDS) for kind in listed))


def numbers_of(owner: str, option: str, values: object) -> tuple[int, ...] | None:
    """Token positions, in the given order; below 0 they count from the end.  None: all.  Raises PolicyError."""
    if values is None:
        return None
    listed = values.tolist() if isinstance(values, Tensor) else values
    positions(owner, option, listed)  # what they have to be
    found = (listed,) if isinstance(listed, int) else tuple(listed)  # type: ignore[arg-type]
    if not found:
        raise PolicyError(f"{owner}: {option} is empty", hint="omit it for all of them")
    return found


def at(owner: str, option: str, wanted: tuple[int, ...], length: int, site: str, device: torch.device) -> Tensor:
    """These positions as indices into ``length`` tokens.  Raises PolicyError."""
    outside = [i for i in wanted if not -length <= i < length]
    if outside:
        kind = "queries" if option == "rows" else "keys"
        raise PolicyError(
            f"{owner}: {option} {', '.join(map(str, outside))} out of range: {site or '(root)'} has {length} {kind}",
            hint=f"choose positions from {-length} to {length - 1}, or only sites and batches that are long enough",
        )
    return torch.tensor([i % length for i in wanted], device=device)
