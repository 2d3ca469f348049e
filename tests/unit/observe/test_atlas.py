"""The atlas of heads, against maps that are computed and resampled by hand, and on heads of known kinds."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import observed
import planted_heads
import pytest
import tiny_models
import torch
from observed import EXAMPLES
from torch import Tensor, nn

import attnopt
from attnopt.errors import ArchiveError, CalibrationError, PolicyError
from attnopt.observe import collect as collecting
from attnopt.observe import maps as weight_maps
from attnopt.observe.map_grid import MeanMaps
from attnopt.passes import PruneHeads
from attnopt.statistics import Distance, Locality, SinkMass
from attnopt.statistics.k_means import clustered


def resampled(map_HNM: Tensor, rows: int, columns: int) -> Tensor:
    """On a grid, by way of one on which both fit: rows are means of queries, columns sums of keys."""
    H, n, m = map_HNM.shape
    fine = map_HNM.repeat_interleave(rows, 1).repeat_interleave(columns, 2) / columns
    return fine.reshape(H, rows, n, columns, m).mean(2).sum(-1)


def sequences(example: observed.Example, a: observed.Attention) -> list[Tensor]:
    """The map of each sequence without its padding."""
    weights = observed.by_hand(example, a)["weights"]
    found = []
    for b, w in enumerate(weights):
        mask = example.batch.get("attention_mask")
        if mask is None:
            found.append(w)
            continue
        keys = mask[b].bool()
        found.append(w[:, keys][..., keys] if w.shape[1] == w.shape[2] else w[..., keys])
    return found


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("cells", [32, 7, 4])
def test_maps_are_means_over_sequences(name: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_maps, "ELEMENTS", 100)  # several blocks of queries
    example = EXAMPLES[name]()
    found = attnopt.atlas(example.model, [example.batch], (), cells=cells)
    for a in example.attentions:
        alone = sequences(example, a)
        lengths = [{x.shape[axis] for x in alone} for axis in (1, 2)]
        rows, columns = (next(iter(n)) if len(n) == 1 and max(n) <= cells else cells for n in lengths)
        want = torch.stack([resampled(x, rows, columns) for x in alone]).mean(0)
        torch.testing.assert_close(found[a.name].maps, want, rtol=1e-5, atol=2e-6)
        assert (found[a.name].queries, found[a.name].keys) == tuple((min(n), max(n)) for n in lengths)
    assert found.sequences == 2


def test_the_grid_of_sequences_with_padding_anywhere() -> None:
    """Padding on the left, on the right and in between, and a grid that grows with the lengths."""
    torch.manual_seed(0)
    seen = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    weights = torch.rand(5, 2, 5, 5) * seen[:, None, None, :]
    sums, want = MeanMaps(4), []
    for at in (slice(0, 3), slice(3, 4), slice(4, 5)):
        blocks = [(torch.arange(3), weights[at, :, :3]), (torch.arange(3, 5), weights[at, :, 3:])]
        sums.add(blocks, seen[at], seen[at])
        want += [w[:, s][..., s] for w, s in zip(weights[at], seen[at], strict=True) if s.any()]
        cells = 3 if len(want) == 3 else 4  # all of one length so far
        mean = torch.stack([resampled(w, cells, cells) for w in want]).mean(0)
        torch.testing.assert_close(sums.mean(), mean, rtol=1e-5, atol=1e-6)
    assert (sums.sequences, sums.lengths) == (4, [(3, 5), (3, 5)])


def test_one_length_is_not_resampled() -> None:
    model, (x,) = planted_heads.planted()
    want = attnopt.collect(model, [x], "weights", reduce="mean")
    found = attnopt.atlas(model, [x[:1], x[1:]])
    for site in want:
        torch.testing.assert_close(found[site].maps, want[site, "weights"], rtol=1e-6, atol=1e-7)


def test_the_order_of_batches_does_not_matter() -> None:
    model, _ = planted_heads.planted()
    torch.manual_seed(1)
    batches = [torch.randn(n, length, planted_heads.WIDTH) for n, length in ((2, 9), (1, 40), (3, 9), (2, 12))]
    there, back = (attnopt.atlas(model, given, cells=16) for given in (batches, batches[::-1]))
    assert there.sequences == 8
    for site in there:
        torch.testing.assert_close(there[site].maps, back[site].maps, rtol=1e-5, atol=1e-7)
        assert there[site].profile is not None
        torch.testing.assert_close(*(torch.tensor(a[site].profile.values) for a in (there, back)))  # type: ignore[union-attr]
        assert there[site].queries == (9, 40)
    streamed = attnopt.atlas(model, iter(batches), cells=16)
    torch.testing.assert_close(streamed["layers.1"].maps, there["layers.1"].maps)


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "ViT"])
@pytest.mark.parametrize("how", [Distance(), Distance(grid=(2, 4), prefix=1), Distance(prefix=2)], ids=str)
def test_the_profile_and_distances_are_those_of_the_statistic(name: str, how: Distance) -> None:
    example = EXAMPLES[name]()
    if how.grid is not None and name == "ViT":
        how = Distance(grid=(4, 4), prefix=1)
    found = attnopt.atlas(example.model, [example.batch], how, distance=how)
    want = attnopt.head_profile(example.model, [example.batch], how)
    for site, scores in attnopt.head_importance(example.model, [example.batch], how).items():
        torch.testing.assert_close(found.statistics[how.to_json()][site], scores, rtol=1e-5, atol=1e-6)
        profile = found[site].profile
        assert profile is not None
        assert profile.at[:4] == (0, 1, 2, 4)[: len(profile.at)]
        ends = [*profile.at[1:], 1e9]
        for row, whole in zip(profile.values, want[site].values, strict=True):
            octaves = [
                sum(s for d, s in enumerate(whole) if low <= d < high)
                for low, high in zip(profile.at, ends, strict=True)
            ]
            torch.testing.assert_close(torch.tensor(row), torch.tensor(octaves), rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_head_importance_and_in_the_order_of_the_question() -> None:
    example = EXAMPLES["GPT-2"]()
    example.batch["input_ids"][:, 4] = example.batch["input_ids"][:, 1]  # for induction, a token that comes back
    data = [example.batch]
    asked = ["entropy", "locality", SinkMass(keys=2), "induction", "ablation", "flap"]
    found = attnopt.atlas(example.model, data, asked)
    assert list(found.statistics) == ["entropy", "locality", "sink-mass(keys=2)", "induction", "ablation", "flap"]
    for method in asked:
        want = attnopt.head_importance(example.model, data, method)
        for site, scores in want.items():
            torch.testing.assert_close(found.statistics[want.method][site], scores, rtol=1e-5, atol=1e-6)


def test_the_model_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x,) = planted_heads.planted()
    calls = []
    real = collecting.analyze_in_eval
    monkeypatch.setattr(collecting, "analyze_in_eval", lambda *given: calls.append(1) or real(*given))
    attnopt.atlas(model, [x, x[:, :9]], ["entropy", "sink-mass", "ablation"])
    assert len(calls) == 1


def test_kinds_of_heads_are_recovered() -> None:
    """Heads of five kinds, in attentions with different numbers of heads, at lengths that are resampled and not."""
    model, (x,) = planted_heads.planted()
    kinds = [k for layer in model.layers for k in layer.kinds]  # type: ignore[union-attr]
    for batches, cells, seed in (([x], 32, 0), ([x, torch.randn(2, 50, planted_heads.WIDTH)], 16, 1)):
        found = attnopt.atlas(model, batches, (), clusters=5, cells=cells, seed=seed)
        clusters = [c for own in found.values() for c in own.clusters]
        assert len({*zip(kinds, clusters, strict=True)}) == 5
        assert {*clusters} == set(range(5))
    assert [len(own.heads) for own in found.values()] == [5, 5, 2]
    heads = found.kinds()
    assert [len(heads[c]) for c in heads] == [3, 3, 2, 2, 2]
    assert {site for own in heads.values() for site, _ in own} == set(found)


def test_heads_that_are_alike_are_one_kind() -> None:
    torch.manual_seed(0)
    model = planted_heads.Stack(("uniform",) * 3).eval()
    for layer in model.layers:
        layer.q.weight.data.zero_(), layer.q.bias.data.zero_()
        layer.where.zero_()
    found = attnopt.atlas(model, [torch.randn(2, 8, planted_heads.WIDTH)])
    assert found["layers.0"].clusters == (0, 0, 0)
    torch.testing.assert_close(torch.tensor(found["layers.0"].places), torch.zeros(3, 2), atol=1e-6, rtol=0)


def test_clusters_are_the_best_of_several_starts() -> None:
    """From the most distant points alone, the outlier has a cluster of its own, and two of the groups share one."""
    torch.manual_seed(0)
    sizes, centres = (10, 30, 20), ((0.0, 0.0), (0.0, 2.0), (2.0, 0.0))
    groups = [torch.tensor(c).double() + 0.05 * torch.randn(n, 2).double() for n, c in zip(sizes, centres, strict=True)]
    x = torch.cat([*groups, torch.tensor([[-3.0, -3.0]]).double()])
    wanted = [2] * 10 + [0] * 30 + [1] * 20 + [2]  # the largest first
    for seed in range(6):
        assert clustered(x, 3, seed).tolist() == wanted
        assert clustered(x.flip(0), 3, seed).tolist() == wanted[::-1]
    assert clustered(x[:1], 3, 0).tolist() == [0]


@pytest.mark.slow  # many batches
def test_memory_does_not_depend_on_the_number_of_batches() -> None:
    model, _ = planted_heads.planted()
    alive: list[weakref.ref[Tensor]] = []

    def batches(count: int) -> Iterator[Tensor]:
        for i in range(count):
            gc.collect()
            assert sum(ref() is not None for ref in alive[1:]) <= 1  # the first is what the model was captured with
            x = torch.randn(2, 12 + i % 3, planted_heads.WIDTH)
            alive.append(weakref.ref(x))
            yield x
            del x

    many = attnopt.atlas(model, batches(9), cells=8)
    assert many.sequences == 18
    assert many["layers.0"].maps.shape == (5, 8, 8)


def test_what_has_no_distance_is_told() -> None:
    example = EXAMPLES["cross"]()
    found = attnopt.atlas(example.model, [example.batch], ["locality", "entropy"])
    assert found["attn2"].profile is None
    assert found.statistics["locality"] == {}
    assert set(found.statistics["entropy"]) == {"attn2"}
    assert [(m.site, m.of) for m in found.missing] == [("attn2", "profile"), ("attn2", "locality")]
    assert "queries and keys of one sequence" in found.missing[0].why
    assert "Not measured" in str(found)


class _Gate(nn.Module):
    """A softmax that is no attention beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, _ = tiny_models.causal()

    def forward(self, x: Tensor) -> Tensor:
        scores = (x @ x.mT).softmax(-1)
        return self.attention(x) + (scores * scores) @ x


