"""``attnopt search``: a policy file, a page and JSON; data of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from command_line import error_of, json_of
from places import SUPPORT

import attnopt
from attnopt.cli import main as cli
from attnopt.cli import search as cli_search
from attnopt.policy_search.search import Progress

MODEL, DATA = "tiny_models:causal", "tiny_models:batches"
SPACE = "choice(None, local-window(left=4), local-window(left=1))"


@pytest.fixture(autouse=True)
def in_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SUPPORT)


def test_a_policy_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, html, state = (tmp_path / name for name in ("policy.yaml", "front.html", "state.json"))
    given = (MODEL, "--data", DATA, "--flops", "0.95", "--out", str(out), "--html", str(html), "--resume", str(state))
    found = json_of(capsys, "search", *given, "--policy", SPACE)
    best = found["search"]["best"]
    assert best["costs"]["flops"] <= 0.95 * found["search"]["original"]["flops"]
    assert found["policy"]
    assert found["written"] == {"policy": str(out), "html": str(html)}
    assert "<svg" in html.read_text()
    model, args = tiny_models.causal()
    fast = attnopt.optimize(model.eval(), str(out), args)
    assert [s.spec_after for s in fast.report.sites] != [s.spec_before for s in fast.report.sites]
    assert cli.main(["search", *given, "--policy", SPACE, "--minutes", "5"]) == 0
    printed = capsys.readouterr().out
    assert "budget: flops 0.95 of the original" in printed
    assert f"policy: {out}" in printed


def test_saved_calibration_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.safetensors"
    attnopt.Calibration.of(tiny_models.batches()).save(path)
    options = ("--flops", "0.95", "--policy", SPACE)
    of_file = json_of(capsys, "search", MODEL, "--data", str(path), *options)
    of_function = json_of(capsys, "search", MODEL, "--data", DATA, *options)
    assert of_file["policy"] == of_function["policy"]


def test_texts_go_through_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch import nn

    from attnopt.cli import texts
    from attnopt.cli.data import Source, data_of
    from attnopt.cli.load_model import Named

    asked: list[tuple[str, ...]] = []

    def encode(given: list[str], **options: object) -> dict[str, torch.Tensor]:
        asked.append(tuple(given))
        return {
            "input_ids": torch.ones(len(given), 3),
            "attention_mask": torch.ones(len(given), 3),
            "ignored": torch.ones(1),
        }

    class Takes(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return input_ids * attention_mask

    monkeypatch.setattr(texts, "_tokenizer", lambda name: encode)
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(["longer text", "", "a", *["text"] * 16]))
    source = Source(str(path), "some", 16)
    found = list(data_of(source, Named(Takes())).batches)
    assert [len(given) for given in asked] == [16, 2]
    assert asked[0][0] == "a"
    assert set(found[0]) == {"input_ids", "attention_mask"}
    of_file = list(data_of(source, None, ("attention_mask", "input_ids")).batches)
    assert [len(batch) for batch in of_file] == [2, 2]
    with pytest.raises(attnopt.AttnoptError, match="but the model takes pixels"):
        data_of(source, None, ("pixels",))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("nothing.txt", "holds texts, and there is no tokenizer"),
        ("nothing", "there is no file nothing"),
        ("tiny_models:constant", "is a int, expected a function"),
        ("tiny_models:without_inputs", "returned Stack, expected an iterable of batches"),
        ("tiny_models:failing", "no such checkpoint"),
        ("nothing.safetensors", "there is no file nothing.safetensors"),
    ],
)
def test_data_that_is_none(data: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in error_of(capsys, "search", MODEL, "--data", data, "--flops", "0.9")


def test_an_impossible_budget(capsys: pytest.CaptureFixture[str]) -> None:
    told = error_of(capsys, "search", MODEL, "--data", DATA, "--flops", "0.01", "--policy", SPACE)
    assert "the least possible is" in told
    assert "no resource is limited" in error_of(capsys, "search", MODEL, "--data", DATA)


@pytest.mark.parametrize("options", [("--latency", "x"), ("--at", "0"), ("--at", "1,2,3"), ("--divergence", "l2")])
def test_usage(options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["search", MODEL, "--data", DATA, *options])
    assert stopped.value.code == 2


def test_the_live_table() -> None:
    from attnopt.render.tables import to_text

    text = to_text(cli_search.progress_table(Progress("swaps", 12.5, 0.25, {"flops": 1e6})))
    assert "searching: swaps" in text
    assert "12.5" in text
    assert "0.25" in text
    assert "nothing yet" in to_text(cli_search.progress_table(Progress("swaps", 0.0, None, {})))
