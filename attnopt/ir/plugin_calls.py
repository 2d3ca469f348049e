"""Plugin calls: any failure is an error that names the plugin, its distribution and the site."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from attnopt.errors import PluginError
from attnopt.ir.attend import Attend
from attnopt.ir.blame import blamed, check_output, fault
from attnopt.ir.call_tensor import CallTensor
from attnopt.ir.compensation import Compensation
from attnopt.ir.extended_keys import MoreKeys
from attnopt.ir.extension import joined, joined_spec
from attnopt.ir.importance import Importance
from attnopt.ir.interfaces import Backend, Pass, Rewrite
from attnopt.ir.kv_merge import KvMerge
from attnopt.ir.kv_partition import KvPartition
from attnopt.ir.pooling import parts_of, pooled
from attnopt.ir.refusal import Refusal
from attnopt.ir.row_attention import on_chosen_rows, row_parts
from attnopt.ir.semantics import edited, in_segments, masked_by, row_sinks
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.spec_rules import broken_rules

Part = Importance | KvPartition | KvMerge | Compensation


def check(p: Pass, site: Site) -> Refusal | None:
    """The pass's answer.  Raises PluginError."""
    _require_name(p, "pass", site)
    if not is_dataclass(p):
        raise fault(p, "pass", "its class is not a dataclass (its fields are the options)", site.name)
    if site.spec.between_channels and not p.channels:
        return _of_channels(site, f"prune-heads and scale-heads apply; exclude the site from {p.name}")
    if site.spec.mixes_heads and not p.head_maps:
        return _of_talking(site, f"local-window, sparse and scale-heads apply; exclude the site from {p.name}")
    if site.spec.other_weights and not p.linear:
        return _of_other_weights(
            site, f"local-window, sparse, prune-heads and scale-heads apply; exclude the site from {p.name}"
        )
    with blamed(p, "pass", "check", site.name):
        return _refusal(p.check(site))


def check_part(part: Part, kind: str, site: Site) -> Refusal | None:
    """The answer of a part of a pass.  Raises PluginError."""
    hint = "name heads=, or pass importance= with one number per head, without compensation"
    of_weights_alone = isinstance(part, (Importance, Compensation)) and part.channels
    if site.spec.between_channels and not of_weights_alone:
        return _of_channels(site, hint)
    if site.spec.other_weights and not of_weights_alone:
        return _of_other_weights(site, hint)
    if site.spec.mixes_heads:
        return _of_talking(site, "choose heads by other sites")
    with blamed(part, kind, "check", site.name):
        return _refusal(part.check(site))


def _of_talking(site: Site, hint: str = "") -> Refusal:
    found = "talking heads: scores or weights are mapped across them"
    return site.refuse("talking-heads", expected="heads that do not depend on each other", found=found, hint=hint)


def _of_other_weights(site: Site, hint: str = "") -> Refusal:
    expected, found = "a plain softmax over keys", site.spec.other_weights
    if site.spec.linear is None:
        return site.refuse("other-softmax", expected=expected, found=found, hint=hint)
    return site.refuse("no-softmax", expected=expected, found=found, hint=hint)


def _of_channels(site: Site, hint: str) -> Refusal:
    found = "channels of each head, whose features are tokens"
    return site.refuse("between-channels", expected="queries and keys that are tokens", found=found, hint=hint)


def rewrite(p: Pass, site: Site) -> Rewrite:
    """The verified rewrite of the site.  Raises PluginError."""
    with blamed(p, "pass", "rewrite", site.name):
        made = p.rewrite(site)
    if not isinstance(made, Rewrite) or not isinstance(made.spec, AttentionSpec):
        got = f"a Rewrite of {type(made.spec).__name__}" if isinstance(made, Rewrite) else type(made).__name__
        raise fault(p, "pass", f"rewrite returned {got}, expected a Rewrite of an AttentionSpec", site.name)
    if (broken := next(broken_rules(site, made), None)) is not None:
        raise fault(p, "pass", broken, site.name)
    return made


def pruned_before(p: Pass, site: Site) -> tuple[int, ...]:
    """Heads that its options name to be changed and that the site no longer has.  Raises PluginError."""
    with blamed(p, "pass", "edited_heads", site.name):
        return tuple(h for h in p.edited_heads if h not in site.spec.heads)


