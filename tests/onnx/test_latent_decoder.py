"""Decoders over a cache of latents: at every step they have to say what the whole sequence would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decoder_caches import about, texts, whole
from tiny_decoder import END, Layer, decoder, inputs
from torch import Tensor, nn

import attnopt
from attnopt.base.closeness import difference
from attnopt.onnx.export.latent_decoder import LatentDecoder
from attnopt.passes import LatentKv, LocalWindow, PruneHeads

CLOSE = 1e-5
NARROW = {"*0*": LatentKv(8), "*1*": LatentKv(12)}
POLICIES: dict[str, Any] = {
    "two ranks": NARROW,
    "windows": [LatentKv(8), LocalWindow(4, 0)],
    "a window with sinks": {"*0*": [LatentKv(8), LocalWindow(3, 0, sinks=2)], "*1*": "fuse"},
    "pruned unevenly": [PruneHeads(heads=(0,)), LatentKv(8)],
}


def optimized(policy: Any = None, model: Any = None, backend: str = "sdpa", **options: Any) -> attnopt.OptimizedModel:
    batches = [inputs(texts(4, 20).roll(n)) for n in range(2)]
    model = decoder(**options) if model is None else model
    return attnopt.optimize(
        model, NARROW if policy is None else policy, (), batches[0], dynamic_shapes="auto", backend=backend,
        calibration=batches,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fast() -> attnopt.OptimizedModel:
    return optimized()


@pytest.fixture(scope="module")
def steps(fast: attnopt.OptimizedModel) -> LatentDecoder:
    return fast.latent_decoder()


def in_parts(steps: LatentDecoder, ids: Tensor, mask: Tensor, parts: Sequence[int]) -> Tensor:
    logits, past, at = [], None, 0
    with torch.no_grad():
        for n in parts:
            made, past = steps(ids[:, at : at + n], mask[:, : at + n], past)
            logits.append(made)
            at += n
    assert [t.shape for t in past or ()] == [(len(ids), ids.shape[1], width) for width in steps.widths]
    return torch.cat(logits, 1)


def test_the_cache_is_as_wide_as_the_latents(steps: LatentDecoder) -> None:
    assert steps.widths == (8, 12)
    assert (steps.bytes_per_token, steps.kv_bytes_per_token) == (4 * 20, 4 * 64)


@pytest.mark.parametrize("parts", [[30], [1] * 30, [7, 1, 13, 2, 1, 6]], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_every_step_is_that_of_the_whole(
    fast: attnopt.OptimizedModel, steps: LatentDecoder, parts: Sequence[int], rows: int
) -> None:
    ids = texts(rows, 30)
    got = in_parts(steps, ids, torch.ones_like(ids), parts)
    assert difference([got], [whole(fast, ids)]) < CLOSE


def test_padding_anywhere_is_no_token(fast: attnopt.OptimizedModel, steps: LatentDecoder) -> None:
    """Before a text, after a prompt, or in the middle."""
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, :5], mask[1, 9:12], mask[2, [0, 7, 13]] = 0, 0, 0
    ids = texts(3, 20)
    got = in_parts(steps, ids, mask, [12, 1, 1, 4, 2])
    for row, there in enumerate(mask.bool()):
        alone = ids[row : row + 1, there]
        assert difference([got[row : row + 1, there]], [whole(fast, alone)]) < CLOSE
    assert bool(got.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("named", POLICIES)
def test_what_a_policy_makes(named: str) -> None:
    fast = optimized(POLICIES[named], backend="blocked")
    ids = texts(2, 30)
    got = in_parts(fast.latent_decoder(), ids, torch.ones_like(ids), [11, 1, 1, 9, 8])
    assert difference([got], [whole(fast, ids)]) < CLOSE


@pytest.mark.slow
def test_it_survives_saving(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    fast.save(tmp_path / "m")
    loaded = attnopt.load(tmp_path / "m").latent_decoder()
    ids = texts(2, 9)
    assert difference([in_parts(loaded, ids, torch.ones_like(ids), [9])], [whole(fast, ids)]) < CLOSE


class Bare(nn.Module):
    """Rotary attention in which keys and values are all features of a token's own, twice as many as it has."""

    def __init__(self, change: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.change = decoder(), change
        for layer in self.inner.layers:
            layer.kv = nn.Linear(32, 64)
            layer.stored = self.stored  # type: ignore[assignment]

    def stored(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (k, v) if self.change is None else self.change(k, v)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids, attention_mask, position_ids)
        return logits


def test_features_narrower_than_keys_and_values_are_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any rewrite: four heads' keys and values are 64 numbers, the features that they come from 32."""
    monkeypatch.setattr(Layer, "forward", _with_all_heads)
    fast = optimized("fuse", Bare().eval())
    steps, ids = fast.latent_decoder(), texts(2, 15)
    assert steps.widths == (32, 32)
    got = in_parts(steps, ids, torch.ones_like(ids), [9, 1, 5])
    assert difference([got], [whole(fast, ids)]) < CLOSE


def _with_all_heads(self: Any, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    h = self.norm(x)
    q = self.q(h).unflatten(-1, (4, self.dim)).transpose(1, 2)
    k, v = self.kv(h).unflatten(-1, (2, 4, self.dim)).permute(2, 0, 3, 1, 4)
    half = self.dim // 2
    q, k = (y * rotation[0] + torch.cat([-y[..., half:], y[..., :half]], -1) * rotation[1] for y in (q, k))
    k, v = self.stored(k, v)
    o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return x + self.o(o.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------- what is refused
def test_keys_that_are_not_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layer, "forward", _with_all_heads)
    fast = optimized("fuse", Bare(lambda k, v: (nn.functional.normalize(k, dim=-1), v)).eval())
    with pytest.raises(attnopt.ExportError, match="not linear in") as caught:
        fast.latent_decoder()
    assert caught.value.site == "inner.layers.0"


@pytest.mark.slow
def test_what_has_no_fewer_numbers() -> None:
    with pytest.raises(attnopt.ExportError, match="as wide as its keys and values \\(32 numbers of a token\\)"):
        optimized("fuse").latent_decoder()


@pytest.mark.slow
def test_positions_that_do_not_come_from_the_call() -> None:
    with pytest.raises(attnopt.ExportError, match="its keys and values have no latents") as caught:
        optimized(absolute=True).latent_decoder()
    assert "position_ids" in str(caught.value.hint)


@pytest.mark.slow
def test_tokens_that_something_else_mixes() -> None:
    with pytest.raises(attnopt.ExportError, match="logits of the decoder and the model differ for a token after"):
        optimized(mixes=True).latent_decoder()


# ---------------------------------------------------------------- files
@pytest.mark.slow
def test_a_file_over_latents(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    fast.export_decoder(tmp_path / "m", context_length=64, eos_token_id=END, kv="latent")
    file = tmp_path / "m" / "model.onnx"
    assert sorted(p.name for p in file.parent.iterdir()) == ["cache.json", "model.onnx"]
    kept = json.loads((file.parent / "cache.json").read_text("utf-8"))
    assert kept == about(file, "cache")
    assert [layer["latents"] for layer in kept] == [8, 12]
    assert {n.domain for n in onnx.load(str(file)).graph.node} == {""}
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    shapes = {i.name: i.shape for i in session.get_inputs()}
    assert shapes == {
        "input_ids": ["batch", "length"], "attention_mask": ["batch", "total_length"],
        "past_key_values.0.latent": ["batch", "past_length", 8], "past_key_values.1.latent": ["batch", "past_length", 12],
    }  # fmt: skip
    ids = texts(3, 25)
    past: list[Any] = [torch.zeros(3, 0, width).numpy() for width in (8, 12)]
    logits, at = [], 0
    for n in (13, 1, 1, 7, 3):
        feed = {"input_ids": ids[:, at : at + n].numpy(), "attention_mask": torch.ones(3, at + n).long().numpy()}
        feed |= {f"past_key_values.{i}.latent": p for i, p in enumerate(past)}
        made, *past = session.run(None, feed)
        logits.append(torch.from_numpy(made))
        at += n
    assert difference([torch.cat(logits, 1)], [whole(fast, ids)]) < CLOSE


@pytest.mark.slow
def test_a_quantized_file_over_latents(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    done = fast.export_decoder(tmp_path / "m", context_length=64, eos_token_id=END, kv="latent", quantize="int8")
    assert done is not None
    assert done.cosine is not None
    assert 0.98 < done.cosine < 1


@pytest.mark.parametrize(
    "options", [{"windows": "rolling"}, {"pad_heads": True}, {"calibration": [inputs(texts(2, 8))]}]
)
def test_options_that_do_not_apply(fast: attnopt.OptimizedModel, options: Any, tmp_path: Path) -> None:
    with pytest.raises(attnopt.ExportError, match=r"latent|calibration is for"):
        fast.export_decoder(tmp_path / "m", context_length=64, eos_token_id=END, kv="latent", **options)
    assert not list(tmp_path.iterdir())
