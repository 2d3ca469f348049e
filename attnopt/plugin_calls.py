"""Calls of what a third party wrote: whatever goes wrong is an error that names the plugin, where it comes from, and the site."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import AttnoptError, PluginError
from attnopt.graph import hint
from attnopt.head_edits import HeadEdit
from attnopt.refusal import Refusal
from attnopt.registry import OURS, distribution_of, target_of
from attnopt.rewriting import Backend, Pass, Rewrite
from attnopt.site import Site
from attnopt.spec import AttentionSpec
from attnopt.spec_rules import broken_rules


def check(p: Pass, site: Site) -> Refusal | None:
    """The pass's answer.  Raises PluginError."""
    _require_name(p, "pass", site)
    if not is_dataclass(p):
        raise _fault(p, "pass", "its class is no dataclass, whose fields are the options", site.name)
    with _blamed(p, "pass", "check", site.name):
        return _refusal(p.check(site))


def rewrite(p: Pass, site: Site) -> Rewrite:
    """What the pass makes of the site, which keeps every rule.  Raises PluginError."""
    with _blamed(p, "pass", "rewrite", site.name):
        made = p.rewrite(site)
    if not isinstance(made, Rewrite) or not isinstance(made.spec, AttentionSpec):
        got = f"a Rewrite of {type(made.spec).__name__}" if isinstance(made, Rewrite) else type(made).__name__
        raise _fault(p, "pass", f"rewrite gave {got}, expected a Rewrite of an AttentionSpec", site.name)
    if (broken := next(broken_rules(site, made), None)) is not None:
        raise _fault(p, "pass", broken, site.name)
    return made


def accepts(backend: Backend, site: Site) -> Refusal | None:
    """The backend's answer for the site's spec.  Raises PluginError."""
    _require_name(backend, "backend", site)
    with _blamed(backend, "backend", "check", site.name):
        return _refusal(backend.check(site.spec))


def cost(backend: Backend, site: Site) -> float:
    """Seconds.  Raises PluginError."""
    with _blamed(backend, "backend", "cost", site.name):
        seconds = backend.cost(site)
    if not isinstance(seconds, (int, float)) or math.isnan(seconds):
        raise _fault(backend, "backend", f"cost gave {seconds!r}, expected seconds", site.name)
    return seconds


def notes(backend: Backend, site: Site) -> tuple[str, ...]:
    """Of the site's spec.  Raises PluginError."""
    with _blamed(backend, "backend", "notes", site.name):
        return tuple(map(str, backend.notes(site.spec)))


def lower(backend: Backend, spec: AttentionSpec) -> Any:
    """``backend.lower(spec)``, whose output is looked at.  Raises PluginError without the site."""
    with _blamed(backend, "backend", "lower"):
        attend = backend.lower(spec)

    def checked(q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Tensor:
        with _blamed(backend, "backend", "the lowered attention"):
            o = attend(q, k, v, **others)
        _check_output(backend, "backend", o, (q.shape[0], spec.num_heads, q.shape[2], v.shape[3]), v.dtype)
        return o

    return checked


def edit(e: HeadEdit, spec: AttentionSpec, o: Tensor, q: Tensor, v: Tensor, constants: Sequence[Tensor]) -> Tensor:
    """``o`` after the edit.  Raises PluginError without the site."""
    with _blamed(e, "head edit", "apply"):
        made = e.apply(spec, o, q, v, constants)
    _check_output(e, "head edit", made, tuple(o.shape), o.dtype)
    return made


def no_answer(site: Site, e: PluginError) -> Refusal:
    """In the place of the answer of a plugin that was only asked, where nothing depends on it."""
    hint = "repair or uninstall the plugin"
    return site.refuse("plugin-failed", expected="an answer of the plugin", found=e.message, hint=hint)


def is_ours(plugin: Any) -> bool:
    return type(plugin).__module__.partition(".")[0] == OURS


def told(plugin: Any, kind: str) -> str:
    """Whose fault it is: "pass 'acme.last-k' of acme-attnopt (acme_attnopt:LastK)"."""
    cls = type(plugin)
    name = next((n for n in (getattr(plugin, "name", None), getattr(plugin, "kind", None)) if n), cls.__name__)
    distribution = distribution_of(cls)
    return f"{kind} {name!r}{' of ' + distribution if distribution else ''} ({target_of(cls)})"


def _fault(plugin: Any, kind: str, what: str, site: str | None = None) -> PluginError:
    remedy = "report the model" if is_ours(plugin) else f"repair the {kind}"
    return PluginError(
        f"{told(plugin, kind)}: {what}", hint=f"leave the site out of the policy, and {remedy}", site=site
    )


def _check_output(plugin: Any, kind: str, o: Any, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    wanted = list(map(hint, sizes))
    if not isinstance(o, Tensor):
        raise _fault(plugin, kind, f"it gave {type(o).__name__}, expected a tensor {wanted}")
    got = list(map(hint, o.shape))
    if got != wanted or o.dtype != dtype:
        raise _fault(plugin, kind, f"it gave {got} in {o.dtype}, expected {wanted} in {dtype}")


def _require_name(plugin: Any, kind: str, site: Site) -> None:
    if not isinstance(getattr(plugin, "name", None), str):
        raise _fault(plugin, kind, "its class has no name", site.name)


def _refusal(answer: Any) -> Refusal | None:
    if answer is None or isinstance(answer, Refusal):
        return answer
    raise TypeError(f"it gave {answer!r}, expected a Refusal or None")


@contextmanager
def _blamed(plugin: Any, kind: str, method: str, site: str | None = None) -> Iterator[None]:
    """Deliberate errors, and our own faults, stay what they are."""
    try:
        yield
    except AttnoptError:
        raise
    except Exception as e:
        if is_ours(plugin):
            raise
        raise _fault(plugin, kind, f"{method} failed: {type(e).__name__}: {e}", site) from e
