"""Gains of paths in the readout, against hooks by hand that put another sum before the final norm."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hooked_models
import numpy as np
import observed
import onnxruntime
import pytest
import torch
from observed import WIDTH
from paths import Attention, Layer, Plain, Stack, shares_of, shares_of_stack, with_readout
from torch import Tensor, nn

import attnopt
from attnopt.errors import AttnoptError, CaptureError, PolicyError, RewriteError

pytestmark = pytest.mark.usefixtures("one_capture")
IDS = hooked_models.IDS[0]
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def gpt2() -> tuple[Any, dict[str, str], str, nn.Module]:
    model = hooked_models.gpt2()
    parts: dict[str, str] = {}
    for i in range(3):
        parts |= {
            f"transformer.h.{i}.attn": f"transformer.h.{i}.attn",
            f"transformer.h.{i}.mlp": f"transformer.h.{i}.mlp",
        }
    return model, parts, "transformer.h.0.ln_1", model.transformer.ln_f


def llama() -> tuple[Any, dict[str, str], str, nn.Module]:
    model = hooked_models.llama()
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")]
    return model, {n: n for n in names}, "model.layers.0.input_layernorm", model.model.norm


MODELS: dict[str, Callable[[], tuple[Any, dict[str, str], str, nn.Module]]] = {"gpt2": gpt2, "llama": llama}


@pytest.mark.parametrize("name", MODELS)
def test_gains_against_hooks(name: str) -> None:
    model, parts, start, norm = MODELS[name]()
    batch = {"input_ids": IDS, "use_cache": False}
    shares = shares_of(model, batch, parts, start)
    own = model(**batch).logits
    assert sum(shares.values()).shape == (2, 9, 32)
    cases = [{path: 0.0} for path in shares] + [{path: 0.3 + 0.2 * i for i, path in enumerate(shares)}]
    for gains in cases:
        gained = attnopt.path_gain(model, gains, (), batch)
        readout = sum(gains.get(path, 1.0) * c for path, c in shares.items())
        want = with_readout(model, norm, readout, batch).logits
        torch.testing.assert_close(gained(**batch).logits, want, **TOLERANCE)
        assert float((want - own).abs().max()) > 1e-2


def test_later_layers_see_the_stream_as_it_is() -> None:
    """Unlike a scaled output of the module: the weights of later attentions stay the same."""
    model, *_ = MODELS["gpt2"]()
    batch = {"input_ids": IDS, "use_cache": False}
    gained = attnopt.path_gain(model, {"transformer.h.0.*": 0.0}, (), batch)
    want = attnopt.collect(model, [batch], ["weights", "outputs"])
    found = attnopt.collect(gained, [batch], ["weights", "outputs"])
    for site in want:
        for kind in ("weights", "outputs"):
            observed.assert_near(found[site, kind][0], want[site, kind][0])


def test_a_gain_of_one_changes_nothing() -> None:
    model, parts, *_ = MODELS["llama"]()
    batch = {"input_ids": IDS, "use_cache": False}
    plain = attnopt.path_gain(model, {}, (), batch)
    ones = attnopt.path_gain(model, {"*": 1, next(iter(parts)): [1.0] * 4}, (), batch)
    assert ones.graph_module.code == plain.graph_module.code
    assert torch.equal(ones(**batch).logits, model(**batch).logits)
    assert ones.report.notes == ()


def test_it_is_linear_up_to_the_final_norm() -> None:
    torch.manual_seed(0)
    model, x = observed.far(Stack()), torch.randn(2, 6, WIDTH)

    def out(gains: Mapping[str, float]) -> Tensor:
        return attnopt.path_gain(model, gains, (x,))(x).double()

    base, first, second = out({}), out({"layers.0.attn": 0.4}), out({"layers.1.mlp": 2.5})
    both = out({"layers.0.attn": 0.4, "layers.1.mlp": 2.5})
    torch.testing.assert_close(both, first + second - base, **TOLERANCE)
    torch.testing.assert_close(out({"layers.0.attn": -0.2}), base + 2 * (first - base), **TOLERANCE)
    torch.testing.assert_close(out({"*": 0.0}), torch.zeros_like(base))


def test_gains_of_heads() -> None:
    """The bias of the output projection belongs to no head."""
    model, parts, start, norm = MODELS["gpt2"]()
    batch = {"input_ids": IDS, "use_cache": False}
    shares, gains = shares_of(model, batch, parts, start), torch.tensor([0.0, 1.0, 0.5, -2.0])
    site = "transformer.h.1.attn"
    projection = model.get_submodule(f"{site}.c_proj")
    z = observed.hooked(model, batch)[0][f"{site}.c_proj"].unflatten(-1, (4, 8))
    added = (z * gains[:, None]).flatten(-2) @ projection.weight + projection.bias
    want = with_readout(model, norm, sum(shares.values()) - shares[site] + added, batch).logits
    for given in (gains, gains.tolist()):
        gained = attnopt.path_gain(model, {site: given}, (), batch)
        torch.testing.assert_close(gained(**batch).logits, want, **TOLERANCE)
    assert "heads of transformer.h.1.attn x 0, 1, 0.5, -2" in str(gained.report)


@pytest.mark.parametrize("parallel", [False, True])
def test_parallel_branches_and_free_sizes(parallel: bool) -> None:
    torch.manual_seed(0)
    model, x = observed.far(Stack(parallel)), torch.randn(2, 6, WIDTH)
    gains = {"layers.0.attn": 0.5, "layers.0.mlp": 0.0, "layers.1.attn": 3.0, "embedding": 0.25}
    gained = attnopt.path_gain(model, gains, (x,), dynamic_shapes="auto")
    for given in (x, torch.randn(3, 11, WIDTH), torch.randn(1, 2, WIDTH)):
        shares = shares_of_stack(model, given)
        want = model.head(sum(gains.get(path, 1.0) * c for path, c in shares.items()))
        torch.testing.assert_close(gained(given), want, **TOLERANCE)


def test_the_last_path_is_not_computed_where_it_is_cut() -> None:
    torch.manual_seed(0)
    model, x = observed.far(Stack()), torch.randn(2, 6, WIDTH)

    def products(gains: Mapping[str, float]) -> int:
        graph = attnopt.path_gain(model, gains, (x,)).graph_module.graph
        return sum("linear" in str(n.target) for n in graph.nodes)

    whole = products({})
    assert products({"layers.1.mlp": 0.0}) == whole - 2
    assert products({"layers.1.mlp": 0.0, "layers.1.attn": 0.0}) == whole - 6
    assert products({"layers.0.mlp": 0.0}) == whole


def bert_by_hand(model: Any, batch: Mapping[str, Any], gains: Mapping[str, float]) -> Tensor:
    """Norms between the layers at the scale of the stream; the last one is computed anew."""
    inputs, outputs, _ = observed.hooked(model, batch)
    y = gains.get("embedding", 1.0) * outputs["embeddings"]
    names = [
        f"encoder.layer.{i}.{part}.output" if part else f"encoder.layer.{i}.output"
        for i in range(2)
        for part in ("attention", "")
    ]
    for name in names:
        norm, path = model.get_submodule(f"{name}.LayerNorm"), name.replace("attention.output", "attention.self")
        path = path if path.endswith("self") else f"{path}.dense"
        y = y + gains.get(path, 1.0) * outputs[f"{name}.dense"]
        if name == names[-1]:
            return norm(y)
        x = inputs[f"{name}.LayerNorm"]
        scale = (x.var(-1, keepdim=True, unbiased=False) + norm.eps).rsqrt()
        y = (y - y.mean(-1, keepdim=True)) * scale * norm.weight + norm.bias
    raise AssertionError


def test_norms_between_the_layers() -> None:
    example = observed.bert()
    for gains in (
        {"embedding": 0.5},
        {"encoder.layer.0.attention.self": 0.0, "encoder.layer.1.output.dense": 0.5},
        {"encoder.layer.0.output.dense": 2.0, "encoder.layer.1.attention.self": 0.25},
    ):
        gained = attnopt.path_gain(example.model, gains, (), example.batch)
        want = bert_by_hand(example.model, example.batch, gains)
        with torch.no_grad():
            torch.testing.assert_close(gained(**example.batch).last_hidden_state, want, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_saved_and_in_onnx_at_other_lengths(name: str, tmp_path: Path) -> None:
    example = observed.EXAMPLES[name]()
    first = example.attentions[0].name
    gains = {first: [0.0, 1.0, 2.0, 0.5], "embedding": 0.5, "*.1.mlp": 0.0}
    gained = attnopt.path_gain(example.model, gains, (), example.batch, dynamic_shapes="auto")
    gained.save(tmp_path / "saved")
    gained.export_onnx(tmp_path / "model.onnx")
    loaded = attnopt.load(tmp_path / "saved")
    assert loaded.report.notes == gained.report.notes != ()
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    longer = {"input_ids": torch.randint(0, 50, (3, 17))}
    if "attention_mask" in example.batch:
        longer["attention_mask"] = observed.mask(17, 6, 9, longest=17)
    for batch in (example.batch, longer):
        with torch.no_grad():
            want = gained(**batch).last_hidden_state
            assert torch.equal(loaded(**batch).last_hidden_state, want)
        fresh = attnopt.path_gain(example.model, gains, (), batch)
        torch.testing.assert_close(fresh(**batch).last_hidden_state, want, **TOLERANCE)
        feed = {i.name: np.asarray(batch[i.name]) for i in session.get_inputs()}
        torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), want.detach(), rtol=1e-4, atol=1e-5)


def test_it_can_be_optimized() -> None:
    torch.manual_seed(0)
    model, x = observed.far(Stack()), torch.randn(2, 6, WIDTH)
    gained = attnopt.path_gain(model, {"layers.0.attn": 0.5}, (x,))
    fused = attnopt.optimize(gained, "fuse", (x,))
    assert [s.status for s in fused.report.sites] == ["rewritten"] * 2
    torch.testing.assert_close(fused(x), gained(x), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = observed.far(Stack()), torch.randn(2, 6, WIDTH)
    want = attnopt.path_gain(model, {"layers.0.*": 0.5}, (x,))(x)
    gained = attnopt.path_gain(model.to(dtype), {"layers.0.*": 0.5}, (x.to(dtype),))
    found = gained(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), want, rtol=0.1, atol=0.1)


# ---------------------------------------------------------------- what is refused
class TwoStages(nn.Module):
    """A stream that starts anew after a nonlinear function."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


