"""Replace: against the user's model with the mixer's map, or the mixer itself, put in by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import oracle
import pytest
import torch
from models import Attention, Spelling, inputs
from stacks import batches, stack
from tiny_llama import tiny_llama
from torch import Tensor, nn

import attnopt
from attnopt.compiler import plugins
from attnopt.errors import ConversionError, PluginError, PolicyError
from attnopt.ir.fourier_mixer import FourierFilter
from attnopt.ir.local_mixers import DepthwiseConv, TokenPool
from attnopt.ir.mixer import Pairs, Tokens
from attnopt.passes import LocalWindow, MixMap, PruneHeads, Replace, ScaleHeads

pytestmark = pytest.mark.usefixtures("one_capture")
L = 7
SHOWN = [
    Spelling(),
    Spelling(heads=6, kv_heads=3, width=11, head_dim=5, value_dim=2),
    Spelling(core="sdpa", packing="fused"),
    Spelling(heads=4, kv_heads=2, core="grouped", op="einsum"),
    Spelling(core="bmm", packing="per-head", mask=("padding",), apply="masked_fill"),
    Spelling(core="einsum", mask=("causal",), softmax="float32"),
    Spelling(core="sdpa", mask=("causal", "padding"), op="addmm"),
]


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in plugins.KINDS:
        monkeypatch.setattr(kind, "_registered", {})


# ---------------------------------------------------------------- weights that are planted, alike in all channels of a head
def numbers(heads: int, count: int) -> Tensor:
    return torch.randn(heads, count, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Conv(DepthwiseConv):
    name: ClassVar[str] = "test.conv"

    def fit(self, pairs: Sequence[Pairs]) -> Sequence[Tensor]:
        _, H, _, D = pairs[0].o.shape
        return numbers(H, self.kernel)[..., None].expand(-1, -1, D), torch.zeros(H, 1, 1, D)


@dataclass(frozen=True)
class Filter(FourierFilter):
    name: ClassVar[str] = "test.fft"

    def fit(self, pairs: Sequence[Pairs]) -> Sequence[Tensor]:
        _, H, _, D = pairs[0].o.shape
        spectrum = torch.fft.rfft(numbers(H, L), dim=1)
        return torch.cat([spectrum.real, spectrum.imag], 1)[..., None].expand(-1, -1, D), torch.zeros(H, 1, 1, D)


def conv_map(heads: int, length: int, causal: bool) -> Tensor:
    """[H, L, S]"""
    step = torch.arange(length) - torch.arange(length)[:, None]
    place = step + (2 if causal else 1)
    made = numbers(heads, 3)[:, place.clamp(0, 2)]
    return made * ((place >= 0) & (place < 3))


def filter_map(heads: int, length: int) -> Tensor:
    step = torch.arange(length)[:, None] - torch.arange(length)
    return numbers(heads, length)[:, step % length]


def with_maps(s: Spelling, maps: Tensor, given: dict[str, Tensor]) -> oracle.Edit:
    seen = given.get("padding")

    def weights(p_BHLS: Tensor) -> Tensor:
        p = p_BHLS.reshape(-1, s.heads, *p_BHLS.shape[-2:])
        own = maps.expand(len(p), -1, -1, -1)
        if seen is not None:
            own = own * seen[:, None, None].to(own.dtype)
        return own.to(p.dtype).reshape(p_BHLS.shape)

    return oracle.Edit(weights=weights)


@pytest.mark.parametrize("s", SHOWN, ids=str)
def test_law_a_convolution_is_its_map_in_the_place_of_the_weights(s: Spelling) -> None:
    model, given = Attention(s), inputs(s, batch=3)
    fast = attnopt.optimize(model, Replace(Conv()), (), given, calibration=[given])
    assert [site.status for site in fast.report.sites] == ["rewritten"], fast.report
    edit = with_maps(s, conv_map(s.heads, L, "causal" in s.mask), given)
    want = oracle.run_edited(model, (), given, {0: edit})
    oracle.assert_same(oracle.run(fast, (), given), want)
    oracle.assert_differs(want, oracle.run(model, (), given))


@pytest.mark.parametrize("s", [s for s in SHOWN if "causal" not in s.mask], ids=str)
def test_law_a_filter_is_its_map_in_the_place_of_the_weights(s: Spelling) -> None:
    model, given = Attention(s), inputs(s, batch=3)
    fast = attnopt.optimize(model, Replace(Filter()), (), given, calibration=[given])
    want = oracle.run_edited(model, (), given, {0: with_maps(s, filter_map(s.heads, L), given)})
    oracle.assert_same(oracle.run(fast, (), given), want)


def by_hand(model: Any, x: Tensor, mix: Any) -> Tensor:
    """A stack whose attentions are ``mix(i, v)``, with v [B, H, L, D]."""
    for i, layer in enumerate(model.layers):
        v = layer.v(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        x = x + layer.o(mix(i, v).transpose(1, 2).flatten(2))
    return x


def edits(fast: Any) -> list[Any]:
    return [site.spec.after[0] for site in fast.sites]


def mixed_by(fast: Any) -> Any:
    """What the specs say, without the graph."""

    def mix(i: int, v: Tensor) -> Tensor:
        edit = edits(fast)[i]
        return edit.mixer.mix(Tokens(v, v, v), [w.tensor() for w in edit.weights])

    return mix


MIXERS = (
    "conv(kernel=5)", "fft", "pool(grid=(2, 5), prefix=2)", "pool(size=5)", "fft(grid=(3, 4))", "conv(grid=(3, 4))",
)  # fmt: skip


@pytest.mark.parametrize("mixer", MIXERS[:3])
def test_what_is_fitted_is_computed(mixer: str, tmp_path: Path) -> None:
    model, data = stack(causal=False), batches()
    fast = attnopt.optimize(model, Replace(mixer), (data[0],), calibration=data)
    with torch.no_grad():
        torch.testing.assert_close(fast(data[1]), by_hand(model, data[1], mixed_by(fast)), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(fast(data[1]), model(data[1]), atol=1e-2)
    names = {*dict(fast.graph_module.named_parameters())}
    assert not any(name.endswith((".q.weight", ".k.weight")) for name in names)
    assert {"layers.0.o.weight", "layers.1.v.weight"} <= {*names}
    assert not list(fast.named_buffers())
    assert all(site.cost_after.parameters < site.cost_before.parameters for site in fast.report.sites)
    fast.save(tmp_path / "m")
    again = attnopt.load(tmp_path / "m")
    assert torch.equal(again(data[1]), fast(data[1]))
    assert [site.spec for site in again.sites] == [site.spec for site in fast.sites]


@pytest.mark.parametrize("policy", [Replace("conv"), MixMap(torch.eye(L), 1.0)], ids=["a mixer", "a map"])
@pytest.mark.parametrize("packing", ["fused", "per-head"])
def test_of_a_packed_projection_the_values_are_left(policy: Any, packing: str) -> None:
    s = Spelling(heads=3, kv_heads=3, width=11, head_dim=5, value_dim=5, packing=packing, order="kvq")
    model, given = Attention(s), inputs(s)
    fast = attnopt.optimize(model, policy, (), given, calibration=[given])
    assert max(p.numel() for p in fast.parameters()) == 3 * 5 * 11
    plain = attnopt.optimize(
        Attention(Spelling(**{**vars(s), "packing": "separate"})), policy, (), given, calibration=[given]
    )
    oracle.assert_same(oracle.run(fast, (), given), oracle.run(plain, (), given))


def test_lengths_that_vary() -> None:
    model, data = stack(layers=1, causal=False), batches()
    for mixer in ("conv(kernel=5, prefix=1)", "pool"):
        fast = attnopt.optimize(model, Replace(mixer), (data[0],), calibration=data, dynamic_shapes="auto")
        assert [site.status for site in fast.report.sites] == ["rewritten"]
        for batch, length in ((1, 12), (3, 31), (2, 5)):
            x = torch.randn(batch, length, 16)
            with torch.no_grad():
                torch.testing.assert_close(fast(x), by_hand(model, x, mixed_by(fast)), rtol=1e-4, atol=1e-4)


def test_causal_sites_see_no_later_token() -> None:
    model, data = stack(causal=True), batches()
    fast = attnopt.optimize(model, Replace("conv(kernel=4, causal=True)"), (data[0],), calibration=data)
    usual = attnopt.optimize(model, Replace("conv(kernel=5)"), (data[0],), calibration=data)
    x, other = data[1], data[1].clone()
    other[:, 6:] = 9.0
    for result in (fast, usual):
        assert all(edit.mixer.causal for edit in edits(result))
        assert torch.equal(result(x)[:, :6], result(other)[:, :6])
        assert not torch.equal(result(x)[:, 6:], result(other)[:, 6:])


# ---------------------------------------------------------------- how well it fits
def test_attention_that_is_a_mixer_is_explained() -> None:
    """Queries and keys of zero: every token gets the mean, which a filter and linear attention can be."""
    model, data = stack(causal=False), batches()
    for layer in model.layers:
        layer.q.weight.data.zero_()
        layer.q.bias.data.zero_()
    for mixer in ("fft", "conv(kernel=25)", "linear-attention"):
        fast = attnopt.optimize(model, Replace(mixer, minimum_r2=0.99), (data[0],), calibration=data)
        assert [site.status for site in fast.report.sites] == ["rewritten"] * 2, fast.report
        with torch.no_grad():
            torch.testing.assert_close(fast(data[1]), model(data[1]), rtol=1e-2, atol=2e-2)


def test_a_bound_keeps_attentions_that_are_explained_too_little() -> None:
    model, data = stack(causal=False), batches()
    model.layers[0].q.weight.data.zero_()
    model.layers[0].q.bias.data.zero_()
    model.layers[1].q.weight.data *= 10
    fast = attnopt.optimize(model, Replace("fft", minimum_r2=0.9), (data[0],), calibration=data)
    first, second = fast.report.sites
    assert (first.status, second.status) == ("rewritten", "refused")
    assert "fitted in closed form, explains " in first.notes[0]
    assert float(first.notes[0].partition("(R^2 ")[2][:6]) > 0.99
    refused = second.refusals["replace"]
    assert refused.code == "explains-too-little"
    assert refused.expected == "an R^2 of at least 0.9 on held-out tokens"
    assert not fast.sites[1].spec.after
    with torch.no_grad():
        x = data[1] + model.layers[0](data[1])
        torch.testing.assert_close(fast(data[1]), x + model.layers[1](x), rtol=1e-2, atol=2e-2)


def test_r2_is_of_tokens_that_are_held_back() -> None:
    model, data = stack(layers=1, causal=False), batches(count=1)
    fast = attnopt.optimize(model, Replace("conv(kernel=3)"), (data[0],), calibration=data)
    (edit,), (layer,) = edits(fast), model.layers
    with torch.no_grad():
        x = data[0][7:]  # the eighth sequence
        q, k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
        o = (q @ k.mT / 2).softmax(-1) @ v
        got = edit.mixer.mix(Tokens(q, k, v), [w.tensor() for w in edit.weights])
        left, all_ = (got - o).square().sum(), (o - o.mean(2, keepdim=True)).square().sum()
    assert f"(R^2 {1 - left / all_:.4f})" in fast.report.sites[0].notes[0]
    assert "on 12 held-out tokens" in fast.report.sites[0].notes[0]


def test_batches_of_one_sequence() -> None:
    """Every eighth of them has no token to fit on."""
    model, data = stack(layers=1, causal=False), [x[None] for x in batches(count=2)[0]]
    fast = attnopt.optimize(model, Replace("linear-attention", steps=30), (data[0],), calibration=data)
    assert all(w.tensor().isfinite().all() for w in edits(fast)[0].weights)
    assert "distilled in 30 steps" in fast.report.sites[0].notes[0]


class Pairwise(nn.Module):
    """Tokens 0 and 1 see each other, 2 and 3, and so on: looking ahead by one, and never past the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, v: Tensor) -> Tensor:
        turned = v.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
        return self.gain * nn.functional.layer_norm(turned, (16,))


