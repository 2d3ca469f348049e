"""Which attentions and heads a caller names, checked against those that there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from attnopt.base.options import wholes
from attnopt.errors import PolicyError
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.match.find import Found

Sites = str | Site | Iterable[str | Site]
LISTED = 6  # names in an error


def site_globs(owner: str, sites: object, option: str = "sites") -> tuple[str, ...]:
    """The names or globs of sites, given as text, as a site, or as several of these.  Raises PolicyError."""
    listed = [sites] if isinstance(sites, (str, Site)) else list(sites) if isinstance(sites, Iterable) else [sites]
    named = [x.name if isinstance(x, Site) else x for x in listed]
    if not named or not all(isinstance(name, str) for name in named):
        raise PolicyError(
            f"{owner}: invalid value {option}={sites!r}: expected names of attentions, or globs such as '*'"
        )
    return tuple(str(name) for name in named)


def matches(glob: str, name: str) -> bool:
    """A name matches itself, whatever signs are in it."""
    return glob == name or fnmatchcase(name, glob)


def site_names(owner: str, globs: Iterable[str], names: Sequence[str]) -> list[str]:
    """Those of ``names`` that are wanted, in their order.  Raises PolicyError for a glob that matches none."""
    wanted = list(globs)
    for glob in wanted:
        if not any(matches(glob, name) for name in names):
            raise no_such_site(owner, glob, names)
    return [name for name in names if any(matches(glob, name) for glob in wanted)]


def between_tokens(owner: str, globs: Iterable[str], found: Sequence[Found]) -> list[Found]:
    """The attentions whose heads have a softmax over tokens of their own.  Raises PolicyError for a glob of others alone."""
    able = [f for f in found if f.site.spec.has_own_maps]
    for glob in globs:
        other = next((f.site for f in found if f not in able and matches(glob, f.site.name)), None)
        if other is not None and not any(matches(glob, f.site.name) for f in able):
            kind = _kind(other.spec)
            raise PolicyError(
                f"{owner}: {other.name!r} {kind}, so that its heads have no softmax over tokens of their own",
                hint="attnopt.inspect shows these attentions; leave them out",
            )
    return able


def _kind(spec: AttentionSpec) -> str:
    if spec.between_channels:
        return "attends between channels"
    if spec.mixes_heads:
        return "has talking heads"
    return "has no softmax" if spec.linear is not None else f"has a {spec.other_weights}"


def no_such_site(owner: str, name: object, names: Sequence[str]) -> PolicyError:
    if not names:
        return PolicyError(
            f"{owner}: no attention was found in the model", hint="attnopt.inspect shows what was rejected, and why"
        )
    near = difflib.get_close_matches(name, names, n=2) if isinstance(name, str) else []
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    else:
        hint = f"the sites are {', '.join(map(repr, names[:LISTED]))}" + (", ..." if len(names) > LISTED else "")
    return PolicyError(f"{owner}: no attention is named {name!r}", hint=hint)


def chosen_places(owner: str, heads: object, site: str, numbers: Sequence[int]) -> tuple[int, ...]:
    """The places of these heads among ``numbers``, those of the site's heads; None: all.  Raises PolicyError."""
    if heads is None:
        return tuple(range(len(numbers)))
    wanted = wholes(owner, "heads", heads)
    if not wanted:
        raise PolicyError(f"{owner}: heads is empty", hint="omit it for all heads")
    missing = [h for h in wanted if h not in numbers]
    if missing:
        listed = ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")
        raise PolicyError(
            f"{owner}: there is no head {', '.join(map(str, missing))} in {site or '(root)'}",
            hint=f"it has the heads {listed}; choose other heads, or other sites",
        )
    return tuple(numbers.index(h) for h in wanted)
