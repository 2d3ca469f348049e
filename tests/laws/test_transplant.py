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

import attnopt
from attnopt import Input
from attnopt.passes import (
    PruneHeads,
    ScaleHeads,
    Transplant,
)

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


@pytest.mark.parametrize("roles", ["q", "k", "qk", "map"])
@pytest.mark.parametrize("kind", list(MODELS))
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
