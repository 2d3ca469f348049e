"""Path patching: what one head tells others, or the output, directly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.base.options import choice
from attnopt.base.progress import working
from attnopt.base.user_warning import warn
from attnopt.capture.calibration import Batch
from attnopt.compiler.analyze import Analyzed
from attnopt.compiler.chosen_sites import chosen_places, no_such_site
from attnopt.compiler.head_graph import head_graph
from attnopt.compiler.head_sweep import HeadSweep, agree, with_each
from attnopt.errors import PolicyError
from attnopt.graph.resume import Part, Stacker
from attnopt.intervene.metric import Metric, measured, require_callable
from attnopt.intervene.patch import RUNS
from attnopt.intervene.runs import DIRECTIONS, chosen_heads, two_runs
from attnopt.match.find import Found
from attnopt.report.head_effects import HeadEffects

ROLES = ("q", "k", "v")
TOLD = 4  # receivers in the title of a result
Sender = tuple[str, int]  # site, head
Receiver = tuple[str, int, str]  # site, head, "q", "k" or "v"
Heads = dict[str, tuple[int, ...]]


@compiling()
def path_patch(
    model: nn.Module,
    clean: Batch,
    corrupted: Batch,
    *,
    metric: Metric,
    senders: str | Sequence[Sender] = "*",
    receivers: str | Sequence[Receiver] = "output",
    direction: str = "noising",
) -> HeadEffects:
    """Path patching (Wang et al., IOI, arXiv:2211.00593): the metric if ``receivers`` are told of one sender's other output.

    For each sender alone: its output is that of the other run; the outputs of all other heads are frozen to those of their own
    run; MLPs, norms and whatever else there is are computed from that, as in the paper.  The queries, keys or values that the
    receivers then see replace their own in a run in which nothing is frozen, whose output goes to the metric.  Hence only
    paths from the sender through residual connections and MLPs, not through other heads, lead to the receivers.
    ``receivers="output"``: the output of the frozen run itself, which is the direct effect.

    ``senders``: (site, head) pairs, or a name or glob of sites for all their heads; with a glob, sites from which no path leads
    to a receiver are left out.  ``receivers``: (site, head, "q" | "k" | "v") with the number of a query head, together; where
    query heads share keys and values, only this head reads the patched ones.
    ``direction``: "noising" patches the clean run with outputs of the corrupted run, as the paper does; "denoising" the reverse.
    ``clean``, ``corrupted``, ``metric`` and errors: as of ``patch``.
    """
    require_callable("path_patch", "metric", metric)
    choice("path_patch", "direction", direction, DIRECTIONS)
    analyzed, *both = two_runs(model, clean, corrupted)
    _warn_of_unread(analyzed)
    found = analyzed.findings.found
    told = _receivers(receivers, found)
    sending = _senders(senders, found)
    base, other = both if direction == "noising" else reversed(both)
    paths = _Paths(analyzed, sending, told, base)
    silent = [name for name in sending if not paths.parts[name].is_reached]
    if silent and not isinstance(senders, str):
        raise PolicyError(
            f"path_patch: no path leads from {silent[0]} to the receivers",
            hint="choose senders that run before a receiver",
        )
    sending = {name: heads for name, heads in sending.items() if name not in silent}
    if not sending:
        raise PolicyError("path_patch: no path leads from a sender to the receivers", hint="choose later receivers")
    with torch.no_grad(), working("patching one path after another", len(sending)) as step:
        ends = [measured(metric, paths.sweep.output(x), f"in the {r} run") for x, r in zip(both, RUNS, strict=True)]
        metrics: dict[str, tuple[float, ...]] = {}
        for name, outputs in paths.run(other, sending):
            metrics[name] = tuple(
                measured(metric, output, f"with head {h} of {name} patched")
                for h, output in zip(sending[name], outputs, strict=True)
            )
            step()
    return HeadEffects(direction, ends[0], ends[1], metrics, sending, f"to {_where(receivers)}")


def _where(receivers: str | Sequence[Receiver]) -> str:
    if isinstance(receivers, str):
        return "the output"
    told = [f"{role} of head {head} of {site}" for site, head, role in receivers]
    return ", ".join(told[:TOLD]) + (f" and {len(told) - TOLD} more" if len(told) > TOLD else "")


class _Paths:
    """Runs in which a sender's other output reaches the receivers alone."""

    def __init__(self, analyzed: Analyzed, sending: Heads, told: Mapping[str, Any] | None, base: CallInputs) -> None:
        found = analyzed.findings.found
        self.base = base
        self.sweep = sweep = HeadSweep(analyzed.program, head_graph(analyzed.program.module, found, told), sending)
        self.place = {f.site.name: f.site.spec.heads.index for f in found}
        outputs = sweep.graph.outputs
        self.received = [node for name in outputs for node in sweep.graph.inputs.get(name, {}).values()]
        frozen = [*outputs.values(), *self.received]
        graph = sweep.graph.module.graph
        self.own = sweep.values(frozen, base)
        ends = self.received or sweep.ends
        self.parts = {
            name: Part(graph, [outputs[name]], ends, {*outputs.values()} - {outputs[name]}) for name in sending
        }
        self.second = Stacker(agree)
        self.after = Part(graph, self.received, sweep.ends) if self.received else None

    def run(self, other: CallInputs, sending: Heads) -> Iterator[tuple[str, Iterator[Any]]]:
        """For each site that sends, the model's output for one of its heads after another."""
        sweep = self.sweep
        here, there = sweep.call(self.base), sweep.call(other)
        after = None if self.after is None else self._around_receivers(self.after)
        for name, node in sweep.nodes.items():
            if name not in sending:
                continue
            here.up_to(node)
            there.up_to(node)
            part, o = self.parts[name], here(node)
            around = here.around(part, self.own)
            patched = ((x,) for x in with_each(o, there(node), map(self.place[name], sending[name])))
            values = sweep.stacker.each(part, around, patched, sweep.at_once(part, o))
            if self.after is not None and after is not None:
                values = self.second.each(
                    self.after, after, values, sweep.at_once(self.after, self.own[self.received[0]])
                )
            yield name, (sweep.told(found, self.base) for found in values)

    def _around_receivers(self, after: Part) -> dict[fx.Node, Any]:
        graph = self.sweep.graph.module.graph
        place = {n: i for i, n in enumerate(graph.nodes)}
        first = min(self.received, key=place.__getitem__)
        call = self.sweep.call_to([first], self.base)
        call.up_to(first)
        return call.around(after)


