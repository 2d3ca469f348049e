"""Checkpoints whose layers differ in heads: loaded, they are the converted model to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert import assert_decodes_as_it_reads, generated, gpt2, ids, llama, logits, qwen3

import attnopt
from attnopt.errors import ConversionError
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:no configuration of")
UNEQUAL: dict[str, Any] = {
    "*layers.0.*": [PruneHeads(heads=[2]), LocalWindow(left=5, right=0)],
    "*layers.1.*": GroupedQuery(2, merge="mean"),
}


@pytest.fixture(scope="module")
def unequal() -> Any:
    return attnopt.convert(llama(layers=3), {**UNEQUAL, "*layers.2.*": []}, ids())


@pytest.fixture
def folder(unequal: Any, tmp_path: Path) -> Path:
    unequal.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_the_stock_class_with_the_heads_of_each_layer(unequal: Any, folder: Path) -> None:
    loaded = attnopt.load_pretrained(folder)
    assert type(loaded) is transformers.LlamaForCausalLM
    shapes = [
        (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features) for layer in loaded.model.layers
    ]
    assert shapes == [(24, 24), (32, 16), (32, 32)]
    assert torch.equal(logits(loaded, ids()), logits(unequal, ids()))
    assert torch.equal(generated(loaded, ids(), 12), generated(unequal, ids(), 12))  # the window included
    assert_decodes_as_it_reads(loaded)


def test_saved_and_loaded_again_and_in_another_type(unequal: Any, folder: Path, tmp_path: Path) -> None:
    attnopt.load_pretrained(folder).save_pretrained(tmp_path / "n", max_shard_size="10KB")  # in several files
    assert len(list((tmp_path / "n").glob("*.safetensors"))) > 1
    assert torch.equal(logits(attnopt.load_pretrained(tmp_path / "n"), ids()), logits(unequal, ids()))
    assert attnopt.load_pretrained(folder, dtype=torch.float64).lm_head.weight.dtype == torch.float64


def test_the_entry_says_what_the_class_builds_otherwise(folder: Path) -> None:
    entry = json.loads((folder / "config.json").read_text("utf-8"))["attnopt_heads"]
    assert entry["shapes"]["model.layers.0.self_attn.q_proj.weight"] == [24, 32]
    assert entry["attributes"]["model.layers.1.self_attn"]["num_key_value_groups"] == 2
    assert not any("layers.2" in name for name in entry["shapes"])


@pytest.mark.parametrize("make", [gpt2, qwen3])
def test_other_classes(make: Any, tmp_path: Path) -> None:
    """Packed projections and no configuration for it; norms and biases."""
    model = make()
    converted = attnopt.convert(model, PruneHeads(heads=[2]), ids())
    converted.save_pretrained(tmp_path)
    assert torch.equal(logits(attnopt.load_pretrained(tmp_path), ids()), logits(converted, ids()))


@pytest.mark.slow  # converts twice
def test_converted_twice(tmp_path: Path) -> None:
    once = attnopt.convert(llama(layers=2), {"*layers.0.*": PruneHeads(heads=[2]), "*layers.1.*": []}, ids())
    twice = attnopt.convert(once, {"*layers.1.*": GroupedQuery(2, merge="mean"), "*layers.0.*": []}, ids())
    twice.save_pretrained(tmp_path / "twice")
    assert torch.equal(logits(attnopt.load_pretrained(tmp_path / "twice"), ids()), logits(twice, ids()))
    alike = attnopt.convert(once, {"*layers.1.*": PruneHeads(heads=[0]), "*layers.0.*": []}, ids())
    alike.save_pretrained(tmp_path / "alike")
    assert torch.equal(logits(attnopt.load_pretrained(tmp_path / "alike"), ids()), logits(alike, ids()))


@pytest.mark.slow  # converts another model
def test_an_ordinary_checkpoint(tmp_path: Path) -> None:
    converted = attnopt.convert(llama(), GroupedQuery(2, merge="mean"), ids())
    converted.save_pretrained(tmp_path)
    assert "attnopt_heads" not in json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert torch.equal(logits(attnopt.load_pretrained(tmp_path), ids()), logits(converted, ids()))


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "no such module": ({"attributes": {"model.layers.9": {"n": 1}}, "shapes": {}}, "has no integer model.layers.9.n"),
    "another kind of attribute": (
        {"attributes": {"model": {"forward": 1}}, "shapes": {}}, "has no integer model.forward"
    ),
    "no such parameter": ({"attributes": {}, "shapes": {"x": [1]}}, "has no parameter x"),
    "no number": ({"attributes": {"model": {"n": "1"}}, "shapes": {}}, "invalid entry 'attnopt_heads'"),
    "no shapes": ({"attributes": {}}, "invalid entry 'attnopt_heads'"),
    "other shapes": ({"attributes": {}, "shapes": {}}, "size mismatch|mismatched"),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "said"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_entry(entry: dict[str, Any], said: str, folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "attnopt_heads": entry}), "utf-8")
    with pytest.raises((ConversionError, RuntimeError), match=said):  # transformers refuses weights of other shapes
        attnopt.load_pretrained(folder)


def test_what_is_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is not a checkpoint of transformers"):
        attnopt.load_pretrained(tmp_path / "nothing")
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "architectures": ["Mine"]}), "utf-8")
    with pytest.raises(ConversionError, match="no model class"):
        attnopt.load_pretrained(folder)
    assert attnopt.load_pretrained(folder, transformers.LlamaForCausalLM).config.num_hidden_layers == 3


def test_missing_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ConversionError, match=r"missing keys: model.layers.1.self_attn.k_proj.weight"):
        attnopt.load_pretrained(folder)
