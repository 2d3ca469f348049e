"""A spec's attention in full: what a backend computes, and what becomes of the heads' outputs after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from attnopt import plugin_calls
from attnopt.backends.lowering import with_gains
from attnopt.rewriting import Attend, Backend
from attnopt.spec import AttentionSpec


def attention_of(backend: Backend, spec: AttentionSpec, constants: Sequence[Tensor] | None = None) -> Attend:
    """``spec`` with all that is in ``spec.after``, computed by ``backend``.

    ``constants`` are those of ``spec.constants`` as tensors, so that a graph can hold them; None: made at each call.
    """
    if not spec.after:
        plain: Attend = plugin_calls.lower(backend, spec)
        return plain
    core = plugin_calls.lower(backend, replace(spec, after=(), gains=None))

    def attend(
        q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        held = iter([c.tensor(q.device) for c in spec.constants] if constants is None else constants)
        own = [[next(held) for _ in edit.constants] for edit in spec.after]
        wanted = {}
        if backend.skips_rows and spec.route is not None:
            wanted["wanted"] = spec.route.gates(spec, q, own[spec.after.index(spec.route)])
        o: Tensor = core(q, k, v, bias=bias, mask=mask, sinks=sinks, **wanted)
        for edit, numbers in zip(spec.after, own, strict=True):
            o = plugin_calls.edit(edit, spec, o, q, v, numbers)
        return with_gains(replace(spec, after=()), o)

    return attend
