"""The page of an atlas: what it says, how large it is, and what a browser makes of it."""

from __future__ import annotations

import base64
import html
import io
import re
from dataclasses import replace
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from browser import CHROMIUM, is_balanced
from matplotlib import image

import attnopt
from attnopt import plot
from attnopt.errors import AttnoptError
from attnopt.ir.curves import Curves
from attnopt.render.atlas_page import atlas_page
from attnopt.render.atlas_view import AtlasView, distances, hue, label
from attnopt.render.png import COLOUR, png
from attnopt.report.atlas import Atlas, HeadMaps, Missing

EVIL = "layers.0</script><script>alert(1)</script>"


def made(layers: int, heads: int, cells: int = 32, clusters: int = 6, name: str = "layers.{}.attn") -> Atlas:
    """Random maps, with one statistic of all heads and one of the first attention alone."""
    torch.manual_seed(0)
    sites = {}
    for layer in range(layers):
        maps = torch.randn(heads, cells, cells).mul(2).softmax(-1)
        profile = Curves.of("distance", [0, 1, 2, 4, 8, 16], torch.rand(heads, 6).softmax(-1))
        numbers = range(layer * heads, (layer + 1) * heads)
        sites[name.format(layer)] = HeadMaps(
            tuple(range(heads)), maps, (5, 40), (5, 40), profile, tuple(i % clusters for i in numbers),
            tuple((float(i % 7), float(i % 5)) for i in numbers),
        )  # fmt: skip
    first = next(iter(sites))
    everywhere = {
        site: tuple(float((7 * i + 3) % 11) - layer for i in range(heads)) for layer, site in enumerate(sites)
    }
    return Atlas(sites, {"entropy": everywhere, "reach & <more>": {first: everywhere[first]}}, (), 8)


# ---------------------------------------------------------------- pictures
def test_a_picture_is_its_numbers() -> None:
    levels = np.linspace(0, 1, 12).reshape(3, 4)
    read = image.imread(io.BytesIO(png(levels)), format="png")
    np.testing.assert_allclose(read[..., 3], levels, atol=0.5 / 31 + 1 / 255)
    np.testing.assert_allclose(read[..., :3], np.broadcast_to(np.array(COLOUR) / 255, (3, 4, 3)), atol=1 / 255)


def test_pictures_and_bars_are_those_of_the_maps() -> None:
    atlas = made(2, 3, cells=5)
    view = AtlasView(atlas).heads[4]
    own = atlas["layers.1.attn"]
    data = re.fullmatch(r"data:image/png;base64,(.*)", view.picture)
    assert data is not None
    read = image.imread(io.BytesIO(base64.b64decode(data[1])), format="png")
    np.testing.assert_allclose(read[..., 3] ** 2, own.maps[1].numpy(), atol=0.04)
    assert own.profile is not None
    assert [b.share for b in view.bars] == list(own.profile.values[1])
    assert max(b.height for b in view.bars) == 20
    assert (view.name, view.label, view.cluster) == ("layers.1.attn, head 1", "1", 4)


def test_labels_hues_and_octaves() -> None:
    assert [label(name) for name in ("", "attn", "encoder.layers.3.attn", "blocks.1.layers.2")] == [
        "(root)", "attn", "3", "1.2",
    ]  # fmt: skip
    assert len({hue(i) for i in range(20)}) == 20
    assert [distances(k) for k in range(4)] == ["0 tokens", "1 token", "2 to 3 tokens", "4 to 7 tokens"]


def test_levels_are_between_the_least_and_the_largest_of_all_heads() -> None:
    atlas = made(2, 4)
    heads = AtlasView(atlas).heads
    every = [x for row in atlas.statistics["entropy"].values() for x in row]
    want = [(x - min(every)) / (max(every) - min(every)) for x in every]
    assert [h.values["entropy"].level for h in heads] == pytest.approx(want)  # type: ignore[union-attr]
    assert [h.values["reach & <more>"] is None for h in heads] == [False] * 4 + [True] * 4


# ---------------------------------------------------------------- the page
def test_the_page_is_small_and_needs_no_network() -> None:
    page = atlas_page(made(12, 12))
    assert len(page.encode()) < 2_000_000 / 2
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "@import" not in page
    assert "url(" not in page


def test_what_comes_from_the_model_is_escaped() -> None:
    atlas = replace(made(1, 3, name=EVIL), missing=(Missing(EVIL, "<b>", "\"'><img src=x>"),))
    page = atlas_page(atlas)
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert "<more>" not in page
    assert is_balanced(atlas._repr_html_())
    assert is_balanced(re.sub(r"<script>.*?</script>|<style>.*?</style>|<!DOCTYPE html>", "", page, flags=re.DOTALL))


def test_everything_is_there_without_a_script() -> None:
    page = re.sub(r"<script>.*?</script>", "", atlas_page(made(3, 4)), flags=re.DOTALL)
    assert page.count('class="head hued"') == 12
    assert page.count('class="detail card hued"') == 12
    assert "not measured" in page


def test_heads_without_profiles_and_one_head_alone() -> None:
    one = made(1, 1)
    (own,) = one.values()
    alone = replace(one, sites={"": replace(own, profile=None)}, statistics={})
    assert "(root)" in atlas_page(alone)
    assert "(root)" in str(alone)


def test_the_table() -> None:
    text = str(replace(made(2, 2), missing=(Missing("layers.9", "map", "it was not recognised"),)))
    assert "4 heads of 2 attentions, on 8 sequences" in text
    assert "█" in text
    assert "it was not recognised" in text