class Gated(nn.Module):
    """Heads behind a gate cannot be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.attn, self.gate = Attention(), Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.plain(x)
        return x + self.attn(x) * self.gate(x).sigmoid()


def test_a_model_without_a_stream() -> None:
    with pytest.raises(RewriteError, match="no attention writes to a residual stream"):
        attnopt.path_gain(Plain(), {"*": 0.5}, (torch.randn(2, 6, WIDTH),))


def test_a_path_that_does_not_reach_the_readout() -> None:
    torch.manual_seed(0)
    model, x = TwoStages().eval(), torch.randn(2, 6, WIDTH)
    with pytest.raises(RewriteError, match=r"'one\.attn' does not reach the readout directly"):
        attnopt.path_gain(model, {"one.attn": 0.5}, (x,))
    _, outputs, _ = observed.hooked(model, {"x": x})
    gained = attnopt.path_gain(model, {"two.*": 0.5}, (x,))
    want = outputs["one"].tanh() + 0.5 * (outputs["two"] - outputs["one"].tanh())
    torch.testing.assert_close(gained(x), want, **TOLERANCE)


def errors() -> dict[str, tuple[Any, str]]:
    return {
        "no mapping": (0.5, "expected a mapping"),
        "name": ({"layers.0.atn": 0.5}, "no path is named 'layers.0.atn'"),
        "near": ({"layers.0.atn": 0.5}, "did you mean 'layers.0.attn'"),
        "nan": ({"embedding": float("nan")}, "expected a finite number"),
        "text": ({"embedding": "half"}, "expected a finite number"),
        "heads": ({"layers.0.attn": [1.0, 0.5]}, "2 numbers for 4 heads"),
        "nan of a head": ({"layers.0.attn": [1.0, 0.5, 1.0, float("inf")]}, "expected a finite number"),
        "heads of an MLP": ({"layers.0.mlp": [1.0] * 4}, "no heads of 'layers.0.mlp'"),
    }


@pytest.mark.parametrize("case", errors())
def test_errors_say_what_to_do(case: str) -> None:
    gains, told = errors()[case]
    with pytest.raises(PolicyError) as e:
        attnopt.path_gain(Stack().eval(), gains, (torch.randn(2, 6, WIDTH),))
    assert told in str(e.value)
    with pytest.raises(PolicyError, match="needs example inputs"):
        attnopt.path_gain(Stack(), {"embedding": 0.5})


def test_heads_behind_a_gate_count_together() -> None:
    torch.manual_seed(0)
    model, x = observed.far(Gated()), torch.randn(2, 6, WIDTH)
    with pytest.raises(PolicyError) as e:
        attnopt.path_gain(model, {"": 0.5}, (x,))
    (path,) = {*re.findall(r"'([^']+)'", str(e.value.hint))} - {"plain", "embedding"}
    stream = x + model.plain(x)
    gained = attnopt.path_gain(model, {path: 0.5}, (x,))
    torch.testing.assert_close(gained(x), (stream + model(x)) / 2, **TOLERANCE)
    with pytest.raises(PolicyError, match="no heads of"):
        attnopt.path_gain(model, {path: [0.5] * 4}, (x,))


@pytest.mark.parametrize("first", ["layers.0.attn", "layers.1.attn", "layers.1.mlp"])
def test_gains_of_a_model_that_has_gains(first: str) -> None:
    torch.manual_seed(0)
    model, x = observed.far(Stack()), torch.randn(2, 6, WIDTH)
    once = attnopt.path_gain(model, {first: 0.5}, (x,))
    shares = shares_of_stack(model, x)
    for second in shares:
        gains = {first: 0.15} if first == second else {first: 0.5, second: 0.3}
        want = model.head(sum(gains.get(path, 1.0) * c for path, c in shares.items()))
        torch.testing.assert_close(attnopt.path_gain(once, {f"{second}*": 0.3}, (x,))(x), want, **TOLERANCE)


def test_a_stream_that_cannot_be_told_from_its_sum() -> None:
    """After a gain of the embedding, nothing but the stream of the layers looks like one: what it adds up to is not read."""
    torch.manual_seed(0)
    model, x = observed.far(Stack()), torch.randn(2, 6, WIDTH)
    once = attnopt.path_gain(model, {"embedding": 0.5}, (x,))
    for second in shares_of_stack(model, x):
        with pytest.raises(AttnoptError, match=r"is added twice|no path is named"):
            attnopt.path_gain(once, {second: 0.3}, (x,))


def test_a_model_with_a_cache() -> None:
    transformers = pytest.importorskip("transformers")
    model = hooked_models.llama()
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(CaptureError, match="use_cache=False"):
        attnopt.path_gain(model, {"*": 0.5}, (), {"input_ids": IDS, "past_key_values": cache, "use_cache": True})


def test_dropout_that_is_on() -> None:
    class Dropping(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](self.first(x))
            return self.head(self.layers[1](nn.functional.dropout(x, 0.5, self.training)))

    x = torch.randn(2, 6, WIDTH)
    with pytest.raises(RewriteError, match="draws random numbers"):
        attnopt.path_gain(Dropping().train(), {"layers.0.attn": 0.5}, (x,))
    attnopt.path_gain(Dropping().eval(), {"layers.0.attn": 0.5}, (x,))
