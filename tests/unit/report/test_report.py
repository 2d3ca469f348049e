"""The report as text, JSON and page, and the tables of the command line."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from attnopt.errors import ArchiveError
from attnopt.ir.cost import Cost
from attnopt.ir.projection import Projection
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import NearMiss, Site
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import Causal, Full, Window
from attnopt.render.numbers import amount, relative
from attnopt.render.tables import inspection_json, inspection_table, report_table, to_text
from attnopt.report.inspection import Inspection
from attnopt.report.report import Report, SiteReport

KNOWN = Projection(weight="w", rows=((0, 1), (2, 3)))
UNKNOWN = Projection(why="it is computed from an input")

REWRITTEN = SiteReport(
    name="encoder.layers.0.attn",
    status="rewritten",
    where="model.py:88",
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    value_dim=64,
    scale=0.125,
    is_cross=False,
    spec_before="Full()",
    spec_after="Window(left=128, right=128)",
    cost_before=Cost(2_000_000, 1000, 6144),
    cost_after=Cost(1_500_000, 750, 6144),
    passes=("fuse", "local-window"),
    backend="sdpa",
    error=1.25e-7,
    notes=("the weights are shared with encoder.layers.1",),
)
UNCHANGED = replace(
    REWRITTEN,
    name="",
    status="unchanged",
    where="",
    spec_after="Full()",
    cost_after=REWRITTEN.cost_before,
    passes=(),
    backend=None,
    error=None,
    notes=(),
)
REFUSED = replace(
    UNCHANGED,
    name="decoder.layers.0.cross",
    status="refused",
    where="model.py:120",
    is_cross=True,
    refusals={
        "local-window": Refusal(
            "needs-self-attention",
            "one sequence",
            "keys of another length",
            "model.py:120",
            'leave cross-attention out with {"decoder.*.cross": []}',
        )
    },
)
MISS = NearMiss(
    "decoder.layers.3.attn",
    Refusal("escapes", found="scores used by `aux_head`", where="model.py:150"),
    "model.py:141",
)
REPORT = Report(
    sites=(REWRITTEN, UNCHANGED, REFUSED),
    near_misses=(MISS,),
    policy={"*": ["local-window(left=128)"]},
    error=3e-2,
    seconds={"capture": 1.5, "verify": 0.25},
    warnings=("one warning",),
    versions={"torch": "2.13.0"},
    fixed_axes=("input_ids axis 1: 12, because of `view` in model.py:9",),
)

GOLDEN = """\
attnopt: 3 attentions found, 1 rewritten, 2 left as they were, 1 not matched
  encoder.layers.0.attn   model.py:88   fuse, local-window: Full() -> Window(left=128, right=128) on sdpa, error 1.2e-07
    note: the weights are shared with encoder.layers.1
  (root)   unchanged
  decoder.layers.0.cross   model.py:120
    local-window refused [needs-self-attention]: expected one sequence, found keys of another length
      hint: leave cross-attention out with {"decoder.*.cross": []}
  decoder.layers.3.attn   model.py:141
    not matched [escapes]: found scores used by `aux_head` (model.py:150)
  size constraint: input_ids axis 1: 12, because of `view` in model.py:9
  warning: one warning
  largest relative difference of the outputs on the example inputs: 3.0e-02"""


def test_text_is_golden() -> None:
    assert str(REPORT) == GOLDEN


def test_text_of_one_site() -> None:
    assert str(Report(sites=(UNCHANGED,))).splitlines()[0] == (
        "attnopt: 1 attention found, 0 rewritten, 1 left as they were"
    )


def test_json_is_plain_and_comes_back() -> None:
    data = json.loads(json.dumps(REPORT.to_json(), allow_nan=False))
    assert Report.from_json(data) == REPORT
    assert data["headline"] == "3 attentions found, 1 rewritten, 2 left as they were, 1 not matched"


def test_json_of_strange_policies_is_plain() -> None:
    report = Report(sites=(), policy={"*": {"pattern": Causal(), "heads": (1, 2)}})
    assert json.loads(json.dumps(report.to_json()))["policy"]["*"]["heads"] == [1, 2]


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 99},
        {"sites": [{"name": "a"}]},
        {"sites": 3},
        {"near_misses": [{"name": "a", "where": "", "refusal": {"nonsense": 1}}]},
        {"policy": 7},
    ],
)
def test_a_damaged_report_is_an_archive_error(damage: dict[str, object]) -> None:
    with pytest.raises(ArchiveError, match="not an attnopt report"):
        Report.from_json({**REPORT.to_json(), **damage})


def test_a_wrong_status_is_an_archive_error() -> None:
    data = REPORT.to_json()
    data["sites"][0]["status"] = "<script>"
    with pytest.raises(ArchiveError, match="status"):
        Report.from_json(data)


class _Page(HTMLParser):
    """Checks that tags are balanced, and collects what is looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr") and self.get_starttag_text()[-2:] != "/>":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(report: Report, folder: Path) -> _Page:
    path = report.to_html(folder / "report.html")
    page = _Page()
    page.feed(path.read_text("utf-8"))
    page.close()
    assert page.open == []
    return page


