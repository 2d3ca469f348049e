"""The report entry of one site: its status, and its spec and cost before and after."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from attnopt.compiler.decide import Decision
from attnopt.graph.nodes import value
from attnopt.ir.cost import cost_of
from attnopt.ir.spec import AttentionSpec
from attnopt.report.report import Form, SiteReport, Status


def site_report(d: Decision) -> SiteReport:
    before, after = d.found.site, d.site
    status: Status = "rewritten" if d.plan is not None else "refused" if d.refusals else "unchanged"
    return SiteReport(
        name=before.name,
        status=status,
        where=before.where,
        num_heads=after.num_heads,
        num_kv_heads=after.num_kv_heads,
        head_dim=after.head_dim,
        value_dim=after.value_dim,
        scale=after.scale,
        is_cross=after.is_cross,
        spec_before=_described(before.spec),
        spec_after=_described(after.spec, before.spec.heads),
        cost_before=cost_of(before, before.spec, before.spec, element_sizes(d)),
        cost_after=cost_of(
            before,
            after.spec,
            before.spec,
            element_sizes(d),
            rows=1.0 if d.plan is None else d.plan.rows,
            pools_early=d.plan is not None and d.plan.pools_early,
        ),
        passes=() if d.plan is None else d.plan.passes,
        refusals=dict(d.refusals),
        backend=None if d.plan is None else d.plan.backend.name,
        error=d.found.error,
        notes=(*before.notes, *d.notes),
        q_len=before.q_len,
        kv_len=before.kv_len,
        form_before=Form.of(before.spec),
        form_after=Form.of(after.spec),
    )


def element_sizes(d: Decision) -> tuple[int, int]:
    """Bytes per element of the keys and of the values."""
    of_key, of_value = (value(n).element_size() for n in d.found.raised.node.args[1:3] if isinstance(n, fx.Node))
    return of_key, of_value


def _described(spec: AttentionSpec, originally: Sequence[int] = ()) -> str:
    """A spec in a few words: "12 heads, Causal() & Window(255, 0)"."""
    gone = [h for h in originally if h not in spec.heads]
    chosen = [] if spec.selection is None else [str(spec.selection)]
    parts = [
        spec.head_counts,
        str(spec.pattern),
        *spec.features,
        *chosen,
        *map(str, spec.before),
        *map(str, spec.after),
    ]
    return ", ".join([*parts, f"without heads {', '.join(map(str, gone))}"] if gone else parts)
