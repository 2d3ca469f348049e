"""Decoders whose layers differ in heads: heads of zeros make them alike, and change no logit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_decoder import generated, greedy
from test_decoder_caches import CLOSE, exported, optimized, texts, whole
from tiny_decoder import Runtime

import attnopt
from attnopt.base.closeness import difference
from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export.head_slots import EMPTY, HeadSlots, uniform
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads

UNEQUAL: dict[str, tuple[Any, tuple[int, int]]] = {  # policy, and the slots of queries and of keys
    "one K/V head in one layer": ({"*0*": "fuse", "*1*": GroupedQuery(1, merge="mean")}, (4, 2)),
    "a head less": (
        {"*0*": "fuse", "*1*": PruneHeads(heads=(0,))},
        (6, 3),
    ),  # the graph repeats keys that are shared unevenly
    "one head and three": ({"*0*": PruneHeads(heads=(0, 1, 2)), "*1*": PruneHeads(heads=(3,))}, (3, 3)),
    "one head each": ({"*0*": PruneHeads(heads=(0, 1, 2)), "*1*": PruneHeads(heads=(1, 2, 3))}, (1, 1)),
}


@pytest.mark.slow  # exports whole models
@pytest.mark.parametrize(("policy", "sizes"), UNEQUAL.values(), ids=UNEQUAL)
def test_every_step_is_that_of_the_whole(policy: Any, sizes: tuple[int, int], tmp_path: Path) -> None:
    fast, ids = optimized(policy), texts(2, 30)
    file = exported(fast, tmp_path / "m", pad_heads=True)
    run = Runtime(file, 2, 32)
    assert {x.shape()[1] for x in run.cache.values()} == {sizes[1]}
    assert difference([run.in_parts(ids, [12] + [1] * 18)], [whole(fast, ids)]) < CLOSE
    decoder = json.loads((file.parent / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == sizes
    assert decoder["hidden_size"] == 8 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"windows": "rolling"}, {"kv": "int8"}], ids=["float32", "rolling", "int8"])
def test_a_runtime_generates_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    heads: dict[str, Any] = {"*0*": "fuse", "*1*": [PruneHeads(heads=(0,)), GroupedQuery(1, merge="mean")]}
    policy = heads | ({"*0*": LocalWindow(4, 0)} if "windows" in options else {})
    fast, prompt = optimized(policy), [3, 1, 4, 1, 5, 9, 2]
    exported(fast, tmp_path / "m", context_length=48, pad_heads=True, **options)
    made = generated(tmp_path / "m", [prompt], 30)[0]
    assert len(made) == 30
    if "kv" in options:  # the model may choose other tokens: those of the file itself
        run = Runtime(tmp_path / "m" / "model.onnx", 1, 48)
        logits = run.in_parts(torch.tensor([made]), [7] + [1] * 23)
        assert logits[0, 6:-1].argmax(-1).tolist() == made[7:]
    else:
        assert made == greedy(fast, prompt, 30)


def test_without_padding_they_are_refused(tmp_path: Path) -> None:
    fast = optimized({"*0*": "fuse", "*1*": GroupedQuery(1, merge="mean")})
    with pytest.raises(attnopt.ExportError, match=r"different sizes .1 heads of 8, 2 heads of 8") as caught:
        exported(fast, tmp_path / "m")
    assert "pad_heads=True" in caught.value.hint
    assert not list(tmp_path.iterdir())


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7), min_size=1, max_size=4))
def test_slots_hold_every_head_beside_its_keys(layers: list[list[int]]) -> None:
    """Of any layers: ``layers`` has for each query head the key/value head that it reads."""
    specs = [_spec(shared) for shared in layers]
    found = uniform(specs)
    assert len({(len(x.heads), len(x.kv_heads)) for x in found}) == 1
    for spec, slots in zip(specs, found, strict=True):
        _check(spec, slots)
        _check(spec, HeadSlots.of(spec))
    assert len(found[0].kv_heads) >= max(spec.num_kv_heads for spec in specs)
    assert len(found[0].kv_heads) <= max(spec.num_heads for spec in specs)


def _spec(shared: list[int]) -> AttentionSpec:
    used = sorted(set(shared))
    places = tuple(used.index(g) for g in shared)
    return AttentionSpec.of(len(shared), len(used), 8, 8, scale=1.0, kv_of_head=places)


def _check(spec: AttentionSpec, slots: HeadSlots) -> None:
    assert sorted(h for h in slots.heads if h != EMPTY) == list(range(spec.num_heads))
    r = len(slots.heads) // len(slots.kv_heads)
    assert r * len(slots.kv_heads) == len(slots.heads)
    for place, h in enumerate(slots.heads):
        assert h == EMPTY or slots.kv_heads[place // r] == spec.kv_of_head[h]


def test_layers_that_are_alike_stay_as_they_are() -> None:
    even = AttentionSpec.of(6, 3, 8, 8, scale=1.0)
    assert uniform([even, even]) == [HeadSlots.of(even)] * 2 == [HeadSlots(tuple(range(6)), (0, 1, 2))] * 2
