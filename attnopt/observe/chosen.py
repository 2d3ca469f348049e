"""Which attentions, heads, queries and keys are asked for, checked against those that there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from attnopt.base.options import choice, positions, wholes
from attnopt.errors import PolicyError
from attnopt.ir.site import Site

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


def globs(owner: str, sites: object) -> tuple[str, ...]:
    """The names or globs of sites, given as text, as sites, or as several of these.  Raises PolicyError."""
    listed = [sites] if isinstance(sites, (str, Site)) else list(sites) if isinstance(sites, Iterable) else [sites]
    named = [x.name if isinstance(x, Site) else x for x in listed]
    if not named or not all(isinstance(name, str) for name in named):
        raise PolicyError(f"{owner}: invalid value sites={sites!r}: expected names of attentions, or globs such as '*'")
    return tuple(str(name) for name in named)


def matches(glob: str, name: str) -> bool:
    """A name matches itself, whatever signs are in it."""
    return glob == name or fnmatchcase(name, glob)


def named(owner: str, wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are wanted, in their order.  Raises PolicyError for a glob that matches none."""
    if not names:
        raise PolicyError(
            f"{owner}: no attention was found in the model",
            hint="attnopt.inspect says why; of an optimized model whose attentions run on kernels, give the original one",
        )
    for glob in wanted:
        if not any(matches(glob, name) for name in names):
            listed = ", ".join(repr(n) for n in names[:6]) + (", ..." if len(names) > 6 else "")
            raise PolicyError(f"{owner}: no attention is named {glob!r}", hint=f"the sites are {listed}")
    return [name for name in names if any(matches(glob, name) for glob in wanted)]


def places_of(owner: str, heads: object, site: Site, numbers: Sequence[int]) -> tuple[int, ...]:
    """The places of these heads among the site's, whose numbers are ``numbers``; None: all.  Raises PolicyError."""
    if heads is None:
        return tuple(range(len(numbers)))
    wanted = wholes(owner, "heads", heads)
    if not wanted:
        raise PolicyError(f"{owner}: heads is empty", hint="omit it for all heads")
    missing = [h for h in wanted if h not in numbers]
    if missing:
        raise PolicyError(
            f"{owner}: there is no head {', '.join(map(str, missing))} in {site.name or '(root)'}",
            hint=f"it has the heads {_listed(numbers)}; choose other heads, or other sites",
        )
    return tuple(numbers.index(h) for h in wanted)


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


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")