def test_looking_ahead_by_one_token_is_seen() -> None:
    data = batches()
    found = refused(stack(), Replace(lambda site: Pairwise(), steps=1), (data[0],), calibration=data)
    assert found.code == "looks-ahead"


def test_the_same_seed_gives_the_same_weights() -> None:
    model, data = stack(layers=1, causal=False), batches(count=2)
    fast, again = (
        attnopt.optimize(model, Replace("linear-attention(features=3)", steps=40), (data[0],), calibration=data)
        for _ in range(2)
    )
    assert edits(fast) == edits(again)
    assert "distilled in 40 steps" in fast.report.sites[0].notes[0]
    assert {"layers.0.q.weight", "layers.0.k.weight"} <= {*dict(fast.graph_module.named_parameters())}
    short = attnopt.optimize(model, Replace("linear-attention(features=3)", steps=1), (data[0],), calibration=data)
    with torch.no_grad():
        near, far = ((m(data[1]) - model(data[1])).square().mean() for m in (fast, short))
    assert near < far


# ---------------------------------------------------------------- masks
class Masked(nn.Module):
    """``by_pair``: the mask has a row for each query; ``added``: it is a bias."""

    def __init__(self, by_pair: bool = False, added: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.by_pair, self.added = nn.Linear(8, 24), nn.Linear(8, 8), by_pair, added

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        seen = mask[:, None] if self.by_pair else mask[:, None, None]
        if self.added:
            seen = torch.where(seen, 0.0, -1e9)
        o = nn.functional.scaled_dot_product_attention(q, k, v, seen)
        return self.out(o.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("mixer", ["conv", "pool", "linear-attention", "fft", "conv(prefix=1)"])
def test_padding_reaches_no_other_token(mixer: str, added: bool) -> None:
    model, x = Masked(added=added), torch.randn(16, 10, 8)
    mask = torch.ones(16, 10, dtype=torch.bool)
    mask[12:, 7:] = False
    fast = attnopt.optimize(model, Replace(mixer, steps=5), (x, mask), calibration=[(x, mask)])
    assert fast.report.sites[0].status == "rewritten", fast.report
    assert "replace: masks are taken to hide padding" in fast.report.sites[0].notes[1]
    other = x.masked_fill(~mask[..., None], 7.0)
    torch.testing.assert_close(fast(other, mask)[mask], fast(x, mask)[mask])
    assert not torch.allclose(fast(other, torch.ones_like(mask))[mask], fast(x, mask)[mask])


@pytest.mark.parametrize("added", [False, True])
def test_masks_of_pairs_are_refused(added: bool) -> None:
    """A decoy: two documents in one sequence."""
    model, x = Masked(by_pair=True, added=added), torch.randn(16, 10, 8)
    document = torch.arange(10) // 5
    pairs = (document[:, None] == document).expand(16, -1, -1)
    with pytest.warns(attnopt.AttnoptWarning, match="changes nothing"):
        fast = attnopt.optimize(model, Replace("conv"), (x, pairs), calibration=[(x, pairs)])
    assert fast.report.sites[0].refusals["replace"].code == "unknown-mask"
    torch.testing.assert_close(fast(x, pairs), model(x, pairs))


# ---------------------------------------------------------------- refusals
class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, y, need_weights=False)[0]


def refused(model: nn.Module, policy: Any, args: tuple[Tensor, ...], **options: Any) -> attnopt.Refusal:
    with pytest.warns(attnopt.AttnoptWarning, match="changes nothing"):
        fast = attnopt.optimize(model, policy, args, **options)
    torch.testing.assert_close(fast(*args), model(*args))
    found = fast.report.sites[0].refusals["replace"]
    assert found.hint
    return found


def test_refusals() -> None:
    data, full = batches(), stack(causal=False)
    x = data[0]
    assert refused(full, Replace("conv"), (x,)).code == "needs-calibration"
    assert refused(stack(), Replace("fft"), (x,), calibration=data).code == "looks-ahead"
    found = refused(full, Replace("fft"), (x,), calibration=data, dynamic_shapes={"x": {1: torch.export.Dim.DYNAMIC}})
    assert (found.code, found.found) == ("wrong-length", "a dynamic length")
    two = torch.randn(8, 9, 8), torch.randn(8, 9, 8)
    assert refused(Cross().eval(), Replace("conv"), two, calibration=[two]).code == "needs-self-attention"


def test_other_passes_come_afterwards() -> None:
    model, data = stack(causal=False), batches()
    first = attnopt.optimize(model, [ScaleHeads([2.0] * 4), Replace("conv")], (data[0],), calibration=data)
    assert first.report.sites[0].refusals["replace"].code == "already-edited"
    assert first.report.sites[0].refusals["replace"].hint == "let replace come first"
    conv, prune = Replace("conv(kernel=5)"), PruneHeads(heads=[1, 2], compensate="none")
    plain = attnopt.optimize(model, conv, (data[0],), calibration=data)
    pruned = attnopt.optimize(model, {"layers.0": [conv, prune]}, (data[0],), calibration=data)
    assert [w.shape[0] for w in pruned.sites[0].spec.after[0].weights] == [2, 2]
    assert pruned.graph_module.get_parameter("layers.0.o.weight").shape == (16, 8)

    def silent(i: int, v: Tensor) -> Tensor:
        o = mixed_by(plain)(i, v)
        o[:, 1:3] = 0.0
        return o

    with torch.no_grad():
        first_alone = nn.Module()
        first_alone.layers = model.layers[:1]
        x = by_hand(first_alone, data[1], silent)
        torch.testing.assert_close(pruned(data[1]), x + model.layers[1](x), rtol=1e-4, atol=1e-4)
    windowed = attnopt.optimize(model, [conv, LocalWindow(2)], (data[0],), calibration=data)
    torch.testing.assert_close(windowed(data[1]), plain(data[1]))


# ---------------------------------------------------------------- modules of the user
class Gated(nn.Module):
    def __init__(self, width: int, looks_ahead: bool = True) -> None:
        super().__init__()
        self.gate, self.along = (
            nn.Linear(width, width),
            nn.Conv1d(width, width, 3, padding=1 if looks_ahead else 0, groups=width),
        )
        self.before = 0 if looks_ahead else 2
        self.register_buffer("share", torch.tensor(0.5))

    def forward(self, v: Tensor) -> Tensor:
        mixed = self.along(nn.functional.pad(v.mT, (self.before, 0))).mT
        return mixed * self.gate(v).sigmoid() * self.share


def test_a_module_of_the_user(tmp_path: Path) -> None:
    model, data = stack(layers=1, causal=False), batches()
    made: list[nn.Module] = []

    def gated(site: attnopt.Site) -> nn.Module:
        made.append(Gated(site.num_heads * site.value_dim))
        return made[-1]

    policy = Replace(gated, steps=60)
    fast = attnopt.optimize(model, policy, (data[0],), calibration=data, dynamic_shapes="auto")
    assert fast.report.sites[0].status == "rewritten", fast.report
    (edit,) = edits(fast)
    assert len(made) == 1
    assert len({*dict(fast.graph_module.named_parameters())} - {name for name, _ in model.named_parameters()}) == 4
    assert len(list(fast.named_buffers())) == 1
    x = torch.randn(3, 9, 16)
    torch.testing.assert_close(fast(x), by_hand(model, x, mixed_by(fast)), rtol=1e-4, atol=1e-4)
    fast.save(tmp_path / "m")
    again = attnopt.load(tmp_path / "m")
    assert torch.equal(again(x), fast(x))
    (loaded,) = edits(again)
    assert str(loaded) == str(edit)
    with pytest.raises(ValueError, match="only the graph has the operators of"):
        loaded.mixer.mix(Tokens(x, x, x), [])
    text = attnopt.Policy.of(policy).to_json()
    named = attnopt.Policy.of(json.loads(json.dumps(text)))
    with pytest.raises(attnopt.RewriteError, match=r"\[unknown-module\]"):
        attnopt.optimize(model, named, (data[0],), calibration=data, strict=True)
    joined = attnopt.optimize(model, [policy, PruneHeads(heads=[1])], (data[0],), calibration=data)
    assert joined.report.sites[0].refusals["prune-heads"].code == "already-edited"


def test_modules_that_do_not_fit() -> None:
    data, full = batches(), stack(layers=1, causal=False)
    x = data[0]
    assert refused(stack(), Replace(lambda site: Gated(16), steps=1), (x,), calibration=data).code == "looks-ahead"
    causal = attnopt.optimize(stack(), Replace(lambda site: Gated(16, False), steps=1), (x,), calibration=data)
    assert [site.status for site in causal.report.sites] == ["rewritten"] * 2
    fixed = Replace(lambda site: Over(12), steps=1)
    free = {"x": {1: torch.export.Dim.DYNAMIC}}
    found = refused(full, fixed, (x,), calibration=data, dynamic_shapes=free)
    assert (found.code, "at which module('" in found.found) == ("wrong-length", True)
    assert attnopt.optimize(full, fixed, (x,), calibration=data).report.sites[0].status == "rewritten"
    with pytest.raises(PolicyError, match=r"made a str, expected an nn.Module"):
        attnopt.optimize(full, Replace(lambda site: "conv"), (x,), calibration=data)  # type: ignore[arg-type,return-value]
    with pytest.raises(PluginError, match=r"returned \[8, 4, 12, 2\]"):
        attnopt.optimize(full, Replace(lambda site: nn.Linear(16, 8), steps=1), (x,), calibration=data)


class Over(nn.Module):
    """A fully connected layer over tokens, as in an MLP-Mixer."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.along = nn.Linear(length, length)

    def forward(self, v: Tensor) -> Tensor:
        return self.along(v.mT).mT


# ---------------------------------------------------------------- elsewhere
def test_policies_as_text() -> None:
    policy = attnopt.Policy.of("replace(mixer='conv(kernel=5)', minimum_r2=0.5)")
    assert attnopt.Policy.of(json.loads(json.dumps(policy.to_json()))) == policy
    (p,) = (p for p in policy.passes)
    assert p == Replace(DepthwiseConv(5), 0.5)
    assert Replace("pool").mixer == TokenPool()
    for wrong in ({"minimum_r2": "much"}, {"steps": 0}, {"seed": -1}):
        with pytest.raises(PolicyError, match="replace: invalid value"):
            Replace("conv", **wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_model_class_has_no_place_for_it() -> None:
    model, ids = tiny_llama(4), torch.randint(50, (8, 12))
    with pytest.raises(ConversionError, match="cannot be folded into the output projection") as caught:
        attnopt.convert(model, Replace("conv"), (ids,), calibration=[(ids,)])
    assert caught.value.hint is not None
    assert "optimize" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [*MIXERS, "fft(grid=(3, 3), prefix=3)", "linear-attention(features=3)"])
@pytest.mark.usefixtures("one_torchlib")
def test_onnx_runtime_gives_the_same(mixer: str, tmp_path: Path) -> None:
    import onnxruntime

    model, data = stack(causal=False), batches()
    free = {} if "fft" in mixer or "grid" in mixer else {"dynamic_shapes": "auto"}
    fast = attnopt.optimize(model, Replace(mixer, steps=5), (data[0],), calibration=data, **free)
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for x in (data[1], *([torch.randn(2, 17, 16)] if free else [])):
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), fast(x), rtol=1e-4, atol=1e-4)


def test_a_replaced_model_trains() -> None:
    model, data = stack(causal=False), batches()
    fast = attnopt.optimize(model, Replace("fft"), (data[0],), calibration=data)
    fast(data[1]).square().sum().backward()
    grads = {name: p.grad for name, p in fast.named_parameters()}
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in grads.values())


@pytest.mark.parametrize("mixer", ["conv", "fft", "linear-attention"])
def test_half_precision(mixer: str) -> None:
    model, data = stack(layers=1, causal=False).bfloat16(), [x.bfloat16() for x in batches()]
    fast = attnopt.optimize(model, Replace(mixer, steps=5), (data[0],), calibration=data)
    assert fast(data[0]).dtype == torch.bfloat16


def test_a_mask_that_is_added_to_a_trained_bias_first_is_none_of_padding() -> None:
    """Their sum is no pattern, and a mixer would pass on what the mask hides."""
    s = Spelling(heads=2, mask=("causal",), apply="add-min", commuted=True, bias_kind="table")
    model, given = Attention(s), inputs(s)
    (site,) = attnopt.inspect(model, (), given).sites
    assert site.bias_hides
    with pytest.warns(attnopt.AttnoptWarning, match="changes nothing"):
        fast = attnopt.optimize(model, Replace("conv"), (), given, calibration=[given])
    assert fast.report.sites[0].refusals["replace"].code == "unknown-mask"
    (plain,) = attnopt.inspect(Attention(Spelling(heads=2, bias_kind="table")), (), given).sites
    assert not plain.bias_hides
