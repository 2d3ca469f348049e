"""The driver: capture, find, let the passes decide, lower, verify, report."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from attnopt import plugins
from attnopt.calling import Signature
from attnopt.capture import Program, capture
from attnopt.compare import difference, tensors, tolerance
from attnopt.cost import cost_of
from attnopt.errors import AttnoptWarning, CalibrationError, PolicyError, RewriteError, VerificationError
from attnopt.finding import Findings, Found, find
from attnopt.lowering import Plan, lower
from attnopt.model import OptimizedModel, Origin
from attnopt.policy import Policy
from attnopt.refusal import Refusal
from attnopt.report import Report, SiteReport, Status
from attnopt.rewriting import Backend, HeadWeights, Pass
from attnopt.site import Inspection, Site
from attnopt.spec import AttentionSpec

ROOM = 10.0  # how much more than one site's rounding a whole model's output may show


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class _Decision:
    """What the passes made of one site: a plan, or None where it stays as it is."""

    found: Found
    site: Site
    plan: Plan | None
    refusals: Mapping[str, Refusal]
    notes: tuple[str, ...] = ()
    wanted: bool = False  # some pass was meant for it


def inspect(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Inspection:
    """Find every attention that ``model(*args, **kwargs)`` runs, without changing anything.

    Returns an ``Inspection``: ``.sites`` in the order in which they run, each with the passes that cannot rewrite it in
    ``.refusals``; ``.near_misses``; it prints as a table.  Raises CaptureError if the model cannot be captured.
    """
    program = capture(model, *_inputs(args, kwargs))
    findings = find(program)
    sites = tuple(replace(f.site, refusals=_standing_refusals(f)) for f in findings.found)
    return Inspection(sites, findings.near_misses, findings.candidates)


def optimize(
    model: nn.Module,
    policy: Any = "fuse",
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    calibration: Iterable[Any] | None = None,
    backend: str | Backend = "auto",
    tolerance: float | None = None,
    strict: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> OptimizedModel:
    """Rewrite the attentions of ``model`` as ``policy`` says and lower them to fused operators.

    The model itself is never changed; weights that stay the same are shared with it.

    ``policy``: a pass, a list of passes, a mapping from site-name globs to those, a ``Policy``, a YAML or JSON file, or text
    such as ``"local-window(left=128)"``.  ``"fuse"`` only fuses, which is exact.
    ``args``, ``kwargs``: example inputs.  Without any, the model is captured at its first call.
    ``dynamic_shapes``: torch.export's notation, or ``"auto"`` (batch and sequence axes, as far as the model allows).
    ``calibration``: batches (a tensor, a tuple of args or a dict of kwargs each) on which the change is measured as well.
    ``backend``: a name, a ``Backend``, or ``"auto"``: for each site the cheapest one that can compute it.
    ``tolerance``: largest relative difference from the model that is accepted, else VerificationError.
    ``strict``: a refusal is a RewriteError.  ``limit``: carry out only the first so many rewrites.  ``seed``: of every
    random choice.

    Raises AttnoptError (CaptureError, PolicyError, RewriteError, VerificationError) and then has changed nothing.
    """
    chosen = Policy.of(policy)
    _check_options(limit, tolerance)
    backends = _backends(backend)
    batches = None if calibration is None else _batches(calibration)
    args, given = _inputs(args, kwargs)
    if not args and not given and batches:
        args, given = batches[0]

    def build(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.GraphModule, Origin]:
        job = _Job(model, chosen, args, kwargs, dynamic_shapes, batches or [], backends, tolerance, strict, limit, seed)
        return job.run()

    if not args and not given:
        return OptimizedModel.deferred(model, build)
    module, origin = build(args, given)
    return OptimizedModel(module, origin)


def _inputs(args: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (args if isinstance(args, tuple) else (args,)), dict(kwargs or {})


def _check_options(limit: int | None, tolerance: float | None) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise PolicyError(f"limit must be a number of rewrites, not {limit!r}")
    if tolerance is not None and not tolerance >= 0:
        raise PolicyError(f"tolerance must be a number from 0, not {tolerance!r}")


def _batches(calibration: Iterable[Any]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    try:
        items = list(calibration)
    except TypeError:
        raise CalibrationError(
            f"calibration must be an iterable of batches, not {type(calibration).__name__}", hint="give a list of inputs"
        ) from None
    for i, batch in enumerate(items):
        if isinstance(batch, Tensor):
            found.append(((batch,), {}))
        elif isinstance(batch, Mapping):
            found.append(((), dict(batch)))
        elif isinstance(batch, (tuple, list)):
            found.append((tuple(batch), {}))
        else:
            raise CalibrationError(
                f"calibration batch {i} is {type(batch).__name__}", hint="give a tensor, a tuple of args or a dict of kwargs"
            )
    if not found:
        raise CalibrationError("calibration holds no batch", hint="leave it out, or give at least one batch")
    return found


def _backends(backend: str | Backend) -> tuple[Backend, ...]:
    """The backends to choose from, those of third parties only where they are named."""
    if isinstance(backend, Backend):
        return (backend,)
    if not isinstance(backend, str):
        raise PolicyError(f"backend must be a name or a Backend, not {type(backend).__name__}")
    if backend != "auto":
        return (plugins.load_backend(backend)(),)
    ours = [p for p in plugins.backends().values() if p.distribution == plugins.OURS]
    return tuple(plugins.load_backend(p.name)() for p in ours)


def _standing_refusals(found: Found) -> dict[str, Refusal]:
    """Passes that this site rules out whatever their options: those that a check without them would refuse."""
    reasons: dict[str, Refusal] = {}
    site = found.site
    if found.raised.region.escapes:
        escape = _escapes(found)
        return dict.fromkeys((p.name for p in plugins.passes().values()), escape)
    if site.is_cross or site.q_len != site.kv_len:
        from attnopt.passes.local_window import LocalWindow

        refusal = LocalWindow(left=1).check(site)
        if refusal is not None:
            reasons["local-window"] = reasons["sparse"] = refusal
    from attnopt.passes.grouped_query import GroupedQuery

    refusal = GroupedQuery(kv_heads=1).check(site)
    if refusal is not None:
        reasons["grouped-query"] = refusal
    return reasons


def _escapes(found: Found) -> Refusal:
    nodes = found.raised.region.escapes
    users = [u for n in nodes for u in n.users if u not in found.raised.region.nodes]
    used_by = next((u.name for u in users if u.op != "output"), "the model's output")
    return found.site.refuse(
        "escapes", expected="scores and weights that only the attention uses", found=f"{nodes[0].name} used by {used_by}",
        hint="call the model without returning attention weights",
    )  # fmt: skip


@dataclass
class _Job:
    model: nn.Module
    policy: Policy
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    backends: tuple[Backend, ...]
    tolerance: float | None
    strict: bool
    limit: int | None
    seed: int

    def run(self) -> tuple[fx.GraphModule, Origin]:
        self.clock, self.warnings = _Clock(), list[str]()
        with self.clock.stage("capture"):
            program = capture(self.model, self.args, self.kwargs, self.dynamic_shapes)
        with self.clock.stage("match"):
            findings = find(program)
        with self.clock.stage("rewrite"):
            decisions = [self._decide(f) for f in findings.found]
            decisions = self._limited(decisions)
        self._check_policy(findings, decisions)
        if self.strict:
            _raise_refusal(decisions)
        with self.clock.stage("lower"):
            module = lower(program.module, [d.plan for d in decisions if d.plan is not None])
        with self.clock.stage("verify"):
            error = self._verify(program, module, decisions)
        return module, self._origin(program, findings, decisions, module, error)

    # ------------------------------------------------------------ decide
    def _decide(self, found: Found) -> _Decision:
        """Run the site's passes one after the other; each sees what the ones before it made."""
        passes = self.policy.passes_for(found.site.name)
        site, edits, applied, notes = found.site, list[HeadWeights](), list[str](), list[str]()
        refusals: dict[str, Refusal] = {}
        if found.raised.region.escapes and passes:
            refusals = {p.name: _escapes(found) for p in passes}
            return _Decision(found, site, None, refusals, wanted=True)
        for p in passes:
            refusal = p.check(site)
            if refusal is not None:
                refusals[p.name] = refusal
                continue
            rewrite = p.rewrite(site)
            edits = _merged(edits, rewrite.edits)
            site = replace(site, spec=rewrite.spec, parameters=_with_edits(found.site, edits))
            notes += rewrite.notes
            applied.append(p.name)
        if not applied:
            return _Decision(found, found.site, None, refusals, wanted=bool(passes))
        backend, reasons = _cheapest(self.backends, site.spec, found.site)
        if backend is None:
            return _Decision(found, found.site, None, {**refusals, **reasons}, wanted=True)
        plan = Plan(found, site.spec, tuple(edits), backend, tuple(applied))
        return _Decision(found, site, plan, refusals, (*notes, *_kept_whole(found.site, site.spec)), wanted=True)

    def _limited(self, decisions: list[_Decision]) -> list[_Decision]:
        if self.limit is None:
            return decisions
        left = self.limit
        out: list[_Decision] = []
        for d in decisions:
            if d.plan is not None and left <= 0:
                d = _Decision(d.found, d.found.site, None, {}, (f"left out by limit={self.limit}",))
            left -= d.plan is not None
            out.append(d)
        return out

    def _check_policy(self, findings: Findings, decisions: Sequence[_Decision]) -> None:
        names = [f.site.name for f in findings.found]
        unmatched = [g for g in self.policy.unmatched(names) if g != "*"]
        if unmatched and names:
            listed = ", ".join(repr(n) for n in names[:6]) + (", ..." if len(names) > 6 else "")
            raise PolicyError(f"no attention is named {', '.join(map(repr, unmatched))}", hint=f"the sites are {listed}")
        if not names:
            self._warn(
                f"no attention was found among {findings.candidates} candidates"
                + (f", {len(findings.near_misses)} of them near misses: see report.near_misses" if findings.near_misses else "")
            )
        elif not any(d.plan is not None for d in decisions):
            self._warn("the policy changes nothing: " + _why_nothing(decisions, self.limit))

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        warnings.warn(text, AttnoptWarning, stacklevel=6)

    # ------------------------------------------------------------ verify
    def _verify(self, program: Program, module: fx.GraphModule, decisions: Sequence[_Decision]) -> float:
        """The largest difference from the user's model; raises if the rewrite is not what its spec says."""
        plans = [d.plan for d in decisions if d.plan is not None]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            got = self._outputs(module, self.args, self.kwargs)
            original = self._outputs(self.model, self.args, self.kwargs)
            if any(not _is_exact(p) for p in plans):
                meant = self._outputs(lower(program.module, plans, plain=True), self.args, self.kwargs)
                self._check_meaning(program, plans, got, meant)
            error = difference(got, original)
            if not any(not _is_exact(p) for p in plans) and not error <= ROOM * tolerance(original):
                self._blame(program, plans, original, error)
            for args, kwargs in self.batches:
                error = max(error, difference(self._outputs(module, args, kwargs), self._outputs(self.model, args, kwargs)))
        if self.tolerance is not None and not error <= self.tolerance:
            raise VerificationError(
                f"the rewritten model differs from the original by {error:.3g} (relative), more than the tolerance {self.tolerance:g}",
                hint="choose a milder policy, or fewer sites",
            )
        return error

    def _outputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        torch.manual_seed(self.seed)
        return tensors(module(*_copied(args), **_copied(kwargs)))

    def _check_meaning(
        self, program: Program, plans: Sequence[Plan], got: list[Tensor], meant: list[Tensor]
    ) -> None:
        error = difference(got, meant)
        if error <= ROOM * tolerance(meant):
            return
        self._blame(program, plans, meant, error)

    def _blame(self, program: Program, plans: Sequence[Plan], want: list[Tensor], error: float) -> None:
        """Name the first site that alone makes a difference from its meaning."""
        for plan in plans:
            alone = self._outputs(lower(program.module, [plan]), self.args, self.kwargs)
            plain = self._outputs(lower(program.module, [plan], plain=True), self.args, self.kwargs)
            if not difference(alone, plain) <= ROOM * tolerance(plain):
                raise VerificationError(
                    f"the rewritten model does not compute what {', '.join(plan.passes)} means (relative difference {error:.2g})",
                    site=plan.found.site.name,
                    hint="leave the site out of the policy and report the model",
                )
        if not all(torch.isfinite(t).all() for t in want if t.is_floating_point()):
            self._warn("the model's own output holds NaN or infinities on the example inputs, so it could not be compared")
            return
        raise VerificationError(
            f"the rewritten model differs from what it was meant to compute by {error:.2g} (relative)",
            hint="bisect with limit=1, 2, ... to find the site",
        )

    # ------------------------------------------------------------ report
    def _origin(
        self, program: Program, findings: Findings, decisions: Sequence[_Decision], module: fx.GraphModule, error: float
    ) -> Origin:
        report = Report(
            sites=tuple(_site_report(d) for d in decisions), near_misses=findings.near_misses, policy=self.policy.to_json(),
            error=error, seconds=dict(self.clock.seconds), warnings=tuple(self.warnings), versions=_versions(),
            fixed_axes=program.fixed_axes,
        )  # fmt: skip
        live = {**dict(module.named_buffers()), **dict(module.named_parameters(remove_duplicate=False))}
        sites = tuple(replace(d.site, parameters=live, refusals=d.refusals) for d in decisions)
        signature = Signature.of(getattr(self.model, "forward", module.forward), self.args, self.kwargs)
        return Origin(report, sites, signature, program.args, program.kwargs, program.shapes)


