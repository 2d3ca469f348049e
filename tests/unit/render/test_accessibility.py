"""axe-core on the pages of a report, an atlas and a search, in Chromium: on a phone and on a desktop, light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import browser
import pytest
import tiny_models
import torch
from browser import AXE, CHROMIUM

import attnopt
from attnopt.passes import LocalWindow, PruneHeads
from attnopt.render.atlas_page import atlas_page
from attnopt.render.page import report_page
from attnopt.render.policy_search import search_page

LOOK = """<script>addEventListener("load", async () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const found = await axe.run(document, {runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]});
  parent.document.title = JSON.stringify({
    violations: found.violations.map(v => [v.id, v.help, ...v.nodes.slice(0, 3).map(n => n.html.slice(0, 120))]),
    passed: found.passes.map(p => p.id),
  });
})</script>"""


def _report() -> str:
    model, args = tiny_models.causal()
    policy = {"layers.0": LocalWindow(left=3), "layers.1": PruneHeads(heads=[1])}
    fast = attnopt.optimize(model.eval(), policy, args)
    return report_page(fast.report.with_importance(attnopt.head_importance(model, [args])))


def _atlas() -> str:
    model, (x,) = tiny_models.causal()
    data = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    return atlas_page(attnopt.atlas(model.eval(), data, ["distance", "entropy"], clusters=2))


def _search() -> str:
    model, args = tiny_models.causal()
    choice = attnopt.Choice(None, LocalWindow(left=3))
    return search_page(
        attnopt.search(model.eval(), choice, args, calibration=[args], budget=attnopt.Budget(flops=0.95)).report
    )


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.skipif(AXE is None, reason="there is no axe-core: npm install --no-save axe-core")
@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1200, False), (1200, True)])
@pytest.mark.parametrize("page", [_report, _atlas, _search], ids=["report", "atlas", "search"])
def test_axe_finds_nothing(page: Callable[[], str], width: int, dark: bool, tmp_path: Path) -> None:
    assert AXE is not None
    source = AXE.read_text("utf-8").replace("</script", "<\\/script")
    seen = browser.seen(page(), tmp_path, width, dark, f"<script>{source}</script>{LOOK}")
    assert seen["violations"] == [], json.dumps(seen["violations"], indent=1)
    assert {"color-contrast", "html-has-lang", "region"} <= set(seen["passed"])


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.skipif(AXE is None, reason="there is no axe-core: npm install --no-save axe-core")
def test_axe_finds_what_is_wrong(tmp_path: Path) -> None:
    assert AXE is not None
    page = (
        _report().replace("</body>", '<p style="color:#bbb;background:#fff">pale</p></body>').replace(' lang="en"', "")
    )
    source = AXE.read_text("utf-8").replace("</script", "<\\/script")
    seen = browser.seen(page, tmp_path, 1200, False, f"<script>{source}</script>{LOOK}")
    assert {"color-contrast", "html-has-lang"} <= {v[0] for v in seen["violations"]}
