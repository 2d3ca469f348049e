"""What heads do, collected, against hooks that are written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import observed
import pytest
import torch
from observed import EXAMPLES, H
from observed import assert_near as same
from torch import Tensor, nn

import attnopt
from attnopt.errors import ArchiveError, CalibrationError, PolicyError
from attnopt.observe import maps
from attnopt.observe.chosen import KINDS
from attnopt.passes import HeadPatch


def counted(x: Tensor, tokens: Tensor, axis: int) -> Tensor:
    """The values of tokens that count, [N, ...]."""
    return x.movedim(axis, 1)[tokens]


@pytest.mark.parametrize("name", EXAMPLES)
def test_everything_is_what_hooks_read(name: str) -> None:
    example = EXAMPLES[name]()
    found = attnopt.collect(example.model, [example.batch], KINDS)
    for a in example.attentions:
        want = observed.by_hand(example, a)
        taken = found[a.name]
        assert set(taken.values) == set(KINDS)
        for kind in KINDS:
            same(taken[kind][0], want[kind])
        assert taken.heads == tuple(range(H))
        assert taken.kv_heads == tuple(range(a.kv_heads))


@pytest.mark.parametrize("name", ["Llama", "BERT", "cross"])
def test_only_some_heads_queries_and_keys(name: str) -> None:
    example = EXAMPLES[name]()
    rows, columns, heads = [-1, 0, 3], [2, -2], [1, 3]
    found = attnopt.collect(example.model, [example.batch], KINDS, rows=rows, columns=columns, heads=heads)
    for a in example.attentions:
        want, taken = observed.by_hand(example, a), found[a.name]
        read = sorted({h * a.kv_heads // H for h in heads})
        assert (taken.heads, taken.kv_heads) == (tuple(heads), tuple(read))
        for kind in ("q", "outputs", "contribution", "lse"):
            same(taken[kind][0], want[kind][:, heads][:, :, rows])
        for kind in ("scores", "weights"):
            same(taken[kind][0], want[kind][:, heads][:, :, rows][..., columns])
        for kind in ("k", "v"):
            same(taken[kind][0], want[kind][:, read][:, :, columns])
        same(taken["input"][0], want["input"][:, rows])


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "cross"])
def test_padding_is_told_and_does_not_count(name: str) -> None:
    example = EXAMPLES[name]()
    a = example.attentions[0]
    tokens = example.batch["attention_mask"].bool()
    queries = tokens if name != "cross" else torch.ones(2, 7, dtype=torch.bool)
    kept = attnopt.collect(example.model, [example.batch], ["outputs", "k"], a.name)
    assert torch.equal(kept[a.name].real[0], queries)
    assert torch.equal(kept[a.name].seen[0], tokens)
    assert kept[a.name].tokens == int(queries.sum())
    want = observed.by_hand(example, a)
    for kind in ("q", "outputs", "contribution", "lse", "input"):
        axis = 1 if kind == "input" else 2
        mean = attnopt.collect(example.model, [example.batch] * 2, kind, a.name, reduce="mean")[a.name, kind]
        same(mean, counted(want[kind], queries, axis).mean(0))
        total = attnopt.collect(example.model, [example.batch] * 2, kind, a.name, reduce="sum")[a.name, kind]
        torch.testing.assert_close(total, 2 * counted(want[kind], queries, axis).sum(0), rtol=1e-5, atol=1e-4)
    for kind in ("k", "v"):
        same(
            attnopt.collect(example.model, [example.batch], kind, a.name, reduce="mean")[a.name, kind],
            counted(want[kind], tokens, 2).mean(0),
        )


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "cross"])
def test_column_means_need_no_map(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    example = EXAMPLES[name]()
    monkeypatch.setattr(maps, "ELEMENTS", 100)  # several blocks
    found = attnopt.collect(example.model, [example.batch], "weights", reduce="column-mean")
    for a in example.attentions:
        weights = observed.by_hand(example, a)["weights"]
        keys = example.batch.get("attention_mask", torch.ones(2, 9)).bool()
        queries = (
            keys if name in ("BERT", "GPT-2") else torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool)
        )
        each = torch.stack([w[:, q].mean(1) for w, q in zip(weights, queries, strict=True)])
        want = (each * keys[:, None]).sum(0) / keys.sum(0)
        same(found[a.name, "weights"], want)


def test_padding_of_other_keys_says_nothing_about_as_many_queries() -> None:
    """A text of seven tokens beside an image of seven: where the text is padded, the image is not."""
    model = observed.far(observed.Cross())
    batch = {"hidden": torch.randn(2, 7, observed.WIDTH), "text": torch.randn(2, 7, 12)}
    batch["attention_mask"] = torch.ones(2, 7).long()
    batch["attention_mask"][1, 3:] = 0
    outputs: list[Tensor] = []
    hook = model.to_out[0].register_forward_pre_hook(lambda _, given: outputs.append(given[0].unflatten(-1, (H, -1))))
    with torch.no_grad():
        model(**batch)
        lengths = model.to_q(model.norm(batch["hidden"])).unflatten(-1, (H, -1)).norm(dim=-1).mean((0, 1))
    hook.remove()
    (taken,) = attnopt.collect(model, [batch], "outputs").values()
    assert bool(taken.real[0].all())
    assert taken.seen == ()
    same(
        next(iter(attnopt.collect(model, [batch], "outputs", reduce="mean").values()))["outputs"],
        outputs[0].mean((0, 1)),
    )
    (norms,) = attnopt.head_importance(model, [batch], "query-norm").values()
    same(torch.tensor(norms), lengths)
    patched = attnopt.optimize(model, HeadPatch([1], "mean"), (), batch, calibration=[batch])
    ablated = outputs[0].clone()
    ablated[:, :, 1] = outputs[0].mean((0, 1))[1]
    with torch.no_grad():
        want = batch["hidden"] + model.to_out[0](ablated.flatten(2))
    torch.testing.assert_close(patched(**batch), want, rtol=1e-4, atol=1e-5)


def test_the_mean_of_nothing_is_no_number() -> None:
    """Of the last queries where all are padding, and of scores that no sequence shows."""
    example = EXAMPLES["GPT-2"]()
    a, batch = example.attentions[0], {**example.batch, "attention_mask": torch.ones(2, 9).long()}
    batch["attention_mask"][:, 7:] = 0
    mean = attnopt.collect(example.model, [batch], "outputs", a.name, rows=[-1], reduce="mean")[a.name, "outputs"]
    assert bool(mean.isnan().all())
    scores = attnopt.collect(example.model, [batch], "scores", a.name, reduce="mean")[a.name, "scores"]
    shown = torch.ones(9, 9, dtype=torch.bool).tril() & (torch.arange(9) < 7) & (torch.arange(9)[:, None] < 7)
    assert torch.equal(scores.isfinite(), shown.expand(H, -1, -1))
    columns = attnopt.collect(example.model, [batch], "weights", a.name, reduce="column-mean")[a.name, "weights"]
    assert torch.equal(columns.isfinite(), (torch.arange(9) < 7).expand(H, -1))


def test_maps_are_averaged_over_sequences_position_by_position() -> None:
    example = EXAMPLES["GPT-2"]()
    a, tokens = example.attentions[1], example.batch["attention_mask"].bool()
    want = observed.by_hand(example, a)
    pairs = (tokens[:, :, None] & tokens[:, None, :])[:, None]
    mean = attnopt.collect(example.model, [example.batch], "weights", a.name, reduce="mean")[a.name, "weights"]
    same(mean, (want["weights"] * pairs).sum(0) / pairs.sum(0))
    scores = attnopt.collect(example.model, [example.batch], "scores", a.name, reduce="mean")[a.name, "scores"]
    seen = pairs & (want["scores"] > -torch.inf)
    shown = seen.any(0)
    assert torch.equal(scores.isfinite(), shown)
    same(scores[shown], (want["scores"].masked_fill(~seen, 0.0).sum(0) / seen.sum(0))[shown])


def test_batches_of_other_lengths() -> None:
    example = EXAMPLES["BERT"]()
    a = example.attentions[1]
    batches = [
        {"input_ids": torch.randint(0, 50, (n, length)), "attention_mask": observed.mask(*lengths, longest=length)}
        for n, length, lengths in ((2, 9, (9, 6)), (3, 5, (5, 5, 2)), (1, 12, (12,)))
    ]
    each = [observed.by_hand(observed.Example(example.model, b, example.attentions), a) for b in batches]
    for given in (batches, iter(batches)):  # of a generator, only the first is known beforehand
        found = attnopt.collect(example.model, given, ["weights", "outputs"])
        for kind in ("weights", "outputs"):
            for got, want in zip(found[a.name, kind], each, strict=True):
                same(got, want[kind])
        assert found.batches == 3
    mean = attnopt.collect(example.model, batches, "outputs", reduce="mean")[a.name, "outputs"]
    tokens = [b["attention_mask"].bool() for b in batches]
    same(mean, torch.cat([counted(w["outputs"], t, 2) for w, t in zip(each, tokens, strict=True)]).mean(0))
    last = attnopt.collect(example.model, batches, "weights", rows=[-1], reduce="sum")[a.name, "weights"]
    rows = [
        (w["weights"][:, :, -1:] * t[:, None, -1:, None] * t[:, None, None, :]).sum(0)
        for w, t in zip(each, tokens, strict=True)
    ]
    same(last, sum(torch.nn.functional.pad(r, (0, 12 - r.shape[-1])) for r in rows))


def test_a_function_of_ones_own() -> None:
    example = EXAMPLES["BERT"]()
    a = example.attentions[0]

    def largest(x: Tensor, real: Tensor) -> Tensor:
        assert real.shape == (2, 9)
        return x.amax(-1)

    found = attnopt.collect(example.model, [example.batch], "weights", a.name, reduce=largest)
    same(found[a.name, "weights"][0], observed.by_hand(example, a)["weights"].amax(-1))
    with pytest.raises(PolicyError, match="reduce returned float"):
        attnopt.collect(example.model, [example.batch], "weights", reduce=lambda x, _: float(x.sum()))  # type: ignore[arg-type, return-value]


def test_contributions_and_embedding_add_up_to_the_residual() -> None:
    for name, last in (("GPT-2", "ln_f"), ("Llama", "norm"), ("ViT", "layernorm")):
        example = EXAMPLES[name]()
        inputs, _, _ = observed.hooked(example.model, example.batch)
        found = attnopt.collect(example.model, [example.batch], "contribution")
        total = torch.zeros(())
        for taken in found.values():
            x = taken["contribution"][0]
            total = total + (x.sum(1) if taken.heads else x)
        for a in example.attentions:
            bias = getattr(example.model.get_submodule(a.out), "bias", None)
            total = total if bias is None else total + bias.detach()
        torch.testing.assert_close(total, inputs[last], rtol=1e-5, atol=1e-5)
        mlps = [n for n, taken in found.items() if not taken.heads]
        assert len(found) == 5, mlps  # two attentions, two MLPs, the embedding


class Scaled(nn.Module):
    """An attention whose output is scaled, normalised, or both, before it is added."""

    def __init__(self, *after: str, norm: str = "layer") -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.after, self.gamma = after, nn.Parameter(torch.rand(32) + 0.5)
        self.norm = nn.LayerNorm(32) if norm == "layer" else nn.RMSNorm(32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (i.unflatten(-1, (H, 8)).transpose(1, 2) for i in self.qkv(x).chunk(3, -1))
        y = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        for step in self.after:
            y = {
                "scale": lambda y: y * self.gamma,
                "half": lambda y: y / 2,
                "norm": self.norm,
                "by hand": by_hand_norm,
            }[step](y)
        x = x + y
        return x + self.down(self.up(x).relu())


def by_hand_norm(y: Tensor) -> Tensor:
    return y * (y.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize(
    ("after", "norm"),
    [
        (("scale",), "layer"),
        (("half", "scale"), "layer"),
        (("norm",), "layer"),
        (("norm", "scale"), "rms"),
        (("by hand",), "layer"),
    ],
)
def test_what_follows_the_projection_counts(after: tuple[str, ...], norm: str) -> None:
    torch.manual_seed(0)
    model, x = observed.far(Scaled(*after, norm=norm)), torch.randn(2, 5, 32)
    inputs, outputs, _ = observed.hooked(model, {"x": x})
    found = attnopt.collect(model, [x], "contribution")
    heads = found["", "contribution"][0]
    added = inputs["up"] - x
    silent = observed.hooked(model, {"x": x})[1]["out"] - model.out.bias  # what heads give, without the bias
    bias = outputs["out"] - silent
    steps: dict[str, Any] = {
        "scale": lambda y: y * model.gamma,
        "half": lambda y: y / 2,
        "by hand": lambda y: y * (outputs["out"].pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(),
    }
    for step in after:
        if step != "norm":
            bias = steps[step](bias)
            continue
        if norm == "rms":
            scale = (outputs["out"].pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
            bias = bias * scale * model.norm.weight
        else:
            scale = (outputs["out"].var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt()
            bias = (bias - bias.mean(-1, keepdim=True)) * scale * model.norm.weight + model.norm.bias
    torch.testing.assert_close(heads.sum(1) + bias, added, rtol=1e-5, atol=1e-5)
    some = attnopt.collect(model, [x], "contribution", "", rows=[-1, 2], heads=[1])
    same(some["", "contribution"][0], heads[:, [1]][:, :, [-1, 2]])


def test_nothing_is_computed_that_is_not_asked() -> None:
    """r rows of a map cost what r queries cost, and nothing after the last attention runs."""
    example = EXAMPLES["Llama"]()
    sizes: list[int] = []
    real = maps.scores_of

    def scores_of(spec: Any, q: Tensor, *others: Any) -> Any:
        sizes.append(q.shape[2])
        return real(spec, q, *others)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(maps, "weights_of", None)
        patched.setattr(maps, "scores_of", scores_of)
        attnopt.collect(example.model, [example.batch], "scores", rows=[-1, 2])
        attnopt.collect(example.model, [example.batch], ["outputs", "q", "k", "v"])
    assert sizes == [2, 2]


@pytest.mark.slow  # searches all objects of the process for batches
def test_batches_come_one_by_one_and_are_let_go() -> None:
    import gc
    import weakref

    model = EXAMPLES["BERT"]().model
    alive: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[dict[str, Tensor]]:
        for _ in range(6):
            gc.collect()
            assert sum(x() is not None for x in alive) <= 3  # the first, whose sizes count, and the last two
            x = torch.randint(0, 50, (2, 9))
            alive.append(weakref.ref(x))
            yield {"input_ids": x}

    found = attnopt.collect(model, batches(), "outputs", reduce="mean")
    assert found.batches == 6


def test_saved_and_loaded(tmp_path: Path) -> None:
    example = EXAMPLES["Llama"]()
    for options in ({}, {"reduce": "mean"}):
        found = attnopt.collect(example.model, [example.batch] * 2, ["weights", "k"], **options)
        found.save(tmp_path / "found.safetensors")
        again = attnopt.Collected.load(tmp_path / "found.safetensors")
        assert str(again) == str(found)
        assert (again.reduce, again.batches, list(again)) == (found.reduce, 2, list(found))
        for name, taken in found.items():
            for kind, x in taken.values.items():
                torch.testing.assert_close(again[name, kind], x, rtol=0, atol=0)
            assert again[name].heads == taken.heads
            assert again[name].kv_heads == taken.kv_heads
            torch.testing.assert_close(again[name].real, taken.real)
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(ArchiveError, match="is not what a collection saved"):
        attnopt.Collected.load(tmp_path / "broken")


def test_prints_as_a_table() -> None:
    example = EXAMPLES["Llama"]()
    text = str(attnopt.collect(example.model, [example.batch], ["weights", "lse"], reduce="mean"))
    assert text.splitlines()[0] == "collected from 1 batch, mean"
    assert "layers.0.self_attn" in text
    assert "4 x 9 x 9" in text
    assert "0-3" in text


def errors() -> dict[str, tuple[type[Exception], dict[str, Any], str]]:
    return {
        "kind": (PolicyError, {"what": "weihgts"}, "expected one of 'q', 'k', 'v'"),
        "no kind": (PolicyError, {"what": []}, "what is empty"),
        "glob": (PolicyError, {"sites": "decoder.*"}, "no attention is named 'decoder.*'"),
        "no glob": (PolicyError, {"sites": []}, "expected names of attentions"),
        "rows": (PolicyError, {"rows": [3, 9]}, "rows 9 out of range: encoder.layer.0.attention.self has 9 queries"),
        "columns": (PolicyError, {"columns": [-10]}, "columns -10 out of range"),
        "no rows": (PolicyError, {"rows": []}, "rows is empty"),
        "text rows": (PolicyError, {"rows": "last"}, "expected a sequence of integers"),
        "heads": (PolicyError, {"heads": [1, 4]}, "there is no head 4 in encoder.layer.0.attention.self"),
        "reduce": (PolicyError, {"reduce": "median"}, "expected one of 'mean', 'sum', 'column-mean'"),
        "column means": (PolicyError, {"reduce": "column-mean", "what": ["weights", "q"]}, "not of 'q'"),
        "no batches": (CalibrationError, {"batches": []}, "there are no batches"),
        "a tensor": (CalibrationError, {"batches": torch.zeros(2, 9)}, "not Tensor"),
        "a number": (CalibrationError, {"batches": [{"input_ids": torch.zeros(2, 9).long()}, 3]}, "batch 1 is a int"),
    }


@pytest.mark.parametrize("case", errors())
def test_errors_say_what_to_do(case: str) -> None:
    kind, changed, told = errors()[case]
    model = EXAMPLES["BERT"]().model
    given: dict[str, Any] = {"batches": [{"input_ids": torch.zeros(2, 9).long()}], "what": "weights"}
    with pytest.raises(kind) as e:
        attnopt.collect(model, **{**given, **changed})
    assert told in str(e.value)


def test_an_attention_without_projections() -> None:
    class Bare(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT).softmax(-1) @ v

    x = torch.randn(2, H, 5, 8)
    for kind, told in (("contribution", "the output projection cannot be read"), ("input", "it has no known input")):
        with pytest.raises(CalibrationError, match=told):
            attnopt.collect(Bare(), [(x, x, x)], kind)
    same(attnopt.collect(Bare(), [(x, x, x)], "weights")["", "weights"][0], (x @ x.mT).softmax(-1))