def test_page_tells_everything(tmp_path: Path) -> None:
    page = _page(REPORT, tmp_path)
    said = re.sub(r"\s+", " ", page.text)
    for wanted in (
        "encoder.layers.0.attn",
        "(root)",
        "needs-self-attention",
        "escapes",
        "Window(left=128, right=128)",
    ):
        assert wanted in said
    for wanted in ("-25.0 %", "1.2e-07", "input_ids axis 1", "one warning", "torch 2.13.0", "capture 1.50 s"):
        assert wanted in said
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_page_needs_no_network_and_fits_a_phone(tmp_path: Path) -> None:
    page = _page(REPORT, tmp_path)
    assert not [tag for tag, attributes in page.tags if "src" in attributes or tag in ("script", "link")]
    targets = {attributes["href"] for _, attributes in page.tags if "href" in attributes}
    assert targets <= {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in page.text
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_page_escapes_everything(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\"'&"
    site = replace(
        REFUSED,
        name=evil,
        where=evil,
        spec_before=evil,
        spec_after=evil + "2",
        passes=(evil,),
        backend=evil,
        notes=(evil,),
        refusals={evil: Refusal(evil, evil, evil, evil, evil)},
    )
    report = Report(
        (site,), (NearMiss(evil, Refusal(evil), evil),), {evil: evil}, 0.1, {evil: 1.0}, (evil,), {evil: evil}, (evil,)
    )
    page = _page(report, tmp_path)
    assert not [tag for tag, _ in page.tags if tag in ("img", "script")]
    assert page.text.count("<img src=x") > 10
    assert not [value for _, attributes in page.tags for value in attributes if value.startswith("on")]


def test_page_of_nothing(tmp_path: Path) -> None:
    assert "No attention found" in _page(Report(sites=()), tmp_path).text


def test_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="cannot write"):
        REPORT.to_html(tmp_path / "missing" / "report.html")


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0"), (999, "999"), (1500, "1.5 k"), (2_000_000, "2 M"), (3.14159e9, "3.14 G"), (1e12, "1 T")]
)
def test_amount(n: float, text: str) -> None:
    assert amount(n) == text


def test_relative() -> None:
    assert relative(75, 100) == "-25.0 %"
    assert relative(100, 100) == relative(5, 0) == ""


def _inspection() -> Inspection:
    plain = AttentionSpec((0, 1), (0, 1), (0, 1), 64, 64, 0.125, Full())
    grouped = AttentionSpec(
        (0, 1, 2, 3),
        (0, 1),
        (0, 0, 1, 1),
        64,
        32,
        0.1,
        Full(),
        True,
        True,
        softcap=30.0,
        is_cross=True,
        positions=("rope",),
    )
    projections = {"q": KNOWN, "k": KNOWN, "v": UNKNOWN, "out": KNOWN}
    causal = replace(plain, seen_as=Causal() & Window(left=3, right=0))
    sites = Site("", causal, projections, "model.py:3"), Site("decoder.attn", grouped, {}, "model.py:9")
    return Inspection(sites, (MISS,), 3)


def test_inspection_table() -> None:
    text = str(_inspection())
    assert text == to_text(inspection_table(_inspection()))
    rows = {line.split()[0]: re.sub(r"\s+", " ", line) for line in text.splitlines() if line.strip()}
    assert "2 64 self" in rows["(root)"]
    assert "q k v? out" in rows["(root)"]
    assert "4 / 2 kv 64 / 32 v cross" in rows["decoder.attn"]
    assert "q? k? v? out?" in re.sub(r"\s+", " ", text)
    assert "escapes" in rows["decoder.layers.3.attn"]
    assert max(map(len, text.splitlines())) <= 120
    assert "\x1b" not in text


def test_inspection_json() -> None:
    data = json.loads(json.dumps(inspection_json(_inspection())))
    assert data["sites"][1]["extras"] == ["bias", "mask", "softcap 30", "rope"]
    assert data["sites"][0]["projections"]["v"]["why"] == "it is computed from an input"
    assert data["near_misses"][0]["refusal"]["code"] == "escapes"


def test_names_are_never_read_as_markup() -> None:
    text = to_text(report_table(Report(sites=(replace(REWRITTEN, name="a[red]b[/red]"),))), width=200)
    assert "a[red]b[/red]" in text