def skips(backend: Backend, site: Site) -> bool:
    """Whether hidden pairs of the site are not computed.  Raises PluginError."""
    with blamed(backend, "backend", "skips_in", site.name):
        return bool(backend.skips_in(site))


def accepts(backend: Backend, site: Site) -> Refusal | None:
    """The backend's answer for the site's spec.  Raises PluginError."""
    _require_name(backend, "backend", site)
    if site.spec.between_channels and not backend.channels:
        found = "channels, whose features are as many tokens as a call has"
        return site.refuse("between-channels", expected="queries and keys that are tokens", found=found)
    if site.spec.mixes_heads and not backend.head_maps:
        return _of_talking(site)
    spec = site.spec
    takes = (
        spec.linear is None or backend.linear,
        not spec.sends or backend.sends,
        spec.clamp is None or backend.clamps,
    )
    if not all(takes):
        return _of_other_weights(site)
    if site.spec.weight_gains is not None and not backend.weight_gains:
        return site.refuse(
            "no-weight-gains", expected="no gains on attention weights", found=str(site.spec.weight_gains)
        )
    if site.spec.weight_gains is not None and site.spec.weight_gains.segments is not None and not backend.gain_segments:
        return site.refuse(
            "no-weight-gains", expected="gains on known pairs of tokens", found=str(site.spec.weight_gains)
        )
    with blamed(backend, "backend", "check", site.name):
        return next((r for s in asked(backend, site) if (r := _refusal(backend.check(s.spec))) is not None), None)


def cost(backend: Backend, site: Site) -> float:
    """Seconds.  Raises PluginError."""
    with blamed(backend, "backend", "cost", site.name):
        found = [backend.cost(s) for s in asked(backend, site)]
    for seconds in found:
        if not isinstance(seconds, (int, float)) or math.isnan(seconds):
            raise fault(backend, "backend", f"cost returned {seconds!r}, expected seconds", site.name)
    return sum(found)


def notes(backend: Backend, site: Site) -> tuple[str, ...]:
    """Of the site's spec.  Raises PluginError."""
    with blamed(backend, "backend", "notes", site.name):
        told = [str(note) for s in asked(backend, site) for note in backend.notes(s.spec)]
    return (*dict.fromkeys(told), *_of_pools(backend, site.spec), *_of_rows(backend, site.spec))


def asked(backend: Backend, site: Site) -> list[Site]:
    """What the backend computes of ``site``: all of it, or the parts of an attention with pooled keys or chosen rows; with keys
    of other tokens beside its own unless the backend ``extends``."""
    if site.spec.before:
        site = replace(site, spec=site.spec.transplanted)
    if site.spec.segments is not None and not takes_segments(backend, site.spec):
        site = replace(site, spec=site.spec.with_segments_masked)
    if site.spec.zero_keys is not None and not backend.zero_keys:
        site = replace(site, spec=_with_sinks(site.spec))
    if site.spec.rows is not None and not backend.rows:
        return [replace(site, spec=part.spec, q_len=part.q_len(site.q_len)) for part in row_parts(site.spec)]
    if site.spec.extension is not None and not backend.extends:
        more = site.spec.extension.tokens
        site = replace(site, spec=joined_spec(site.spec), kv_len=site.kv_len + more)
    if site.spec.pooling is None or backend.pools:
        return [site]
    return [replace(site, spec=part.spec, kv_len=part.kv_len(site.kv_len)) for part in parts_of(site.spec)]


def _of_pools(backend: Backend, spec: AttentionSpec) -> Iterator[str]:
    """Notes about pooled keys that save no time."""
    if spec.pooling is not None and backend.pools:
        yield f"{backend.name}: pooled keys are computed like all others: no time is saved"
        return
    for part in parts_of(spec):
        if part.is_unreduced:
            which = f"head{'' if part.spec.num_heads == 1 else 's'} {', '.join(map(str, part.spec.heads))}"
            yield f"the pools of {which} are computed key by key under a pattern, bias, mask or gain: no time is saved"


def _of_rows(backend: Backend, spec: AttentionSpec) -> Iterator[str]:
    """A note about rows that are computed in vain."""
    if spec.rows is not None and backend.rows:
        yield f"{backend.name}: rows that are not chosen are computed and dropped: no time is saved"