def _receivers(receivers: str | Sequence[Receiver], found: Sequence[Found]) -> dict[str, dict[str, list[int]]] | None:
    """The places of the heads by site and role; None for the output."""
    if receivers == "output":
        return None
    hint = 'expected "output" or (site, head, "q" | "k" | "v") triples'
    if isinstance(receivers, str) or not receivers:
        raise PolicyError(f"path_patch: invalid value receivers={receivers!r}", hint=hint)
    by_name = {f.site.name: f for f in found}
    made: dict[str, dict[str, list[int]]] = {}
    for one in receivers:
        if not (isinstance(one, (tuple, list)) and len(one) == 3 and one[2] in ROLES):
            raise PolicyError(f"path_patch: invalid receiver {one!r}", hint=hint)
        site, head, role = one
        (place,) = _places(by_name, site, head)
        made.setdefault(site, {}).setdefault(role, []).append(place)
    return made


def _senders(senders: str | Sequence[Sender], found: Sequence[Found]) -> Heads:
    if isinstance(senders, str):
        return chosen_heads("path_patch", found, senders, None)
    by_name = {f.site.name: f for f in found}
    made: dict[str, list[int]] = {}
    for one in senders:
        if not (isinstance(one, (tuple, list)) and len(one) == 2):
            raise PolicyError(
                f"path_patch: invalid sender {one!r}", hint="expected (site, head) pairs, or a glob of sites"
            )
        site, head = one
        _places(by_name, site, head)
        made.setdefault(site, []).append(head)
    if not made:
        raise PolicyError("path_patch: no sender is given", hint='pass (site, head) pairs, or "*" for all heads')
    return {name: tuple(dict.fromkeys(heads)) for name, heads in made.items()}


def _places(by_name: Mapping[str, Found], site: object, head: object) -> tuple[int, ...]:
    """The place of one head.  Raises PolicyError for what is not there."""
    if site not in by_name:
        raise no_such_site("path_patch", site, list(by_name))
    return chosen_places("path_patch", [head], str(site), by_name[str(site)].site.spec.heads)


def _warn_of_unread(analyzed: Analyzed) -> None:
    """Of attentions whose heads cannot be frozen."""
    if misses := analyzed.findings.near_misses:
        many = "candidate that resembles" if len(misses) == 1 else "candidates that resemble"
        names = ", ".join(miss.name or "(root)" for miss in misses[:3])
        warn(
            f"path_patch: {len(misses)} {many} an attention could not be read as one ({names}): nothing in it is frozen, "
            "so paths through it count as direct; attnopt.inspect says why"
        )
