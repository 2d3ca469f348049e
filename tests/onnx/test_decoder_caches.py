"""Decoders that keep a window or int8: at every step they have to say what the whole sequence would."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_decoder import generated, greedy
from tiny_decoder import END, VOCABULARY, Runtime, decoder, inputs
from torch import Tensor

import attnopt
from attnopt.base.closeness import difference
from attnopt.passes import LocalWindow, PruneHeads

WINDOWED = {"*": "fuse", "*1*": LocalWindow(4, 0)}  # five keys, its own included
TWO_WINDOWS = {"*0*": LocalWindow(2, 0), "*1*": LocalWindow(6, 0)}
CLOSE = 1e-5


def texts(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


def optimized(policy: Any = WINDOWED, backend: str = "sdpa", **options: Any) -> attnopt.OptimizedModel:
    return attnopt.optimize(
        decoder(**options), policy, (), inputs(texts(2, 12)), dynamic_shapes="auto", backend=backend
    )


def exported(fast: attnopt.OptimizedModel, folder: Path, **options: Any) -> Path:
    fast.export_decoder(folder, **{"context_length": 4096, "eos_token_id": END} | options)
    return folder / "model.onnx"


def about(file: Path, key: str) -> Any:
    import onnx

    return json.loads({p.key: p.value for p in onnx.load(str(file)).metadata_props}[f"attnopt.{key}"])


def whole(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(**inputs(ids))
    return made


# ---------------------------------------------------------------- rolling windows
@pytest.fixture(scope="module")
def fast() -> attnopt.OptimizedModel:
    return optimized()


@pytest.fixture(scope="module")
def rolling(fast: attnopt.OptimizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(fast, tmp_path_factory.mktemp("rolling") / "m", windows="rolling")


@pytest.mark.parametrize(
    "parts",
    [[3] + [1] * 57, [40] + [1] * 20, [2, 9, 1, 20, 3, 1, 1] + [1] * 23],
    ids=["a prompt shorter than the window", "a longer one", "a prompt in parts"],
)
@pytest.mark.parametrize(("spare", "shares"), [(0, True), (3, True), (100, True), (3, False)])
def test_every_step_is_that_of_the_whole(
    fast: attnopt.OptimizedModel, rolling: Path, parts: Sequence[int], spare: int, shares: bool
) -> None:
    ids = texts(1, 60)
    got = Runtime(rolling, 1, 64 if shares else 0, spare, shares).in_parts(ids, parts)
    assert difference([got], [whole(fast, ids)]) < CLOSE


def test_sequences_of_several_lengths(fast: attnopt.OptimizedModel, rolling: Path) -> None:
    """Each prompt alone, then a token of each at a time; in one call, prompts have one length."""
    ids, lengths, both = texts(2, 60), (30, 3), Runtime(rolling, 2, 64, 2)
    want = whole(fast, ids)
    for row, length in enumerate(lengths):
        alone = Runtime(rolling, 1, 64, 2)
        alone(ids[row : row + 1, :length])
        both.put(row, alone)
    for _ in range(25):
        at = both.lengths[:, None]
        assert difference([both(ids.gather(1, at))], [want.take_along_dim(at[..., None], 1)]) < CLOSE
    together = Runtime(rolling, 2, 64, 2)
    assert difference([together.in_parts(ids, [30] + [1] * 30)], [want]) < CLOSE
    with pytest.raises(Exception, match="too small for sequence_length"):
        Runtime(rolling, 2, 64, 2)(ids[:, :30], torch.tensor([30, 28]))


@pytest.fixture(scope="module")
def two_windows(tmp_path_factory: pytest.TempPathFactory) -> tuple[attnopt.OptimizedModel, Path]:
    fast = optimized(TWO_WINDOWS)
    return fast, exported(fast, tmp_path_factory.mktemp("two") / "m", windows="rolling")


def test_a_long_text_needs_no_more_room(two_windows: tuple[attnopt.OptimizedModel, Path]) -> None:
    fast, file = two_windows
    run = Runtime(file, 1, 0, 3)
    size = {name: x.shape() for name, x in run.cache.items()}
    assert [length for _, _, length, _ in size.values()] == [6, 6, 10, 10]
    ids = texts(1, 2000)
    got = run.in_parts(ids, [1] * 2000)
    assert {name: x.shape() for name, x in run.cache.items()} == size
    reach = 2 + 6 + 1  # what a token depends on
    with torch.no_grad():
        want = fast(**{name: x[:, -reach:] for name, x in inputs(ids).items()})
    assert difference([got[:, -1]], [want[:, -1]]) < CLOSE


def test_each_layer_has_a_buffer_of_its_own(two_windows: tuple[attnopt.OptimizedModel, Path], rolling: Path) -> None:
    fast, file = two_windows
    ids = texts(1, 30)
    assert difference([Runtime(file, 1, 0, 1).in_parts(ids, [12] + [1] * 18)], [whole(fast, ids)]) < CLOSE
    config = json.loads((file.parent / "genai_config.json").read_text("utf-8"))
    assert config["model"]["decoder"]["sliding_window"] == {
        "window_size": 7, "layers": [0, 1], "slide_key_value_cache": False, "slide_inputs": False,
    }  # fmt: skip
    assert [(layer["window"], layer["rolls"]) for layer in about(file, "cache")] == [(3, True), (7, True)]
    assert [(layer["window"], layer["rolls"]) for layer in about(rolling, "cache")] == [(None, False), (5, True)]


# ---------------------------------------------------------------- int8
@dataclass
class Rounding:
    """Rounds to the 255 steps of these sizes, [1, G, 1, D] of keys and of values."""

    steps: tuple[Tensor, Tensor]

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = ((x / s).round().clamp(-128, 127) * s for x, s in zip((k, v), self.steps, strict=True))
        return k, v


@dataclass
class Largest:
    """Notes the largest magnitude of each feature, [1, G, 1, D] of keys and of values."""

    found: tuple[Tensor, Tensor] = (torch.zeros(1), torch.zeros(1))

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        now = (x.abs().amax((0, 2), keepdim=True) for x in (k, v))
        self.found = cast("tuple[Tensor, Tensor]", tuple(map(torch.maximum, self.found, now)))
        return k, v


def coarse(file: Path, without_head: bool = False) -> Any:
    """The decoder over int8 keys and values in the steps of the file, by hand."""
    model = decoder()
    for layer, (k, v) in zip(model.layers, scales(file), strict=True):
        layer.stored = Rounding((k[:, [0, -1]], v[:, [0, -1]]))  # type: ignore[assignment]  # of two, or repeated for each head
        if without_head:
            layer.o.weight.data[:, :8] = 0  # type: ignore[union-attr, operator, index]
    return model


def scales(file: Path) -> list[tuple[Tensor, Tensor]]:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    weights = {x.name: torch.tensor(numpy_helper.to_array(x)) for x in graph.initializer}
    found = [node.input[12:14] for node in graph.node if node.op_type == "GroupQueryAttention"]
    return [(weights[k], weights[v]) for k, v in found]


@pytest.mark.parametrize("policy", ["fuse", PruneHeads(heads=(0,))], ids=["fuse", "keys repeated for each head"])
def test_int8_is_rounding_and_nothing_else(policy: Any, tmp_path: Path) -> None:
    seen, ids = texts(2, 40), texts(1, 30).flip(1)
    fast, padded = (
        optimized(policy, "sdpa" if policy == "fuse" else "blocked"),
        inputs(torch.cat([seen, texts(2, 60)[:, 40:]], 1)),
    )
    padded["attention_mask"][:, 40:] = 0  # what follows says nothing about scales
    batches = [{name: x[row : row + 1] for name, x in padded.items()} for row in (0, 1)]
    file = exported(fast, tmp_path / "m", kv="int8", calibration=batches)
    run = Runtime(file, 1, 32)
    assert {x.data_type() for x in run.cache.values()} == {"tensor(int8)"}
    got = run.in_parts(ids, [12, 3] + [1] * 15)
    rounded = difference([got], [whole(coarse(file, policy != "fuse"), ids)])
    exact = difference([got], [whole(fast, ids)])
    assert rounded < 2e-3 < exact < 0.1
    assert 0 < about(file, "cache_error") < 0.1


def test_scales_hold_further_on_in_the_context(tmp_path: Path) -> None:
    """A dozen tokens hardly turn the slowest pair of features; four thousand do.  Their largest values are smaller, too."""
    example = inputs(texts(2, 12))
    padded = inputs(torch.cat([texts(2, 12), texts(2, 40)[:, 12:]], 1))
    padded["attention_mask"][:, 12:] = 0  # what follows says nothing about scales
    few = {name: x[:1, :2] for name, x in example.items()}
    file = exported(optimized("fuse"), tmp_path / "m", kv="int8", calibration=[padded] * 15 + [few])
    model, noted = decoder(), [Largest(), Largest()]
    for layer, largest in zip(model.layers, noted, strict=True):
        layer.stored = largest  # type: ignore[assignment]
    with torch.no_grad():
        for first in range(0, 4096 - 12, 29):
            model(**example | {"position_ids": example["position_ids"] + first})
    room = (math.log(4096) / math.log(15 * 24 + 2)) ** 0.5
    for (of_keys, of_values), largest in zip(scales(file), noted, strict=True):
        keys, values = (
            (127 * s).flatten() / most.flatten() for s, most in zip((of_keys, of_values), largest.found, strict=True)
        )
        torch.testing.assert_close(values, torch.full_like(values, room), atol=1e-3, rtol=0)
        assert 0.9 * room < keys.min() <= keys.max() < 1.01 * room


@pytest.mark.slow
def test_few_tokens_leave_room_for_a_whole_context(tmp_path: Path) -> None:
    """Other texts are rounded by the scales of a dozen tokens, not clipped."""
    fast, ids, few = optimized("fuse"), texts(6, 40).flip(1), inputs(texts(1, 12))
    narrow, wide = (
        exported(fast, tmp_path / f"{length}", kv="int8", calibration=[few], context_length=length)
        for length in (12, 4096)
    )
    errors = [difference([whole(coarse(file), ids)], [whole(fast, ids)]) for file in (narrow, wide)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.slow
def test_windows_in_int8(tmp_path: Path) -> None:
    fast, ids = optimized(dim=16), texts(2, 40)
    files = [
        exported(fast, tmp_path / windows, kv="int8", calibration=[inputs(ids)], windows=windows)
        for windows in ("masked", "rolling")
    ]
    masked, rolls = (Runtime(f, 2, 41, 2) for f in files)
    assert sorted(x.shape()[2] for x in rolls.cache.values()) == [7, 7, 41, 41]
    parts = [12] + [1] * 28
    assert difference([rolls.in_parts(ids, parts)], [masked.in_parts(ids, parts)]) < CLOSE


# ---------------------------------------------------------------- generation, and what is refused
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [WINDOWED, TWO_WINDOWS], ids=["a window in one layer", "two windows"])
def test_a_runtime_generates_the_same(policy: Any, tmp_path: Path) -> None:
    fast = optimized(policy)
    exported(fast, tmp_path / "m", context_length=48, windows="rolling")
    wanted = [greedy(fast, prompt, 44) for prompt in PROMPTS]
    assert generated(tmp_path / "m", PROMPTS, 44) == wanted
    assert generated(tmp_path / "m", PROMPTS[:1], 44) == wanted[:1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_runtime_needs_no_memory_for_what_has_rolled_out(tmp_path: Path) -> None:
    """By default ONNX Runtime would keep 70 KB for each length of the text."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")
    exported(optimized(dim=16), tmp_path / "m", context_length=4000, windows="rolling")
    parameters = genai.GeneratorParams(model := genai.Model(str(tmp_path / "m")))
    parameters.set_search_options(max_length=3000, min_length=3000, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(PROMPTS[:1])

    def resident() -> int:
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
        return int(line.split()[1])

    for _ in range(500):
        generator.generate_next_token()
    before = resident()
    for _ in range(2400):
        generator.generate_next_token()
    assert resident() - before < 16_000  # KB


@pytest.mark.slow
def test_a_runtime_generates_from_int8(tmp_path: Path) -> None:
    """What the file itself says step by step: the model may choose other tokens."""
    ids = torch.tensor(PROMPTS)
    run = Runtime(exported(optimized(dim=16), tmp_path / "m", windows="rolling", kv="int8"), 2, 48, 1)
    logits = run(ids)
    while ids.shape[1] < 44:
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        logits = run(ids[:, -1:])
    assert generated(tmp_path / "m", PROMPTS, 44) == ids.tolist()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no window": ({"windows": "rolling", "context_length": 5}, 'windows="rolling" has no effect'),
    "another kind": ({"windows": "short"}, 'windows=\'short\': expected "masked" or "rolling"'),
    "another type": ({"kv": "int4"}, 'kv=\'int4\': expected "float32" or "int8"'),
    "data for nothing": ({"calibration": [inputs(texts(2, 8))]}, "calibration is for the scales"),
    "narrow heads": ({"kv": "int8", "windows": "rolling"}, "heads have 8 features"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(fast: attnopt.OptimizedModel, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(attnopt.ExportError, match=said):
        exported(fast, tmp_path / "m", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # exports a whole model
def test_calibration_that_says_little_is_noticed(tmp_path: Path) -> None:
    one, many = inputs(torch.zeros(1, 1, dtype=torch.int64)), inputs(texts(6, 40))
    model = decoder()
    for layer in model.layers:
        layer.kv.weight.data *= 3  # its keys decide
    fast = attnopt.optimize(model, "fuse", (), inputs(texts(2, 12)), dynamic_shapes="auto", backend="sdpa")
    with pytest.raises(attnopt.ExportError, match="the logits of the decoder and the model differ") as caught:
        exported(fast, tmp_path / "m", kv="int8", calibration=[one])
    assert "int8 keys and values are too coarse" in str(caught.value)
    exported(fast, tmp_path / "m", kv="int8", calibration=[many])
    with pytest.raises(attnopt.ExportError, match="the calibration data is not valid"):
        exported(fast, tmp_path / "m", kv="int8", calibration=[])
