"""Attentions chosen by what they are, in the place of a glob over their names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from keyword import iskeyword
from typing import Any

from attnopt.base.bound import Bound
from attnopt.base.notation import distinct
from attnopt.base.options import switch, whole
from attnopt.compiler.chosen_sites import LISTED, matches, site_globs
from attnopt.compiler.layer_order import LayerOrder
from attnopt.errors import PolicyError
from attnopt.fit.importance_methods import IMPORTANCE, importance
from attnopt.ir.importance import ModelImportance
from attnopt.ir.site import Site
from attnopt.patterns import Causal, Full

Bounds = tuple[tuple[str, Bound], ...]  # of statistics, by their texts
Scores = Mapping[str, Mapping[str, Sequence[float]]]  # statistic -> site -> one number for each head, where it applies
Heads = tuple[int, ...] | None  # by their numbers in the trained model; None: all

_SWITCHES: dict[str, Callable[[Site], bool]] = {
    "causal": lambda site: site.spec.is_causal,
    "is_cross": lambda site: site.is_cross,
    "bias": lambda site: site.spec.has_bias,
    "window": lambda site: site.spec.visible_pattern not in (Full(), Causal()),
    "sinks": lambda site: site.spec.has_sinks,
}
_SIZES: dict[str, Callable[[Site], int]] = {
    "heads": lambda site: site.num_heads,
    "kv_heads": lambda site: site.num_kv_heads,
    "head_dim": lambda site: site.head_dim,
    "value_dim": lambda site: site.value_dim,
    "queries": lambda site: site.q_len,
    "keys": lambda site: site.kv_len,
}


@dataclass(frozen=True)
class Where:
    """The key of a rule, made by ``attnopt.where``: every condition has to be met."""

    names: tuple[str, ...] = ()
    switches: tuple[tuple[str, bool], ...] = ()
    sizes: Bounds = ()
    layers: LayerOrder | None = None
    statistics: Bounds = ()
    of_heads: Bounds = ()
    count: int | None = None

    def heads(self, statistics: Mapping[str, Any] | None = None, **named: Any) -> Where:
        """Of each of these attentions only the heads that meet these bounds, as ``heads=`` of every pass of the rule.

        An attention without any such head does not match.  The ``heads=`` that a pass has limit them further; a pass without this
        option is an error.
        """
        bounds = _bounds("where.heads", statistics, named)
        if not bounds or self.of_heads:
            raise PolicyError("where: heads needs statistics, once", hint='write .heads(distance="<3", entropy=">0.5")')
        return replace(self, of_heads=bounds)

    def expect(self, count: int) -> Where:
        """The same; a model in which another number of attentions match is a PolicyError that lists them."""
        return replace(self, count=whole("where", "expect", count))

    @property
    def measures(self) -> tuple[str, ...]:
        """The statistics that have to be known."""
        return tuple(dict.fromkeys(name for name, _ in (*self.statistics, *self.of_heads)))

    def among(self, sites: Sequence[Site], scores: Scores) -> dict[str, Heads]:
        """Those of ``sites``, in the order in which they run, that match, by name, with their heads.

        Raises PolicyError if none does, or another number than expected.
        """
        why = {site.name: next(self._unmet(site, scores), "") for site in sites}
        met = [site for site in sites if not why[site.name]]
        places = range(len(met)) if self.layers is None else self.layers.places(str(self), len(met))
        chosen: dict[str, Heads] = {}
        for place, site in enumerate(met):
            heads = self._heads_of(site, scores)
            if place not in places:
                why[site.name] = f"is outside of layers={self.layers}"
            elif heads == ():
                why[site.name] = f"has no head with {_listed(self.of_heads)}"
            else:
                chosen[site.name] = heads
        self._check(chosen, {name: unmet for name, unmet in why.items() if unmet}, len(sites))
        return chosen

    def _unmet(self, site: Site, scores: Scores) -> Iterator[str]:
        """The conditions that ``site`` does not meet."""
        if self.names and not any(matches(glob, site.name) for glob in self.names):
            yield "has another name"
        for name, wanted in self.switches:
            if _SWITCHES[name](site) != wanted:
                yield f"has {name}={not wanted}"
        for name, bound in self.sizes:
            if (size := _SIZES[name](site)) not in bound:
                yield f"has {name}={size}"
        for name, bound in self.statistics:
            own = scores[name].get(site.name)
            if own is None:
                yield f"has no {name}"
            elif (mean := sum(own) / len(own)) not in bound:
                yield f"has {name}={mean:.3g}"

    def _heads_of(self, site: Site, scores: Scores) -> Heads:
        if not self.of_heads:
            return None
        rows = [(scores[name].get(site.name), bound) for name, bound in self.of_heads]
        return tuple(
            head
            for place, head in enumerate(site.spec.heads)
            if all(own is not None and own[place] in bound for own, bound in rows)
        )

    def _check(self, chosen: Mapping[str, Heads], unmet: Mapping[str, str], sites: int) -> None:
        if len(chosen) == self.count or (self.count is None and (chosen or not sites)):
            return
        found = f"matches {len(chosen)} of {sites} attentions"
        what = found if self.count is None else f"{found}, expected {self.count}"
        told = ": " + ", ".join(map(repr, chosen)) if chosen else ""
        others = [f"{name!r} {why}" for name, why in unmet.items()]
        hint = "; ".join(others[:LISTED]) + ("; ..." if len(others) > LISTED else "")
        raise PolicyError(f"{self} {what}{told}", hint=hint or "attnopt.inspect shows what was found in the model")

    def __str__(self) -> str:
        """As texts and files have it."""
        name = () if not self.names else (("name", self.names[0] if len(self.names) == 1 else list(self.names)),)
        layers = () if self.layers is None else (("layers", self.layers),)
        plain = ", ".join(f"{n}={x!r}" for n, x in (*name, *self.switches, *self.sizes, *layers))
        heads = f".heads({_listed(self.of_heads)})" if self.of_heads else ""
        expected = "" if self.count is None else f".expect({self.count})"
        return f"where({', '.join(filter(None, (plain, _listed(self.statistics))))}){heads}{expected}"

    __repr__ = __str__


def where(
    *,
    name: str | Sequence[str] | None = None,
    causal: bool | None = None,
    is_cross: bool | None = None,
    bias: bool | None = None,
    window: bool | None = None,
    sinks: bool | None = None,
    heads: Any = None,
    kv_heads: Any = None,
    head_dim: Any = None,
    value_dim: Any = None,
    queries: Any = None,
    keys: Any = None,
    layers: Any = None,
    statistics: Mapping[str, Any] | None = None,
    **named: Any,
) -> Where:
    """The key of a rule of a policy: the attentions that meet all of these conditions, and do so in the original model.

    ``name``: a glob or several.  ``causal``, ``is_cross``: True or False, as are ``bias`` and ``sinks``, whether it has these,
    and ``window``, whether a query sees fewer keys than all, or than all before it.
    ``heads``, ``kv_heads``, ``head_dim``, ``value_dim``, and in the example ``queries``, ``keys``: a number, as ``12``,
    ``">8"``, ``">=8"``, ``"<8"``, ``"<=8"``, or ``(4, 8)`` for from 4 to 8.
    ``layers``: places in the order in which they run, among those that meet the other conditions: 2, ``[0, -1]``,
    ``slice(2, -2)`` or ``"2:-2"``.
    Every other name is a method of ``head_importance``, such as ``distance="<8"``, whose mean over the heads has this bound;
    with options, it is written ``statistics={"distance(prefix=1)": "<8"}``.  Most need calibration data.  An attention to
    which the method does not apply does not match.

    ``where(...).heads(distance="<8")`` chooses heads, ``where(...).expect(12)`` asserts the number of attentions.
    A second rule is an "or", and a rule with ``[]`` after it a "not": the last matching rule counts.  Raises PolicyError.
    """
    switches = {"causal": causal, "is_cross": is_cross, "bias": bias, "window": window, "sinks": sinks}
    sizes = {
        "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim, "queries": queries, "keys": keys,
    }  # fmt: skip
    return Where(
        () if name is None else site_globs("where", name, "name"),
        tuple((n, switch("where", n, wanted)) for n, wanted in switches.items() if wanted is not None),
        tuple((n, Bound.of("where", n, wanted)) for n, wanted in sizes.items() if wanted is not None),
        None if layers is None else LayerOrder.of("where", layers),
        _bounds("where", statistics, named),
    )


_OPTIONS = {*_SWITCHES, *_SIZES, "name", "layers", "statistics"}


def _bounds(owner: str, statistics: Mapping[str, Any] | None, named: Mapping[str, Any]) -> Bounds:
    """By the canonical texts of the statistics, in the order of these."""
    if not isinstance(statistics, Mapping | None):
        raise PolicyError(f"{owner}: invalid value statistics={statistics!r}: expected bounds by names of methods")
    given = [*(statistics or {}).items(), *named.items()]
    read = distinct([(_statistic(owner, name), Bound.of(owner, str(name), bound)) for name, bound in given])
    return tuple(sorted(read.items(), key=lambda item: item[0]))


def _statistic(owner: str, name: object) -> str:
    if not isinstance(name, str):
        raise PolicyError(f"{owner}: {name!r} is not the name of a method of attnopt.head_importance")
    listed = [*IMPORTANCE.listed()]
    full = next((known for known in listed if known.replace("-", "_") == name), name)
    if full not in listed and "(" not in full:
        known = [*_OPTIONS, *(n.replace("-", "_") for n in listed)]
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise PolicyError(f"{owner}: unknown condition {name!r}", hint=hint)
    how = importance(owner, "statistics", full)
    if isinstance(how, ModelImportance) and (how.needs_loss or how.more):
        raise PolicyError(f"{owner}: {how.name!r} needs more than calibration data", hint="use attnopt.head_importance")
    return how.to_json()


def _listed(bounds: Bounds) -> str:
    named = {n.replace("-", "_"): bound for n, bound in bounds}
    plain = {n: bound for n, bound in named.items() if n.isidentifier() and not iskeyword(n) and n not in _OPTIONS}
    others = {n: bound for n, bound in bounds if n.replace("-", "_") not in plain}
    return ", ".join([*(f"{n}={b!r}" for n, b in plain.items()), *([f"statistics={others!r}"] if others else [])])
