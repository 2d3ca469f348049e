"""What each alternative costs, from specs and rewritten models: exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from attnopt.base.compile_lock import compiling
from attnopt.compiler.decide import Decision
from attnopt.compiler.site_report import element_sizes, site_report
from attnopt.ir.call_tensor import BATCH
from attnopt.ir.spec import AttentionSpec
from attnopt.lower.lower import lower
from attnopt.patterns.lookback import widest
from attnopt.policy_search.candidates import Alternative, Candidates
from attnopt.policy_search.menu import Menu

Amount = Callable[[Alternative], float]  # how much more than the original


def menu_of(
    made: Candidates, resources: Sequence[str], latency: tuple[float, Sequence[Sequence[float]]] | None
) -> Menu:
    """The costs of these resources, and of those that cost nothing to know: FLOPs and bytes of keys and values.

    ``latency``: of the original, and what each alternative of each place adds, as measured."""
    amounts: dict[str, tuple[float, Amount]] = {
        "flops": (sum(_flops(Decision(f, f.site))[0] for f in made.found), _more_flops),
        "kv_bytes": (sum(kept_bytes(Decision(f, f.site), f.site.spec) for f in made.found), _more_bytes),
    }
    if "parameters" in resources or "memory" in resources:
        sizes = _Sizes(made)
        amounts["parameters"] = (sizes.original[0], lambda a: sizes.more(a)[0])
        amounts["memory"] = (
            sizes.original[1] + amounts["kv_bytes"][0],
            lambda a: sizes.more(a)[1] + _more_bytes(a),
        )
    original = {name: float(base) for name, (base, _) in amounts.items()}
    changes = {
        name: tuple(tuple(float(more(a)) for a in place.alternatives) for place in made.places)
        for name, (_, more) in amounts.items()
    }
    if latency is not None:
        original["latency"] = latency[0]
        changes["latency"] = tuple(tuple(own) for own in latency[1])
    return Menu(original, changes, tuple(p.allowed for p in made.places))


def kept_bytes(d: Decision, spec: AttentionSpec) -> float:
    """Bytes of the keys and values of one call that a later query can see, at the sizes of the example."""
    site = d.found.site
    of_key, of_value = element_sizes(d)
    each = spec.head_dim * (0 if "k" in spec.unused else of_key) + spec.value_dim * of_value
    if spec.is_constant or spec.between_channels or spec.linear is not None or spec.sends:  # no keys are kept
        return 0.0
    readers: dict[int, list[int]] = {}
    for h, g in enumerate(spec.kv_of_head):
        readers.setdefault(g, []).append(h)
    return float(_batch(d) * each * sum(kept_tokens(spec, heads, site.kv_len) for heads in readers.values()))


def _batch(d: Decision) -> int:
    """Of the user's example: one sequence is captured as two where the batch is free."""
    return d.found.site.own_sizes.get(BATCH, d.found.site.batch)


def kept_tokens(spec: AttentionSpec, heads: Sequence[int], length: int) -> int:
    """Tokens that a key/value head keeps for these heads."""
    if not spec.is_causal:
        return length
    past = widest(spec.visible_pattern.for_head(h).look_back for h in heads)
    return length if past is None else min(length, past.sinks + past.recent + 1)


def _flops(d: Decision) -> tuple[float, float]:
    """Before and after, of all sequences of the example."""
    entry, batch = site_report(d), _batch(d)
    return float(entry.cost_before.flops * batch), float(entry.cost_after.flops * batch)


def _more_flops(a: Alternative) -> float:
    return sum(after - before for before, after in map(_flops, a.decisions))


def _more_bytes(a: Alternative) -> float:
    return sum(kept_bytes(d, d.site.spec) - kept_bytes(d, d.found.site.spec) for d in a.decisions)


class _Sizes:
    """Parameters, and bytes of all weights, of the model with one alternative."""

    def __init__(self, made: Candidates) -> None:
        self.made = made
        self.original = self._of(())
        self.known: dict[int, tuple[float, float]] = {}

    def more(self, a: Alternative) -> tuple[float, float]:
        if not a.changes_weights:
            return 0.0, 0.0
        if id(a) not in self.known:
            parameters, weights = self._of(a.decisions)
            self.known[id(a)] = parameters - self.original[0], weights - self.original[1]
        return self.known[id(a)]

    @compiling()
    def _of(self, decisions: Sequence[Decision]) -> tuple[float, float]:
        module = lower(self.made.compiled.program.module, [d.plan for d in decisions if d.plan is not None])
        return sizes_of(module)


def sizes_of(module: fx.GraphModule) -> tuple[float, float]:
    """Parameters, and bytes of parameters and buffers, each once."""
    parameters: Mapping[int, torch.Tensor] = {id(p): p for p in module.parameters()}
    every = {**parameters, **{id(b): b for b in module.buffers()}}
    return float(sum(p.numel() for p in parameters.values())), float(
        sum(t.numel() * t.element_size() for t in every.values())
    )
