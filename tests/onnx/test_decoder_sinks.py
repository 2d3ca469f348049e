"""Decoders with a window and sinks that keep both and no more: at every step they say what the whole sequence would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decoder_caches import CLOSE, about, exported, optimized, texts, whole
from tiny_decoder import Runtime, inputs

import attnopt
from attnopt.base.closeness import difference
from attnopt.passes import LocalWindow, PruneHeads
from attnopt.patterns import Causal, Sinks, Window

WINDOW, SINKS = 5, 3
POLICY = {"*": "fuse", "*1*": LocalWindow(WINDOW - 1, 0, sinks=SINKS)}


@pytest.fixture(scope="module")
def fast() -> attnopt.OptimizedModel:
    return optimized(POLICY)


@pytest.fixture(scope="module")
def file(fast: attnopt.OptimizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(fast, tmp_path_factory.mktemp("sinks") / "m", windows="rolling")


@pytest.mark.parametrize(
    "parts",
    [[1] * 60, [2] + [1] * 58, [40] + [1] * 20, [2, 9, 1, 20, 3, 1, 1] + [1] * 23],
    ids=["token by token", "a prompt shorter than the sinks", "a longer one", "a prompt in parts"],
)
@pytest.mark.parametrize(("spare", "shares"), [(0, True), (7, True), (3, False)])
def test_every_step_is_that_of_the_whole(
    fast: attnopt.OptimizedModel, file: Path, parts: Sequence[int], spare: int, shares: bool
) -> None:
    ids = texts(1, 60)  # twelve windows
    got = Runtime(file, 1, 64 if shares else 0, spare, shares).in_parts(ids, parts)
    want = whole(fast, ids)
    assert difference([got], [want]) < CLOSE
    assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_sequences_of_several_lengths(fast: attnopt.OptimizedModel, file: Path) -> None:
    ids, lengths, both = texts(2, 60), (30, 2), Runtime(file, 2, 64, 2)
    want = whole(fast, ids)
    for row, length in enumerate(lengths):
        alone = Runtime(file, 1, 64, 2)
        alone(ids[row : row + 1, :length])
        both.put(row, alone)
    for _ in range(25):
        at = both.lengths[:, None]
        assert difference([both(ids.gather(1, at))], [want.take_along_dim(at[..., None], 1)]) < CLOSE


def test_sinks_matter_here(fast: attnopt.OptimizedModel) -> None:
    ids, without = texts(1, 60), optimized({"*": "fuse", "*1*": LocalWindow(WINDOW - 1, 0)})
    assert difference([whole(without, ids)], [whole(fast, ids)]) > 100 * CLOSE


def test_a_layer_keeps_its_window_and_its_sinks(file: Path) -> None:
    size = {name: x.shape() for name, x in Runtime(file, 1, 64).cache.items()}
    assert size["past_key_values.1.key"] == [1, 2, WINDOW, 16]  # 8 features more: the operator takes multiples of 8
    assert size["past_key_values.1.sink_key"] == [1, 2, SINKS, 8]
    assert size["past_key_values.0.key"] == [1, 2, 64, 8]
    assert [layer["sinks"] for layer in about(file, "cache")] == [0, SINKS]
    assert sorted(p.name for p in file.parent.iterdir()) == ["cache.json", "model.onnx"]  # nothing that genai would run


@pytest.mark.slow  # exports another model
def test_scores_that_single_precision_could_not_exponentiate(tmp_path: Path) -> None:
    """Far above and far below zero, sinks against window."""
    fast = optimized({"*": LocalWindow(3, 0, sinks=2)})
    for layer in range(2):
        for name, x in fast.graph_module.named_parameters():
            if name.startswith(f"layers.{layer}.q."):
                x.data *= 30
    ids = texts(2, 40)
    run = Runtime(exported(fast, tmp_path / "m", windows="rolling"), 2, 0, 1)
    got, want = run.in_parts(ids, [9] + [1] * 31), whole(fast, ids)
    assert got.isfinite().all()
    assert difference([got], [want]) < 10 * CLOSE


@pytest.mark.slow
def test_heads_that_share_unevenly(tmp_path: Path) -> None:
    policy = {"*": [PruneHeads(heads=(0,)), LocalWindow(4, 0, sinks=2)]}
    fast, ids = optimized(policy), texts(1, 40)
    for pad_heads in (False, True):
        run = Runtime(exported(fast, tmp_path / str(pad_heads), windows="rolling", pad_heads=pad_heads), 1, 0, 2)
        assert difference([run.in_parts(ids, [7] + [1] * 33)], [whole(fast, ids)]) < CLOSE


@pytest.mark.slow
def test_in_int8(tmp_path: Path) -> None:
    fast, ids = optimized({"*": LocalWindow(7, 0, sinks=3)}, dim=16), texts(2, 40)
    run = Runtime(exported(fast, tmp_path / "m", windows="rolling", kv="int8", calibration=[inputs(ids)]), 2, 0, 2)
    assert difference([run.in_parts(ids, [12] + [1] * 28)], [whole(fast, ids)]) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["sdpa", "blocked"])
def test_another_spelling_of_the_pattern(backend: str, tmp_path: Path) -> None:
    pattern = (Sinks(2) & Causal()) | (Window(5, 7) & Causal())
    fast, ids = optimized({"*": attnopt.passes.Sparse(pattern)}, backend), texts(1, 30)
    run = Runtime(exported(fast, tmp_path / "m", windows="rolling"), 1, 0, 1)
    assert difference([run.in_parts(ids, [11] + [1] * 19)], [whole(fast, ids)]) < CLOSE


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "kept whole": (POLICY, {}, "which GroupQueryAttention does not mask"),
    "a window that does not roll": (
        {"*0*": LocalWindow(2, 0), "*1*": LocalWindow(40, 0, sinks=2)},
        {"windows": "rolling", "context_length": 30},
        "which GroupQueryAttention does not mask",
    ),
    "every third key": (LocalWindow(8, 0, dilation=3, sinks=1), {"windows": "rolling"}, "supports only"),
    "sinks that go out of sight": (
        attnopt.passes.Sparse(Causal() & (Sinks(2) | Window(5, 0)) & Window(1000, 0)),
        {"windows": "rolling"},
        "supports only",
    ),
    "sinks alone": (attnopt.passes.Sparse(Causal() & Sinks(3)), {"windows": "rolling"}, "supports only|no effect"),
}


@pytest.mark.parametrize(("policy", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(policy: Any, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(attnopt.ExportError, match=said):
        exported(optimized(policy), tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())
