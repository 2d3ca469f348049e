"""Queries, keys and maps of another run: the edit made by hand inside the attention of models as transformers has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from variants import mostly_slow

import attnopt
from attnopt import Input
from attnopt.passes import GroupedQuery, HeadPatch, PruneHeads, RouteHeads, ScaleHeads, Transplant

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
HEADS, SIZE = 4, 8


# ---------------------------------------------------------------- by hand
@dataclass(frozen=True)
class Edit:
    """What heads take over at one attention: ``given`` by "q", "k" and "map", [B or 1, heads, ...], at ``tokens``, which are
    queries, or with "k" keys; ``gains`` [B or 1, H] of their outputs, and those that are ``silent``."""

    given: Mapping[str, Tensor] = field(default_factory=dict)
    heads: tuple[int, ...] = tuple(range(HEADS))
    tokens: tuple[int, ...] | None = None
    gains: Tensor | None = None
    silent: tuple[int, ...] = ()

    def over(self, role: str, own: Tensor) -> Tensor:
        if role not in self.given:
            return own
        new = own.clone()
        rows = range(own.shape[2]) if self.tokens is None else [t for t in self.tokens if t < own.shape[2]]
        for i, h in enumerate(self.heads):
            for row in rows:
                new[:, h, row] = self.given[role][:, i, row]
        return new


@contextmanager
def by_hand(edits: Mapping[int, Edit]) -> Iterator[list[dict[str, Tensor]]]:
    """Inside, these calls of the attention of torch are edited; what each read and what multiplied its values is listed."""
    seen: list[dict[str, Tensor]] = []

    def attended(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        edit = edits.get(len(seen), Edit())
        q, k = edit.over("q", q), edit.over("k", k)
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = edit.over("map", scores.softmax(-1))
        seen.append({"q": q, "k": k, "map": weights})
        o = weights @ v
        o[:, list(edit.silent)] = 0.0
        return o if edit.gains is None else o * edit.gains[:, :, None, None]

    with mock.patch.object(F, "scaled_dot_product_attention", attended), torch.no_grad():
        yield seen


def read(model: nn.Module, given: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """What each attention reads, and its map."""
    with by_hand({}) as seen:
        model(**given)
    return seen


def wanted(model: nn.Module, given: Mapping[str, Any], edits: Mapping[int, Edit]) -> list[Tensor]:
    with by_hand(edits) as seen:
        out = oracle.run(model, (), given)
    assert len(seen) > max(edits, default=0)
    return out


# ---------------------------------------------------------------- models
SIZES: dict[str, Any] = {
    "hidden_size": HEADS * SIZE, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "attn_implementation": "sdpa",
}  # fmt: skip


def made(kind: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    classes = {
        "bert": (transformers.BertModel, transformers.BertConfig, {"vocab_size": 50}),
        "vit": (transformers.ViTModel, transformers.ViTConfig, {"image_size": 12, "patch_size": 4, "num_channels": 2}),
        "llama": (transformers.LlamaModel, transformers.LlamaConfig, {"vocab_size": 50, "use_cache": False}),
    }
    model, config, own = classes[kind]
    found: nn.Module = model(config(**SIZES, **own, **options)).eval()
    for p in found.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return found


def inputs(kind: str, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(batch, 2, 12, 12)}
    ids = torch.randint(0, 50, (batch, length))
    shown = torch.ones_like(ids)
    shown[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": shown} if kind == "bert" else {"input_ids": ids}


MODELS = {"bert": {}, "vit": {}, "llama": {"num_key_value_heads": 2}}
FIRST = {"bert": "*.0.*", "vit": "*.0.*", "llama": "*.0.*"}


def policy(kind: str, p: Any) -> dict[str, Any]:
    return {FIRST[kind]: p}


@pytest.mark.parametrize("roles", mostly_slow(["q", "k", "qk", "map"], "qk", "map"))
@pytest.mark.parametrize("kind", mostly_slow(MODELS, "vit"))
def test_law_it_is_the_edit_by_hand_at_every_size(kind: str, roles: str, tmp_path: Path) -> None:
    model, heads = made(kind, **MODELS[kind]), (2, 0)
    roles_ = [roles] if roles == "map" else list(roles)

    def brought(batch: int, length: int, seed: int) -> dict[str, Tensor]:
        other = read(model, inputs(kind, batch, length, seed=seed + 10))[0]
        return {f"other_{role}": other[role][:, list(heads)] for role in roles_}

    asked = policy(kind, Transplant(**{role: Input(f"other_{role}") for role in roles_}, heads=heads))  # type: ignore[arg-type]
    example = inputs(kind)
    fast = attnopt.optimize(model, asked, (), {**example, **brought(2, 7, 0)}, dynamic_shapes="auto")
    assert [s.status for s in fast.report.sites] == ["rewritten", "unchanged"]
    for batch, length in ((2, 7), (3, 11)):
        given, other = inputs(kind, batch, length, seed=1), brought(batch, length, 1)
        edit = Edit({role: other[f"other_{role}"] for role in roles_}, heads)
        want = wanted(model, given, {0: edit})
        oracle.assert_differs(want, oracle.run(model, (), given))
        oracle.assert_same(oracle.run(fast, (), {**given, **other}), want)
    if (kind, roles) in (("bert", "map"), ("llama", "qk"), ("bert", "qk")):
        fast.export_onnx(tmp_path / "m.onnx")
        session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
        feed = {n: x.numpy() for n, x in {**given, **other}.items()}
        oracle.assert_same([torch.from_numpy(o) for o in session.run(None, feed)], want)
        fast.save(tmp_path / "saved")
        loaded = attnopt.load(tmp_path / "saved")
        assert [s.spec for s in loaded.sites] == [s.spec for s in fast.sites]
        oracle.assert_same(
            oracle.run(loaded, (), {**given, **other}), oracle.run(fast, (), {**given, **other}), limit=0.0
        )


@pytest.mark.parametrize("kind", list(MODELS))
def test_law_what_is_its_own_changes_nothing(kind: str) -> None:
    model, given = made(kind, **MODELS[kind]), inputs(kind)
    own = read(model, given)[0]
    for passes in (Transplant(q=own["q"], k=own["k"]), Transplant(map=own["map"][:, [3]], heads=[3])):
        fast = attnopt.optimize(model, policy(kind, passes), (), given)
        assert fast.report.sites[0].status == "rewritten"
        oracle.assert_same(oracle.run(fast, (), given), oracle.run(model, (), given))


@pytest.mark.parametrize("role", ["q", "k", "map"])
def test_some_tokens_and_known_tensors_and_the_first_calibration_batch(role: str) -> None:
    model, given, clean = made("llama", num_key_value_heads=2), inputs("llama"), inputs("llama", seed=3)
    other, heads, tokens = read(model, clean)[0], (1, 3), (0, 4, 6)
    want = wanted(model, given, {0: Edit({role: other[role][:, list(heads)]}, heads, tokens)})
    oracle.assert_differs(want, oracle.run(model, (), given))
    values = other[role][:, list(heads)]
    options: dict[str, Any] = {"heads": heads, "tokens": [0, 4, -1]}
    for p in (Transplant(**{role: values}, **options), Transplant(**{role: "run"}, **options)):
        fast = attnopt.optimize(model, policy("llama", p), (), given, calibration=[clean])
        oracle.assert_same(oracle.run(fast, (), given), want)
        assert "at tokens 0, 4 and -1" in fast.report.sites[0].spec_after
    said = "nothing hides the keys that a map of another run reads"
    assert any(said in note for note in fast.report.sites[0].notes) == (role == "map")


def test_positions_at_every_length() -> None:
    model, heads = made("bert"), (0, 2)
    asked = policy("bert", Transplant(k=Input("keys"), heads=heads, tokens=[1, -1]))
    fast = None
    for batch, length in ((2, 7), (3, 12), (1, 2)):
        given = inputs("bert", batch, length)
        given["attention_mask"][:] = 1
        keys = torch.randn(batch, 2, length, SIZE)
        fast = fast or attnopt.optimize(model, asked, (), {**given, "keys": keys}, dynamic_shapes="auto")
        want = wanted(model, given, {0: Edit({"k": keys}, heads, (1, length - 1))})
        oracle.assert_same(oracle.run(fast, (), {**given, "keys": keys}), want)


# ---------------------------------------------------------------- among other passes
@pytest.mark.parametrize("role", ["q", "k", "map"])
def test_pruned_heads_take_nothing_over(role: str) -> None:
    model, given = made("bert"), inputs("bert")
    other = read(model, inputs("bert", seed=3))[0][role]
    broken = other.clone()
    broken[:, 1] = torch.nan
    want = wanted(model, given, {0: Edit({role: other}, silent=(1,))})
    prune, move = PruneHeads(heads=[1]), Transplant(**{role: Input("other")})  # type: ignore[arg-type]
    for passes in ([prune, move], [move, prune]):
        fast = attnopt.optimize(model, policy("bert", passes), (), {**given, "other": other})
        oracle.assert_same(oracle.run(fast, (), {**given, "other": broken}), want)
    only = attnopt.optimize(
        model,
        policy("bert", [prune, Transplant(**{role: Input("other")}, heads=[1])]),
        (),
        {**given, "other": other[:, 1:2]},  # type: ignore[arg-type]
    )
    pruned = wanted(model, given, {0: Edit(silent=(1,))})
    oracle.assert_same(oracle.run(only, (), {**given, "other": broken[:, 1:2]}), pruned)


def test_gains_by_sample_are_the_edit_by_hand(tmp_path: Path) -> None:
    model, given, gains = made("bert"), inputs("bert"), torch.randn(2, HEADS)
    fast = attnopt.optimize(model, ScaleHeads(Input("gains")), (), {**given, "gains": gains}, dynamic_shapes="auto")
    assert sum(p.numel() for p in fast.parameters()) == sum(p.numel() for p in model.parameters())
    for batch, length in ((2, 7), (3, 11)):
        given, gains = inputs("bert", batch, length, seed=1), torch.randn(batch, HEADS)
        want = wanted(model, given, {i: Edit(gains=gains) for i in range(2)})
        oracle.assert_same(oracle.run(fast, (), {**given, "gains": gains}), want)
    fast.export_onnx(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    feed = {n: x.numpy() for n, x in {**given, "gains": gains}.items()}
    oracle.assert_same([torch.from_numpy(o) for o in session.run(None, feed)], want)
    fast.save(tmp_path / "saved")
    oracle.assert_same(oracle.run(attnopt.load(tmp_path / "saved"), (), {**given, "gains": gains}), want)
    own = oracle.run(fast, (), {**given, "gains": torch.ones_like(gains)})
    oracle.assert_same(own, oracle.run(model, (), given))
    gains[1, 2] = torch.nan
    broken = fast(**given, gains=gains).last_hidden_state.isnan().flatten(1).any(1)
    assert broken.tolist() == [False, True, False], "a gain reaches its own sequence alone"


# ---------------------------------------------------------------- elsewhere, and what is refused
class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (f(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f, z in ((self.q, x), (self.k, y), (self.v, y)))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_between_two_sequences() -> None:
    model, roles = Cross().eval(), ("q", "k")
    policy = Transplant(q=Input("q"), k=Input("k"), heads=[3, 1], tokens=[1, -2])
    fast = None
    for batch, length, keys in ((2, 5, 9), (3, 8, 4)):
        given = {"x": torch.randn(batch, length, 32), "y": torch.randn(batch, keys, 32)}
        other = {"q": torch.randn(batch, 2, length, SIZE), "k": torch.randn(1, 2, keys, SIZE)}
        fast = fast or attnopt.optimize(model, policy, (), {**given, **other}, dynamic_shapes="auto")
        own = read(model, given)[0]
        new = {role: own[role][:, [3, 1]].clone() for role in roles}
        for role, count in (("q", length), ("k", keys)):
            for t in (1, count - 2):
                new[role][:, :, t] = other[role][:, :, t]
        want = wanted(model, given, {0: Edit(new, (3, 1))})
        oracle.assert_differs(want, oracle.run(model, (), given))
        oracle.assert_same(oracle.run(fast, (), {**given, **other}), want)


def test_half_precision_takes_over_full_precision() -> None:
    model, x, y = Cross().eval().bfloat16(), torch.randn(2, 5, 32).bfloat16(), torch.randn(2, 9, 32).bfloat16()
    q = torch.randn(2, HEADS, 5, SIZE)
    fast = attnopt.optimize(model, Transplant(q=Input("q")), (x, y), {"q": q})
    want = wanted(model, {"x": x, "y": y}, {0: Edit({"q": q.bfloat16()})})
    oracle.assert_same(oracle.run(fast, (x, y), {"q": q}), want)


def test_passes_that_read_queries_read_the_model_s_own() -> None:
    model, x = Cross().eval(), torch.randn(2, 5, 32)
    given, q = {"x": x, "y": x}, torch.randn(2, HEADS, 5, SIZE)
    route = RouteHeads(shared=[0], routed=1)
    fast, again = (
        attnopt.optimize(model, policy, (x, x), {"q": q})
        for policy in ([route, Transplant(q=Input("q"))], [Transplant(q=Input("q")), route])
    )
    norms = read(model, given)[0]["q"].norm(dim=-1)[:, 1:]  # [B, 3, L]
    best = torch.zeros_like(norms).scatter(1, norms.argmax(1, keepdim=True), 1.0)
    used = torch.cat([torch.ones_like(best[:, :1]), best], 1)
    with by_hand({0: Edit({"q": q})}) as seen:
        model(x, x)
    v = model.v(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    want = model.o((seen[0]["map"] @ v * used[..., None]).transpose(1, 2).flatten(2)).detach()
    for made in (fast, again):
        oracle.assert_same(oracle.run(made, (x, x), {"q": q}), [want])


def test_a_map_at_some_tokens_leaves_the_others_unmapped() -> None:
    model, x, maps = Cross().eval(), torch.randn(2, 5, 32), torch.rand(HEADS, 5, 5)
    given, gains = {"x": x, "y": x}, {0: 2.0, 2: -1.0}
    fast = attnopt.optimize(model, [ScaleHeads(gains), Transplant(map=maps, tokens=[0, -1])], (x, x))
    ((want,), (mapped,)) = (
        wanted(model, given, {0: edit})
        for edit in (Edit(gains=torch.tensor([[2.0, 1.0, -1.0, 1.0]])), Edit({"map": maps[None]}))
    )
    want[:, [0, 4]] = mapped[:, [0, 4]]
    oracle.assert_same(oracle.run(fast, (x, x)), [want])


def test_constant_heads_that_each_call_scales() -> None:
    model, x, values, gains = Cross().eval(), torch.randn(2, 5, 32), torch.randn(HEADS, SIZE), torch.rand(2, HEADS)
    values[1] = 0.0
    passes = [HeadPatch([0, 1, 2, 3], values), ScaleHeads(Input("gains"))]
    fast = attnopt.optimize(model, passes, (x, x), {"gains": gains})
    want = model.o((values * gains[:, :, None]).flatten(1))[:, None].expand(-1, 5, -1).detach()
    oracle.assert_same(oracle.run(fast, (x, x), {"gains": gains}), [want])


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        (
            Transplant(q=torch.randn(1, 4, 5, 7)),
            r"\[other-sizes\] expected q of 2 or 1 x 4 x 5 x 8 .*found 1 x 4 x 5 x 7",
        ),
        (Transplant(q=torch.randn(3, 5, 8)), r"\[other-sizes\] .*found 1 x 3 x 5 x 8"),
        (Transplant(k=torch.randn(3, 4, 5, 8)), r"\[other-sizes\] .*found 3 x 4 x 5 x 8"),
        (Transplant(map=torch.rand(4, 5, 6)), r"\[other-sizes\] expected map of 2 or 1 x 4 x 5 x 5"),
        (Transplant(q=torch.randn(1, 5, 8), heads=[4]), r"\[unknown-head\]"),
        (Transplant(q=Input("other"), tokens=[5]), r"\[unknown-token\]"),
        (Transplant(k=Input("other"), heads=[0]), r"\[other-sizes\] expected other of 2 x 1 x 5 x 8"),
        (Transplant(q=Input("ids")), r"\[not-numbers\]"),
        (Transplant(q="run"), r"\[needs-calibration\]"),
        ([Transplant(q=Input("other")), GroupedQuery(kv_heads=2)], r"\[already-edited\]"),
        ([Transplant(q=torch.randn(4, 5, 8)), HeadPatch([0], "mean")], "let this pass come before transplant"),
        ([ScaleHeads(Input("gains")), HeadPatch([0], "mean")], "come before those that read gains of each call"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(passes: Any, told: str) -> None:
    model, x = Cross().eval(), torch.randn(2, 5, 32)
    given = {
        "other": torch.randn(2, HEADS, 5, SIZE),
        "ids": torch.zeros(2, HEADS, 5, SIZE).long(),
        "gains": torch.ones(1, HEADS),
    }
    policy = attnopt.Policy.of(passes)
    brought = {i.name: given[i.name] for i in policy.inputs}
    data = [{"x": x, "y": x, **brought}] if "come before" in told else None
    with pytest.raises(attnopt.RewriteError, match=told):
        attnopt.optimize(model, policy, (), {"x": x, "y": x, **brought}, calibration=data, strict=True)


def test_known_values_keep_lengths_and_batch_fixed() -> None:
    model, x = Cross().eval(), torch.randn(2, 5, 32)
    q, shapes = torch.randn(2, HEADS, 5, SIZE), {"x": {1: torch.export.Dim("l")}, "y": {1: torch.export.Dim("l")}}
    with pytest.raises(attnopt.RewriteError, match="found a dynamic length"):
        attnopt.optimize(model, Transplant(q=q), (x, x), dynamic_shapes=shapes, strict=True)
    b = torch.export.Dim("b")
    with pytest.raises(attnopt.RewriteError, match="valid only at the size of the example for axis 0 of x"):
        attnopt.optimize(model, Transplant(q=q), (x, x), dynamic_shapes={"x": {0: b}, "y": {0: b}})
    one = attnopt.optimize(model, Transplant(q=q[:1]), (x, x), dynamic_shapes={"x": {0: b}, "y": {0: b}})
    x = torch.randn(3, 5, 32)
    want = wanted(model, {"x": x, "y": x}, {0: Edit({"q": q[:1]})})
    oracle.assert_same(oracle.run(one, (x, x)), want)
    assert {n for n, _ in one.named_parameters()}.isdisjoint({"q.weight", "q.bias"}), "no head needs its own queries"


@pytest.mark.parametrize(
    "options",
    [
        {}, {"q": Input("a"), "map": Input("b")}, {"q": "walk"}, {"q": torch.ones(3)}, {"k": torch.full((1, 2, 3), torch.nan)},
        {"q": torch.ones(2, 3, 4), "heads": [0]}, {"q": Input("a"), "heads": [1, 1]}, {"q": torch.ones(2, 3, 4).bool()},
        {"q": Input("a"), "tokens": [0.5]}, {"q": 3},
    ],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(attnopt.PolicyError, match="transplant: "):
        Transplant(**options)


def test_no_class_and_no_decoder_takes_it() -> None:
    model = made("llama", num_key_value_heads=2)
    given = inputs("llama")
    for p, told in (
        (ScaleHeads(Input("gains")), "no model class hands gains of each call"),
        (
            Transplant(q=torch.randn(1, HEADS, 7, SIZE), tokens=[0]),
            "cannot be represented in this model class|dynamic length",
        ),
    ):
        with pytest.raises((attnopt.ConversionError, attnopt.RewriteError), match=told):
            attnopt.convert(model, p, (), given, strict=True)
