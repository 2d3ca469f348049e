"""The report's page: what is drawn, and how a browser shows it.  Also what notebooks are given."""

import json
from dataclasses import replace
from pathlib import Path

import browser
import numpy as np
import pytest
import tiny_models
from browser import CHROMIUM, is_balanced

import attnopt
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads
from attnopt.patterns import Blocks, Causal, Full, Global, Pattern, PerHead, Sinks, Strided, Window
from attnopt.render.numbers import numbers, times
from attnopt.render.page import picture_svg, report_page
from attnopt.render.page_view import lanes, measures, site_views
from attnopt.render.pattern_cells import CELLS, pictures, shares
from attnopt.report.report import Form, Report

PATTERNS = [Full(), Causal(), Window(3, 1) | Sinks(2), Strided(5) & Causal(), Blocks(7, 2), Global((0, 9)), ~Window(2)]


@pytest.fixture(scope="module")
def report() -> Report:
    """A window on the first attention, a head less and its importance in the second."""
    model, args = tiny_models.causal()
    policy = {"layers.0": LocalWindow(left=3), "layers.1": PruneHeads(heads=[1])}
    fast = attnopt.optimize(model.eval(), policy, args)
    return replace(
        fast.report.with_importance(attnopt.head_importance(model, [args])), cpu_seconds={"before": 2e-3, "after": 1e-3}
    )


