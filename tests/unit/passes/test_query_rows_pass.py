"""query-rows as a pass: options, refusals, company, and what the report says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from sites import a_site, applied, refusal, wrong

import attnopt
from attnopt.errors import PolicyError
from attnopt.ir.query_rows import ChosenRows
from attnopt.ir.row_scores import Norm, Received
from attnopt.passes import (
    AddValues,
    DynamicSparse,
    GroupedQuery,
    HeadPatch,
    LocalWindow,
    PoolKeys,
    PruneHeads,
    QueryRows,
    RouteHeads,
    ScaleHeads,
    SegmentGain,
    SoftPAG,
    Sparse,
    Steer,
)
from attnopt.patterns import Causal, Full, PerHead, Window


def full() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = tiny_models.Stack(causal=False)
    for p in model.parameters():
        p.data *= 2.0
    return model.eval(), torch.randn(2, 12, 16)


def test_options() -> None:
    p = QueryRows("received(4)", 0.25, prefix=1, heads=[3, 1])
    assert applied(p, a_site()).spec.rows == ChosenRows(Received(4), 0.25, 1, (1, 3))
    assert attnopt.Policy.of(
        "query-rows(score='received(stride=4)', keep=0.25, prefix=1, heads=[1, 3])"
    ) == attnopt.Policy.of(p)
    assert attnopt.Policy.from_json(attnopt.Policy.of(p).to_json()) == attnopt.Policy.of(p)
    assert QueryRows("Norm", 3).score == Norm()
    assert applied(QueryRows(heads=[1]), a_site(bias=False)).spec.rows == ChosenRows(Received(8), 0.5, 0, (1,))
    hides = replace(a_site(), bias_hides=True)
    assert applied(QueryRows("norm", 2), hides).spec.rows == ChosenRows(Norm(), 2, 0, (0, 1, 2, 3), bias_hides=True)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"keep": 0}, "query-rows: invalid value keep=0: expected an integer from 1"),
        ({"keep": 1.5}, "query-rows: invalid value keep=1.5: expected a fraction above 0 and at most 1.0"),
        ({"keep": -0.5}, "query-rows: invalid value keep=-0.5: expected a fraction above 0"),
        ({"keep": math.nan}, "query-rows: invalid value keep=nan: expected a finite number"),
        ({"keep": wrong("all")}, "query-rows: invalid value keep='all'"),
        ({"prefix": -1}, "query-rows: invalid value prefix=-1"),
        ({"heads": [-1]}, "query-rows: invalid value heads=-1"),
        ({"score": "rollout"}, "unknown row score 'rollout'"),
        ({"score": "pooled"}, "unknown row score 'pooled'"),
        ({"score": "received(stride=0)"}, "Received: invalid value stride=0"),
        (
            {"score": wrong(None)},
            "query-rows: invalid value score=None: expected row scores, their text, or a function",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], why: str) -> None:
    with pytest.raises(PolicyError) as caught:
        QueryRows(**options)
    assert why in str(caught.value)


def test_what_keeps_everything_changes_nothing() -> None:
    for p in (
        QueryRows("norm", 1.0),
        QueryRows("norm", 12),
        QueryRows("norm", 11, prefix=1),
        QueryRows("norm", heads=[]),
    ):
        assert p.rewrite(a_site()).spec == a_site().spec
    assert applied(QueryRows("norm", 12), replace(a_site(), is_dynamic=True)).spec.rows is not None
    assert applied(QueryRows("norm", 11), a_site()).spec.rows is not None
    model, x = full()
    fast = attnopt.optimize(model, QueryRows("received", 1.0), (x,))
    assert torch.equal(fast(x), attnopt.optimize(model, "fuse", (x,))(x))
    assert "query-rows: every row is kept" in str(fast.report)


def test_where_it_cannot_be_applied() -> None:
    rows = QueryRows("norm", 3)
    assert refusal(rows, a_site(pattern=Causal())) == (
        "[looks-ahead] expected queries that may see later keys, found Causal() (at model.py:88)\n  hint: whether a row is "
        "chosen depends on later tokens; route-heads decides for each token by itself"
    )
    assert refusal(QueryRows("norm", heads=[9]), a_site()).startswith("[unknown-head] expected heads from 0 to 3")
    assert refusal(rows, applied(rows, a_site())).startswith(
        "[already-chosen] expected an attention that computes all rows"
    )
    past = replace(a_site(), alignment="last", q_len=3)
    assert refusal(rows, past).startswith("[needs-self-attention]")
    cross = a_site(is_cross=True, kv_len=20)
    assert rows.check(cross) is None
    assert refusal(QueryRows("received", 3), cross).startswith("[needs-self-attention]")
    for edit in (Steer([1.0, 0.0, 2.0], heads=[0]), SoftPAG(u=0.5), AddValues([0], 0.1)):
        assert refusal(rows, applied(edit, a_site())).startswith("[already-edited]")
        assert applied(edit, applied(rows, a_site())).spec.rows is not None
    assert rows.check(applied(ScaleHeads({1: 2.0}), a_site())) is None
    assert refusal(rows, a_site(has_map=True)).startswith("[already-mixed] expected weights of a softmax alone")


OTHERS = {
    "already-selected": DynamicSparse(keep=1, block=4),
    "already-pooled": PoolKeys(3),
    "already-gained": SegmentGain([0], 0.5),
}


@pytest.mark.parametrize("code", OTHERS)
def test_other_choices_refuse_each_other(code: str) -> None:
    other, rows = OTHERS[code], QueryRows("norm", 3)
    assert refusal(rows, applied(other, a_site())).startswith(f"[{code}]")
    refused = refusal(other, applied(rows, a_site()))
    assert refused.startswith("[already-chosen]")
    assert f"use either {other.name} or query-rows" in refused or f"use either query-rows or {other.name}" in refused


def test_passes_that_would_make_it_causal() -> None:
    site = applied(QueryRows("norm", 3), a_site())
    for p in (LocalWindow(2, right=0), Sparse(Causal())):
        assert refusal(p, site).startswith("[looks-ahead]")
    assert applied(LocalWindow(2), site).spec.pattern == Window(2)
    assert applied(Sparse(PerHead({0: Causal()}, Full())), site).spec.rows is not None
    assert refusal(GroupedQuery(2, merge="mean"), site).startswith("[already-chosen]")


def test_heads_that_are_pruned_before_and_after() -> None:
    rows = QueryRows("norm", 3, heads=[0, 2])
    for policy in ([PruneHeads(heads=[0]), rows], [rows, PruneHeads(heads=[0])]):
        site = a_site()
        for p in policy:
            site = applied(p, site)
        assert site.spec.rows == ChosenRows(Norm(), 3, 0, (2,))
    site = applied(PruneHeads(heads=[0, 2]), applied(rows, a_site()))
    assert site.spec.rows is None


def test_the_report_tells_time_and_cost() -> None:
    model, x = full()
    fast = attnopt.optimize(model, QueryRows("norm", 0.25), (x,), backend="sdpa")
    entry = fast.report.sites[0]
    assert any(
        note.startswith("computing 3 of 12 rows takes ") and " of CPU time on sdpa, and all rows " in note
        for note in entry.notes
    )
    assert "heads 0 to 1 compute 25% of the rows by Norm()" in str(fast.report)
    assert entry.form_after is not None
    assert entry.form_after.rows == "heads 0 to 1 compute 25% of the rows by Norm()"
    assert attnopt.Report.from_json(fast.report.to_json()) == fast.report
    saved = entry.cost_before.flops - entry.cost_after.flops
    assert saved == 2 * 2 * 12 * 12 * 16 * 3 // 4
    plain = attnopt.optimize(model, QueryRows("norm", 0.25), (x,), backend="reference").report.sites[0]
    assert plain.cost_before == plain.cost_after
    assert "rows that are not chosen are computed and dropped: no time is saved" in str(plain.notes)
    voted = attnopt.optimize(model, QueryRows("received(4)", 0.25), (x,), backend="sdpa").report.sites[0]
    assert voted.cost_after.flops == entry.cost_after.flops + 2 * 8 * 2 * 3 * 12


def test_heads_that_are_folded_away_still_choose() -> None:
    """A head that is constant is not computed, but its queries choose rows."""
    model, x = full()
    zero = HeadPatch([0], torch.zeros(1, 8))
    fast, plain = (
        attnopt.optimize(model, [QueryRows("norm", 3), zero], (x,), backend=b) for b in ("sdpa", "reference")
    )
    torch.testing.assert_close(fast(x), plain(x))
    q = model.layers[0].q(x).unflatten(-1, (2, 8))
    both, other = (q[:, :, h].square().sum((2, 3)).topk(3).indices.sort().values for h in (slice(None), slice(1, None)))
    assert not torch.equal(both, other)
    alone = attnopt.optimize(model, {"layers.0": [QueryRows("norm", 3), zero], "layers.1": []}, (x,))
    own = attnopt.optimize(model, {"layers.0": [PruneHeads(heads=[0]), QueryRows("norm", 3)], "layers.1": []}, (x,))
    assert not torch.allclose(alone(x), own(x), atol=1e-3)


def test_routing_beside_rows() -> None:
    """Tokens that are routed, of rows that are chosen: zeros of either."""
    model, x = full()
    both = attnopt.optimize(model, [QueryRows("norm", 0.5), RouteHeads(routed=1)], (x,))
    alone = attnopt.optimize(model, [QueryRows("norm", 0.5), RouteHeads(routed=1)], (x,), backend="reference")
    torch.testing.assert_close(both(x), alone(x))
    assert both.sites[0].spec.route is not None
    other = attnopt.optimize(model, [RouteHeads(routed=1), QueryRows("norm", 0.5)], (x,))
    torch.testing.assert_close(other(x), both(x))


def test_scores_of_a_wrong_shape_name_the_site() -> None:
    model, x = full()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(attnopt.PluginError) as caught:
        attnopt.optimize(model, QueryRows(lambda q, k, **_: q[..., 0, 0], 0.5), (x,))
    assert caught.value.site == "layers.0"
    assert "gave float32 [" in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_plain_function_cannot_be_saved(tmp_path: Any) -> None:
    model, x = full()

    def least(q: torch.Tensor, k: torch.Tensor, **_: Any) -> torch.Tensor:
        return -q.square().sum((1, 3))

    fast = attnopt.optimize(model, QueryRows(least, 0.5), (x,))
    assert "by test_a_plain_function_cannot_be_saved.<locals>.least" in str(fast.report)
    with pytest.raises(attnopt.ArchiveError, match=r"cannot save: row score .*least is an instance of") as caught:
        fast.save(tmp_path / "saved")
    assert "attnopt.register" in str(caught.value)
    assert not (tmp_path / "saved").exists()