def _copied(tree: Any) -> Any:
    """A model may write into its inputs; the examples must survive."""
    return pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tree)


def _is_exact(plan: Plan) -> bool:
    before = plan.found.raised.spec
    return plan.spec == before and not plan.edits


def _merged(old: Sequence[HeadWeights], new: Sequence[HeadWeights]) -> list[HeadWeights]:
    replaced = {(e.role, e.head) for e in new}
    return [e for e in old if (e.role, e.head) not in replaced] + list(new)


def _with_edits(site: Site, edits: Sequence[HeadWeights]) -> Mapping[str, Tensor]:
    if not edits:
        return site.parameters
    from attnopt.lowering import edited_parameters

    by_output = [e for e in edits if e.role == "out"]
    others = [e for e in edits if e.role != "out"]
    return {**site.parameters, **edited_parameters(site, others), **edited_parameters(site, by_output)}


def _cheapest(
    backends: Sequence[Backend], spec: AttentionSpec, site: Site
) -> tuple[Backend | None, dict[str, Refusal]]:
    reasons = {b.name: r for b in backends if (r := b.check(spec)) is not None}
    able = [b for b in backends if b.name not in reasons]
    if not able:
        return None, reasons
    return min(able, key=lambda b: b.cost(spec, site.q_len, site.kv_len)), reasons