def test_candidates_that_are_no_attention_are_told() -> None:
    torch.manual_seed(0)
    model = _Gate().eval()
    x = torch.randn(2, 12, 16)
    near = attnopt.inspect(model, (x,)).near_misses
    found = attnopt.atlas(model, [x])
    assert [(m.site, m.of) for m in found.missing] == [(m.name, "map") for m in near]
    assert near
    assert not attnopt.atlas(model, [x], sites="attention.*").missing


def test_results_of_other_measurements_are_statistics() -> None:
    model, (x,) = planted_heads.planted()
    measured = attnopt.head_importance(model, [x], "taylor", loss=lambda out, _: out.square().mean())
    patched = attnopt.patch(model, x, x.flip(0), metric=lambda out: out[:, -1].mean(), sites="layers.0")
    found = attnopt.atlas(model, [x], [measured, patched])
    assert found.statistics["taylor"] == dict(measured)
    assert found.statistics["denoising"] == dict(patched)
    assert {m.site for m in found.missing} == {"layers.1", "layers.2"}


def test_the_numbers_of_heads_are_those_of_the_trained_model() -> None:
    model, (x,) = planted_heads.planted()
    fast = attnopt.optimize(model, {"layers.0": PruneHeads(heads=[0, 2])}, (x,))
    found = attnopt.atlas(fast, [x], "entropy")
    assert [own.heads for own in found.values()] == [(1, 3, 4), (0, 1, 2, 3, 4), (0, 1)]
    whole = attnopt.atlas(model, [x], "entropy")
    torch.testing.assert_close(found["layers.0"].maps, whole["layers.0"].maps[[1, 3, 4]])