def lower(backend: Backend, spec: AttentionSpec) -> Attend:
    """``backend.lower(spec)`` with checked output.  Raises PluginError without the site."""
    with blamed(backend, "backend", "lower"):
        attend = backend.lower(spec)

    def checked(q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Tensor:
        with blamed(backend, "backend", "the lowered attention"):
            o = attend(q, k, v, **others)
        check_output(backend, "backend", o, (q.shape[0], spec.num_heads, q.shape[2], v.shape[3]), v.dtype)
        return o

    return checked


def attention_of(
    backend: Backend,
    spec: AttentionSpec,
    tensors: Sequence[Tensor] | None = None,
    more: MoreKeys | None = None,
    pools: Sequence[tuple[Tensor, Tensor]] = (),
) -> Attend:
    """``spec`` including its map, ``spec.before`` and ``spec.after``, computed by ``backend``.

    ``tensors``: ``spec.tensors`` as a graph stores them and as a call brings them; None: the constants, created at each call,
    where no call brings any.  ``more``: the keys and values of other tokens, if there are any.  ``pools``: as ``ready`` of
    ``pooled``.
    """
    segments = None if takes_segments(backend, spec) else spec.segments  # as a mask
    bare = (spec if segments is None else spec.with_segments_masked).bare
    ids: Sequence[Tensor] = ()
    if tensors is not None:
        read = [t.read(x) if isinstance(t, CallTensor) else x for t, x in zip(spec.tensors, tensors, strict=True)]
        fitted, ids, tensors = _dealt(read, len(spec.of_selection), len(spec.of_segments))
        bare = bare if bare.selection is None else replace(bare, selection=bare.selection.using(fitted))
    core = _without_edits(backend, bare, pools)
    if bare.extension is not None:
        core = partial(core, more=more)
    if bare.call_segments is not None:
        core = in_segments(bare.call_segments, ids, core)
    has_more = spec.has_map or bool(spec.before) or bool(spec.after)
    whole = edited(spec, core, tensors, skips_rows=backend.skips_rows) if has_more else core
    return whole if segments is None else masked_by(segments, ids, whole)


def _dealt(tensors: Sequence[Tensor], first: int, second: int) -> tuple[Sequence[Tensor], ...]:
    """So many, then so many, and the others."""
    return tensors[:first], tensors[first : first + second], tensors[first + second :]


def takes_segments(backend: Backend, spec: AttentionSpec) -> bool:
    """The backend is given the segments of ``spec`` themselves, instead of the mask that they amount to."""
    reads_masks = any(edit.reads_masks for edit in spec.after)
    others = (spec.pooling, spec.weight_gains, spec.zero_keys, spec.rows, spec.extension)
    return backend.segments and all(x is None for x in others) and not reads_masks and not spec.sends


def _without_edits(backend: Backend, spec: AttentionSpec, pools: Sequence[tuple[Tensor, Tensor]] = ()) -> Any:
    if spec.zero_keys is not None and not backend.zero_keys:
        return _zeros_as_sinks(backend, spec)
    if spec.rows is not None and not backend.rows:
        return on_chosen_rows(spec, partial(lower, backend))
    if spec.extension is not None and not backend.extends:
        return joined(spec, lower(backend, joined_spec(spec)))
    if spec.pooling is not None and not backend.pools:
        return pooled(spec, partial(lower, backend), pools)
    return lower(backend, spec)


def _with_sinks(spec: AttentionSpec) -> AttentionSpec:
    """The spec with sinks for each query in the place of zero keys."""
    return replace(spec, zero_keys=None, has_sinks=True)


def _zeros_as_sinks(backend: Backend, spec: AttentionSpec) -> Attend:
    core = _without_edits(backend, _with_sinks(spec))

    def attend(q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None, **others: Any) -> Tensor:
        o: Tensor = core(q, k, v, sinks=row_sinks(spec, q, k, sinks), **others)
        return o

    return attend


def no_answer(site: Site, e: PluginError) -> Refusal:
    """Replaces the answer of a failing plugin where nothing depends on it."""
    hint = "fix or uninstall the plugin"
    return site.refuse("plugin-failed", expected="an answer from the plugin", found=e.message, hint=hint)


def _require_name(plugin: object, kind: str, site: Site) -> None:
    if not isinstance(getattr(plugin, "name", None), str):
        raise fault(plugin, kind, "its class has no name", site.name)


def _refusal(answer: object) -> Refusal | None:
    if answer is None or isinstance(answer, Refusal):
        return answer
    raise TypeError(f"it returned {answer!r}, expected a Refusal or None")