# ---------------------------------------------------------------- pictures
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (5, 9), (32, 32), (33, 70), (97, 97)])
def test_shares_are_those_of_the_dense_mask(pattern: Pattern, q_len: int, kv_len: int) -> None:
    mask = pattern.mask(q_len, kv_len)[0].numpy()
    tall, wide = -(-q_len // CELLS), -(-kv_len // CELLS)
    want = [[mask[i : i + tall, j : j + wide].mean() for j in range(0, kv_len, wide)] for i in range(0, q_len, tall)]
    np.testing.assert_allclose(shares(pattern, q_len, kv_len), want)


def test_a_picture_has_a_square_for_each_cell_that_is_seen() -> None:
    (picture,) = pictures(Causal(), 4, 4, 1)
    assert [(layer.level, layer.path) for layer in picture.layers] == [
        (4, "M0 0h1v1h-1zM0 1h2v1h-2zM0 2h3v1h-3zM0 3h4v1h-4z")
    ]
    assert picture.before == ()
    assert picture.density == 10 / 16


def test_heads_that_see_the_same_share_a_picture() -> None:
    drawn = pictures(PerHead({(0, 2): Window(1)}), 8, 8, 4, before=Full())
    assert [(p.pattern, p.places, bool(p.before)) for p in drawn] == [
        ("Window(left=1, right=1)", (0, 2), True),
        ("Full()", (1, 3), False),
    ]


@pytest.mark.parametrize(("pattern", "length"), [("Acme(3)", 8), ("Full()", 0), ("Full()", 1 << 20), ("", 8)])
def test_what_cannot_be_drawn_is_not(pattern: str, length: int) -> None:
    assert pictures(pattern, length, length, 2) == ()


# ---------------------------------------------------------------- what the page says
def test_the_way_back_is_a_policy(report: Report) -> None:
    """Optimizing with the shown policy leaves that site, and only that one, as it was."""
    model, args = tiny_models.causal()
    undone = json.loads(site_views(report)[0].undone)
    again = attnopt.optimize(model.eval(), attnopt.Policy.of(undone), args).report
    assert [site.status for site in again.sites] == ["unchanged", "rewritten"]


def test_lanes_and_labels(report: Report) -> None:
    (lane,) = lanes(site_views(report)).items()
    assert lane[0] == "layers.*"
    assert [view.label for view in lane[1]] == ["0", "1"]


def test_heads_of_a_pruned_attention(report: Report) -> None:
    view = site_views(report)[1]
    assert [(h.number, h.kept) for h in view.heads] == [(0, True), (1, False)]
    assert view.kv_heads == ()
    assert [(head, kept) for head, _, _, kept in view.heat] == [(0, True), (1, False)]


def test_heads_that_share_key_value_heads() -> None:
    model, args = tiny_models.causal()
    view = site_views(attnopt.optimize(model.eval(), GroupedQuery(kv_heads=1), args).report)[0]
    assert [(h.number, h.reads) for h in view.heads] == [(0, 8), (1, 8)]
    assert [(g.number, g.x) for g in view.kv_heads] == [(0, 8)]


def test_measures(report: Report) -> None:
    assert [m.name for m in measures(report)][-1] == "CPU time per call, measured"
    assert measures(report)[-1].share == 50
    assert len(measures(replace(report, cpu_seconds={}))) == 3


def test_the_form_comes_back_from_json(report: Report) -> None:
    again = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report
    assert again.sites[0].form_after == Form((0, 1), (0, 1), "Causal() & Window(left=3, right=0)")


def test_blocks_that_are_chosen_at_run_time_are_told() -> None:
    model, args = tiny_models.causal()
    found = attnopt.optimize(model.eval(), "dynamic-sparse(keep=0.5, block=4)", args).report
    assert "DynamicBlocks(" in found.sites[0].form_after.selection  # type: ignore[union-attr]
    assert "selects the blocks to keep for each input" in report_page(found)
    assert Report.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_pooled_keys_are_told() -> None:
    model, args, kwargs = tiny_models.full()
    found = attnopt.optimize(model.eval(), "pool-keys(3, heads=[1])", args, kwargs).report
    assert found.sites[0].form_after.pooling == "head 1 reads keys pooled by 3"  # type: ignore[union-attr]
    assert "Head 1 reads keys pooled by 3." in report_page(found)
    assert Report.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_report_without_forms_has_a_page(report: Report) -> None:
    old = report.to_json()
    for site in old["sites"]:
        for name in ("form_before", "form_after", "q_len", "kv_len", "importance"):
            del site[name]
    del old["cpu_seconds"]
    assert "layers.1" in report_page(Report.from_json(old))


def test_forms_that_contradict_themselves_have_a_page(report: Report) -> None:
    strange = replace(
        report.sites[0],
        form_before=Form((0,), (0,), "Full()"),
        form_after=Form((5, 6, 7), (1, 2, 3), "PerHead({9: Full()})"),
        importance=(float("nan"),),
    )
    assert "layers.0" in report_page(replace(report, sites=(strange,)))


def test_a_form_whose_heads_read_nothing_is_damage(report: Report) -> None:
    damaged = report.to_json()
    damaged["sites"][0]["form_after"]["kv_of_head"] = []
    with pytest.raises(attnopt.ArchiveError, match="2 heads, of which 0 read keys"):
        Report.from_json(damaged)


def test_folded_numbers() -> None:
    assert numbers((5, 0, 2, 3, 4)) == "0, 2-5"
    assert numbers(()) == ""
    assert (times(0.25), times(0.0)) == ("4", "∞")


# ---------------------------------------------------------------- notebooks
def test_notebooks_show_patterns_inspections_and_reports(report: Report) -> None:
    model, args = tiny_models.causal()
    for shown, wanted in [
        (PerHead({0: Window(2)}) & Causal(), "<svg"),
        (attnopt.inspect(model.eval(), args), "layers.<wbr>1"),
        (report, "<iframe srcdoc="),
    ]:
        fragment = shown._repr_html_()  # type: ignore[attr-defined]
        assert wanted in fragment
        assert is_balanced(fragment)


def test_a_picture_alone() -> None:
    assert picture_svg(Causal(), 16).count("<svg") == 1


# ---------------------------------------------------------------- a browser
LOOK = """<script>addEventListener("load", () => {
  const all = [...document.querySelectorAll("body *")];
  const wide = all.filter(e => !e.closest(".scroll") && !e.closest(".skip") && e.getBoundingClientRect().right > innerWidth + 1);
  const links = [...document.querySelectorAll("a[href]")];
  const names = links.map(a => a.getAttribute("aria-label") || a.textContent.trim());
  document.querySelectorAll("details").forEach(d => d.querySelector("summary").click());
  parent.document.title = JSON.stringify({
    width: innerWidth, wide: wide.map(e => e.outerHTML.slice(0, 90)), unnamed: names.filter(n => !n).length,
    dead: links.filter(a => !document.querySelector(a.getAttribute("href"))).length,
    open: document.querySelectorAll("details[open] pre").length, back: getComputedStyle(document.body).backgroundColor,
    unlabelled: all.filter(e => e.tagName == "svg" && !e.getAttribute("aria-label")).length,
    tabs: all.filter(e => e.tabIndex == 0).length,
  });
})</script>"""


@pytest.mark.subprocess
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize(("width", "dark"), [(360, False), (1200, True)])
def test_in_a_browser(report: Report, tmp_path: Path, width: int, dark: bool) -> None:
    seen = browser.seen(report_page(report), tmp_path, width, dark, LOOK)
    assert seen["width"] == width
    assert seen["wide"] == []  # nothing sticks out to the right
    assert (seen["unnamed"], seen["dead"], seen["unlabelled"]) == (0, 0, 0)
    assert seen["open"] == 3  # the ways back of two sites, and the policy
    assert seen["tabs"] >= 10
    assert seen["back"] == ("rgb(16, 19, 23)" if dark else "rgb(246, 247, 249)")