def test_an_onnx_file(tmp_path: Any) -> None:
    model, args = tiny_models.causal()
    attnopt.optimize(model.eval(), "fuse", args).export_onnx(tmp_path / "m.onnx")
    found = attnopt.atlas(tmp_path / "m.onnx", [args], "locality")
    want = attnopt.atlas(model, [args], "locality")
    for own, wanted in zip(found.values(), want.values(), strict=True):
        torch.testing.assert_close(own.maps, wanted.maps, rtol=1e-4, atol=1e-6)


def test_json_and_back() -> None:
    model, (x,) = planted_heads.planted()
    found = attnopt.atlas(model, [x], ["locality", "entropy"])
    data = json.loads(json.dumps(found.to_json()))
    again = attnopt.Atlas.from_json(data)
    assert again.to_json() == data
    assert replace(again, sites={}) == replace(found, sites={})
    for site in found:
        torch.testing.assert_close(again[site].maps, found[site].maps, atol=1e-6, rtol=0)
        assert again[site].profile == found[site].profile
        assert (again[site].clusters, again[site].places) == (found[site].clusters, found[site].places)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("format", 2),
        ("sites", []),
        ("sequences", "many"),
        ("statistics", {"entropy": {"layers.0": [1.0]}}),
        ("missing", [1]),
    ],
)
def test_damage_is_told(part: str, value: object) -> None:
    model, (x,) = planted_heads.planted()
    data = attnopt.atlas(model, [x], sites="layers.0").to_json()
    with pytest.raises(ArchiveError, match="not an attnopt atlas"):
        attnopt.Atlas.from_json({**data, part: value})
    data["sites"]["layers.0"]["clusters"] = [0]
    with pytest.raises(ArchiveError, match="5 heads with numbers of others"):
        attnopt.Atlas.from_json(data)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"what": "localty"}, "did you mean 'locality'"),
        ({"what": "retrieval"}, "retrieval: missing a required argument: 'needles'"),
        ({"what": "fisher"}, r"head_importance\(model, batches, ..., loss=...\)"),
        ({"what": ["entropy", "entropy"]}, "two statistics in what have the name 'entropy'"),
        ({"what": 3}, "what"),
        ({"sites": "layer"}, "did you mean 'layers"),
        ({"clusters": 0}, "clusters=0"),
        ({"cells": 1}, "cells=1"),
        ({"distance": Locality()}, "expected an attnopt.statistics.Distance"),
    ],
)
def test_wrong_questions(options: dict[str, Any], told: str) -> None:
    model, (x,) = planted_heads.planted()
    with pytest.raises(PolicyError, match=told):
        attnopt.atlas(model, [x], **options)


def test_wrong_batches() -> None:
    model, (x,) = planted_heads.planted()
    with pytest.raises(CalibrationError, match="atlas: there are no batches"):
        attnopt.atlas(model, [])
    with pytest.raises(CalibrationError, match="atlas: batches must be an iterable"):
        attnopt.atlas(model, x)
    with pytest.raises(CalibrationError, match="weights are not finite on batch 1"):
        attnopt.atlas(model, [x, x * float("nan")])
    with pytest.raises(PolicyError, match="atlas: no attention was found in the model"):
        attnopt.atlas(nn.Linear(4, 4), [torch.randn(2, 4)])