def _kept_whole(site: Site, spec: AttentionSpec) -> tuple[str, ...]:
    """Where heads went but their weights could not."""
    if spec.num_heads == site.num_heads and spec.num_kv_heads == site.num_kv_heads:
        return ()
    return tuple(f"the {role} weights keep their size: {p.why}" for role, p in site.projections.items() if p.rows is None)


def _raise_refusal(decisions: Sequence[_Decision]) -> None:
    for d in decisions:
        for name, refusal in d.refusals.items():
            raise RewriteError(f"{name} refused {refusal}", site=d.found.site.name, hint=refusal.hint or "choose other sites for it")


def _why_nothing(decisions: Sequence[_Decision], limit: int | None) -> str:
    if limit == 0:
        return "limit=0"
    refused = [next(iter(d.refusals.items())) for d in decisions if d.refusals]
    if not refused:
        return "it has passes for no site"
    (name, first), *_ = refused
    return f"{len(refused)} of {len(decisions)} sites refused, the first by {name} {first}"


def _site_report(d: _Decision) -> SiteReport:
    before, after = d.found.site, d.site
    status: Status = "rewritten" if d.plan is not None else "refused" if d.refusals else "unchanged"
    return SiteReport(
        name=before.name, status=status, where=before.where, num_heads=after.num_heads, num_kv_heads=after.num_kv_heads,
        head_dim=after.head_dim, value_dim=after.value_dim, scale=after.scale, is_cross=after.is_cross,
        spec_before=_described(before.spec), spec_after=_described(after.spec),
        cost_before=cost_of(before, before.spec, before.spec), cost_after=cost_of(before, after.spec, before.spec),
        passes=() if d.plan is None else d.plan.passes, refusals=dict(d.refusals),
        backend=None if d.plan is None else d.plan.backend.name, error=d.found.error, notes=(*before.notes, *d.notes),
    )  # fmt: skip


def _described(spec: AttentionSpec) -> str:
    """A spec in a few words: "12 heads, Causal() & Window(255, 0)"."""
    heads = f"{spec.num_heads} heads" if spec.num_kv_heads == spec.num_heads else f"{spec.num_heads} heads / {spec.num_kv_heads} kv"
    gone = sorted(set(range(max(spec.heads, default=-1) + 1)) - set(spec.heads))
    extras = [w for w, has in (("bias", spec.has_bias), ("mask", spec.has_mask), ("sinks", spec.has_sinks), ("softcap", spec.softcap)) if has]
    parts = [heads, str(spec.pattern), *extras]
    if gone:
        parts.append(f"without heads {', '.join(map(str, gone))}")
    if spec.gains is not None:
        parts.append("gains " + ", ".join(f"{g:g}" for g in spec.gains))
    return ", ".join(parts)


def _versions() -> dict[str, str]:
    from attnopt.version import __version__

    return {"attnopt": __version__, "torch": torch.__version__}


__all__: Sequence[str] = ("Pass", "inspect", "optimize")
