"""Whether routing tokens to heads, or choosing rows, saves time at a site: both forms run on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnopt.base.cpu_timing import interleaved, one_thread
from attnopt.errors import PluginError
from attnopt.ir import plugin_calls
from attnopt.ir.call_tensor import known
from attnopt.ir.interfaces import Backend
from attnopt.ir.operands import OperandTensors
from attnopt.ir.plugin_calls import attention_of
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec

_ROUNDS = 3


def faster(site: Site, masking: Backend, backends: Sequence[Backend]) -> tuple[Backend, tuple[str, ...]]:
    """``masking``, which computes every head of a routed site, or the fastest of ``backends`` that computes only the
    routed pairs; with notes for the report.

    Measured once per kind of site and process, so equal sites are lowered alike.
    """
    skipping = [
        b for b in (o.skipping_rows() for o in backends) if b is not None and plugin_calls.accepts(b, site) is None
    ]
    everything = f"{masking.name} computes every head and masks those that are not routed"
    if site.device != "cpu" or not skipping:
        return masking, (f"{everything}: no time is saved",)
    seconds = _known(replace(site.spec, positions=(), seen_as=None), site.q_len, site.kv_len, (masking, *skipping))
    best = min(skipping, key=lambda b: seconds[skipping.index(b) + 1])
    whole, routed = seconds[0], seconds[skipping.index(best) + 1]
    on = f"for one sequence of {site.q_len} tokens, measured on random data"
    if routed < whole:
        told = f"{best.name} computes only the routed (token, head) pairs: {_ms(routed)} of CPU time {on}; "
        return best, (f"{told}computing every head would take {_ms(whole)} on {masking.name}",)
    told = f"{everything}, so no time is saved: {_ms(whole)} of CPU time {on}; "
    return masking, (f"{told}computing only the routed pairs would take {_ms(routed)} on {best.name}",)


def saved_by_rows(site: Site, backend: Backend, able: Sequence[Backend]) -> tuple[str, ...]:
    """What the report says about the time that a choice of rows saves on ``backend``, of those that are ``able``."""
    rows = site.spec.rows
    assert rows is not None
    if backend.rows or site.device != "cpu":
        return ()
    whole = replace(site, spec=replace(site.spec, rows=None))
    other = min(able, key=lambda b: plugin_calls.cost(b, whole))
    spec = replace(site.spec, positions=(), seen_as=None, after=())
    try:
        (chosen,) = _known(spec, site.q_len, site.kv_len, (backend,))
    except PluginError as e:
        raise PluginError(e.message, hint=e.hint, site=site.name) from e.__cause__
    (everything,) = _known(replace(spec, rows=None), site.q_len, site.kv_len, (other,))
    told = f"computing {rows.count(site.q_len)} of {site.q_len} rows takes {_ms(chosen)} of CPU time on {backend.name}"
    told += f", and all rows {_ms(everything)} on {other.name}, measured on random data of one sequence"
    return (told if chosen < everything else f"{told}: no time is saved at this length",)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


_measured: dict[object, tuple[float, ...]] = {}


def _known(spec: AttentionSpec, q_len: int, kv_len: int, backends: tuple[Backend, ...]) -> tuple[float, ...]:
    kinds = tuple(type(b) if type(b).__eq__ is object.__eq__ else b for b in backends)
    key = spec, q_len, kv_len, kinds
    try:
        hash(key)
    except TypeError:  # options of a third party's score
        return _seconds(spec, q_len, kv_len, backends)
    if key not in _measured:
        _measured[key] = _seconds(spec, q_len, kv_len, backends)
    return _measured[key]


def _seconds(spec: AttentionSpec, q_len: int, kv_len: int, backends: tuple[Backend, ...]) -> tuple[float, ...]:
    """CPU seconds of one call with each backend."""
    with torch.no_grad(), one_thread(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        q = torch.randn(1, spec.num_heads, q_len, spec.head_dim)
        k, v = (torch.randn(1, spec.num_kv_heads, kv_len, n) for n in (spec.head_dim, spec.value_dim))
        bias = torch.randn(1, 1, q_len, kv_len) if spec.has_bias else None
        mask = torch.ones(1, 1, 1, kv_len, dtype=torch.bool) if spec.has_mask else None
        sinks = torch.randn(1, spec.num_heads, 1, 1) if spec.has_sinks else None
        added = torch.randn(1, spec.num_heads, q_len, kv_len) if spec.has_map else None
        operands = OperandTensors(q, k, v, bias, mask, sinks, added=added)

        def called(backend: Backend) -> Callable[[], Tensor]:
            attend = attention_of(backend, spec, known(spec.tensors))
            return lambda: attend(q, k, v, **operands.others)

        calls = {str(i): called(b) for i, b in enumerate(backends)}
        times = interleaved(calls, _ROUNDS)
    return tuple(times.median(name) for name in calls)