# ---------------------------------------------------------------- figures
def test_figures() -> None:
    atlas = made(2, 3, cells=4)
    ax = plot.atlas(atlas)
    shown = ax.images[0].get_array()
    np.testing.assert_allclose(shown[5:9, 10:14], atlas["layers.1.attn"].maps[2].sqrt())
    assert np.isnan(np.ma.filled(shown, np.nan)[4]).all()
    coloured = plot.atlas(atlas, by="entropy")
    assert len(coloured.patches) == 6
    points = plot.head_kinds(atlas).collections
    assert sum(len(p.get_offsets()) for p in points) == 6
    with pytest.raises(AttnoptError, match="no statistic 'entropie'"):
        plot.atlas(atlas, by="entropie")


# ---------------------------------------------------------------- a browser
LOOK = """<script>addEventListener("load", async () => {
  const at = id => document.getElementById(id), heads = () => [...document.querySelectorAll("#heads .head")];
  const choose = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("change")); };
  const soon = () => new Promise(done => setTimeout(done, 50));
  const all = [...document.querySelectorAll("body *")];
  const inside = e => e.closest(".scroll, .skip, .sr") || e.getBoundingClientRect().right <= innerWidth + 1;
  const wide = () => all.filter(e => !inside(e));
  const names = [...document.querySelectorAll("a[href]")].map(a => a.getAttribute("aria-label") || a.textContent.trim());
  const svgs = [...document.querySelectorAll("svg:not([aria-hidden])")].filter(e => !e.getAttribute("aria-label"));
  const back = e => getComputedStyle(e).backgroundImage;
  const told = { width: innerWidth, wide: wide().map(e => e.outerHTML.slice(0, 90)), unnamed: names.filter(n => !n).length,
    unlabelled: svgs.length, back: getComputedStyle(document.body).backgroundColor, shown: heads().map(h => h.id),
    picture: at("tile-0").querySelector("svg").getBoundingClientRect().width,
    dead: [...document.querySelectorAll("a[href], use")].filter(a => !document.querySelector(a.getAttribute("href"))).length };
  choose("order", "0 -1");
  told.sorted = heads().map(h => Number(h.dataset.texts.split("|")[0]));
  told.colour = at("colour").value; told.most = back(heads()[0]); told.least = back(heads().at(-1));
  told.marks = heads().map(h => h.querySelector(".mark").textContent);
  choose("order", "1 1");
  told.without = heads().filter(h => h.classList.contains("none")).length;
  told.groups = document.querySelectorAll("#heads .group").length;
  choose("order", "cluster");
  told.clusters = heads().map(h => Number(h.dataset.cluster));
  told.status = document.querySelector("[role=status]").textContent;
  told.wide2 = wide().length;
  choose("order", "layer"); choose("colour", "cluster");
  told.again = heads().map(h => h.id); told.mark = at("tile-1").querySelector(".mark").textContent;
  heads()[2].click(); await soon();
  const open = document.querySelector(".detail:target");
  told.open = open && open.id; told.focus = document.activeElement.id; told.wide3 = wide().length;
  told.inside = open.getBoundingClientRect().top >= 0;
  dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" })); await soon();
  told.next = document.querySelector(".detail:target").id;
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true })); await soon();
  told.closed = document.querySelector(".detail:target") === null; told.back_at = document.activeElement.id;
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
  told.left = document.activeElement.id;
  parent.document.title = JSON.stringify(told);
})</script>"""


@pytest.mark.subprocess
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize(("width", "dark"), [(375, False), (1200, True)])
def test_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    atlas = made(3, 14, name="model.decoder.with_a_rather_long_name.layers.{}.self_attention_of_the_decoder")
    seen = browser.seen(atlas_page(atlas), tmp_path, width, dark, LOOK)
    ids = [f"tile-{i}" for i in range(42)]
    assert seen["width"] == width
    assert (seen["wide"], seen["wide2"], seen["wide3"]) == ([], 0, 0)  # nothing sticks out to the right
    assert (seen["unnamed"], seen["unlabelled"], seen["dead"]) == (0, 0, 0)
    assert seen["back"] == ("rgb(16, 19, 23)" if dark else "rgb(246, 247, 249)")
    assert seen["picture"] >= 40
    assert seen["shown"] == seen["again"] == ids
    every = [x for row in atlas.statistics["entropy"].values() for x in row]
    assert seen["sorted"] == sorted(every, reverse=True)
    assert seen["colour"] == "0"
    assert seen["most"] != seen["least"]
    assert [float(x) for x in seen["marks"]] == seen["sorted"]
    assert (seen["without"], seen["groups"]) == (28, 2)
    assert seen["clusters"] == sorted(seen["clusters"])
    assert seen["status"] == "ordered by cluster"
    assert seen["mark"] == "1"
    assert (seen["open"], seen["focus"], seen["inside"], seen["next"]) == ("head-2", "head-2", True, "head-3")
    assert (seen["closed"], seen["back_at"], seen["left"]) == (True, "tile-3", "tile-2")


@pytest.mark.subprocess
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_runs_nothing_of_the_model(tmp_path: Path) -> None:
    told = "{ scripts: document.scripts.length, heads: document.querySelectorAll('.head').length }"
    look = f"<script>parent.document.title = JSON.stringify({told})</script>"
    assert browser.seen(atlas_page(made(1, 3, name=EVIL)), tmp_path, 400, False, look) == {"scripts": 2, "heads": 3}


def test_a_notebook_shows_the_page_that_stays_in_its_frame() -> None:
    """A link such as "#head-1" would otherwise be one to the notebook's own address."""
    frame = made(1, 2)._repr_html_()
    assert frame.startswith('<iframe srcdoc="')
    assert html.unescape(frame).count('<base href="about:srcdoc">') == 1
    assert attnopt.Atlas is Atlas
