"""Activation patching against hooks by hand, and on a circuit that was planted."""

from __future__ import annotations

from functools import cache
from typing import Any

import hooked_models
import pytest
import torch
from hooked_models import IDS, D, hooked, margin, outputs_of, recorded, with_slice
from induction import CLEAN, CORRUPTED, INDUCTION, PREVIOUS, Induction, said_right
from stacks import stack
from torch import Tensor, nn

import attnopt
from attnopt.compiler import head_sweep
from attnopt.errors import CalibrationError, CaptureError, PolicyError, RewriteError

pytestmark = pytest.mark.usefixtures("one_capture")
small = cache(stack)  # of which a graph is captured once


def by_hand(model: Any, base: Tensor, other: Tensor, layer: int, head: int) -> float:
    module = outputs_of(model)[layer]
    (given,) = recorded(model, [module], other)
    with hooked({module: lambda x: with_slice(x, given, head * D, D)}, {}):
        return float(margin(model(base)))


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("make", [hooked_models.gpt2, hooked_models.llama])
def test_every_head_as_with_hooks(make: Any, direction: str) -> None:
    model = make()
    found = attnopt.patch(model, IDS[0], IDS[1], metric=margin, direction=direction)
    base, other = (IDS[1], IDS[0]) if direction == "denoising" else (IDS[0], IDS[1])
    assert (found.clean, found.corrupted) == pytest.approx([float(margin(model(x))) for x in IDS], rel=1e-5)
    assert len(found) == 3
    for layer, name in enumerate(found):
        want = [by_hand(model, base, other, layer, h) for h in range(4)]
        assert found[name] == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert max(abs(m - found.ends[0]) for m in found[name]) > 1e-2  # the patches are seen at all


def test_the_circuit_is_recovered() -> None:
    found = attnopt.patch(Induction(), CLEAN, CORRUPTED, metric=said_right)
    for site, effects in found.effects.items():
        for h, effect in enumerate(effects):
            assert effect == pytest.approx(float((site, h) in (PREVIOUS, INDUCTION)), abs=0.02)
    assert {head[:2] for head in found.top(2)} == {PREVIOUS, INDUCTION}


def test_one_at_a_time_and_stacked_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooked_models.gpt2()
    together = attnopt.patch(model, *IDS, metric=margin)
    monkeypatch.setattr(head_sweep, "ROWS", {"cpu": 1, "cuda": 1})
    alone = attnopt.patch(model, *IDS, metric=margin)
    for name in together:
        assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-4)


def test_equal_runs_change_nothing() -> None:
    found = attnopt.patch(hooked_models.llama(), IDS[0], IDS[0], metric=margin)
    assert all(m == pytest.approx(found.clean, rel=1e-5, abs=1e-5) for values in found.values() for m in values)
    with pytest.raises(CalibrationError, match="in both runs"):
        found.effects  # noqa: B018
    assert "the metric" in str(found)


def test_the_values_of_all_heads_together_are_the_layer() -> None:
    """A layer whose heads are independent additions to the output: their effects add up."""
    model, (x, y) = stack(1), torch.randn(2, 2, 12, 16)
    found = attnopt.patch(model, x, y, metric=lambda out: out.sum())
    changed = sum(m - found.corrupted for m in found["layers.0"])
    want = float((model.layers[0](x) - model.layers[0](y)).sum().detach())
    assert changed == pytest.approx(want, rel=1e-3)


def test_some_sites_and_heads() -> None:
    model, (x, y) = stack(3), torch.randn(2, 2, 12, 16)
    every = attnopt.patch(model, x, y, metric=lambda out: out[:, -1].sum())
    some = attnopt.patch(model, (x,), (y,), metric=lambda out: out[:, -1].sum(), sites=["layers.[12]"], heads=[3, 0])
    assert some.heads == {"layers.1": (0, 3), "layers.2": (0, 3)}
    assert some["layers.2"] == pytest.approx([every["layers.2"][0], every["layers.2"][3]], rel=1e-4)
    site = attnopt.inspect(model, (x,)).sites[1]
    assert set(attnopt.patch(model, x, y, metric=lambda out: out.sum(), sites=site)) == {"layers.1"}


def test_the_model_is_left_as_it_is() -> None:
    model, (x, y) = stack(2), torch.randn(2, 2, 12, 16)
    model.train()
    model.layers[1].eval()
    attnopt.patch(model, x, y, metric=lambda out: out.sum())
    assert model.training
    assert model.layers[0].training
    assert not model.layers[1].training


def test_a_metric_may_write_into_the_output() -> None:
    """Also into what no head of a site changes, and into an input that is returned."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = stack(1), stack(2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.a(x), self.b(x), x

    def spoiling(out: tuple[Tensor, ...]) -> Tensor:
        found = sum(t[:, 0].sum() for t in out)
        for t in out:
            t.zero_()
        return torch.as_tensor(found)

    model, (x, y) = Beside(), torch.randn(2, 2, 12, 16)
    kept = x.clone(), y.clone()
    want = attnopt.patch(model, x, y, metric=lambda out: sum(t[:, 0].sum() for t in out))
    got = attnopt.patch(model, x, y, metric=spoiling)
    assert got.clean == pytest.approx(want.clean, rel=1e-5)
    assert all(got[name] == pytest.approx(want[name], rel=1e-5) for name in want)
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])


def test_a_cache_among_the_inputs() -> None:
    transformers = pytest.importorskip("transformers")
    model = hooked_models.llama()

    def after(ids: Tensor) -> dict[str, Any]:
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :5], past_key_values=cache, use_cache=True)
        return {"input_ids": ids[:, 5:], "past_key_values": cache}

    clean, corrupted, again = after(IDS[0]), after(IDS[1]), after(IDS[1])
    (given,) = recorded(model, outputs_of(model)[2:], IDS[0])
    found = attnopt.patch(model, clean, corrupted, metric=margin)
    with hooked({outputs_of(model)[2]: lambda x: with_slice(x, given[:, 5:], D, D)}, {}):
        want = float(margin(model(**again)))
    assert found["model.layers.2.self_attn"][1] == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert clean["past_key_values"].get_seq_length() == corrupted["past_key_values"].get_seq_length() == 5


def test_several_outputs_of_which_a_head_changes_one() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = stack(2), stack(2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            a = self.a(x)
            return {"a": a, "both": a @ self.b(x).mT, "n": 3}

    (x, y), model = torch.randn(2, 2, 12, 16), Two()
    found = attnopt.patch(model, x, y, metric=lambda out: out["a"].sum() + 0 * out["n"])
    changed = {name: max(abs(m - found.corrupted) for m in values) > 1e-3 for name, values in found.items()}
    assert len(found) == 4
    assert all(does == name.startswith("a") for name, does in changed.items())


def unstackable(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.parametrize("wrong", [True, False])
def test_an_operator_that_knows_no_stack(wrong: bool) -> None:
    """Whether it fails or gives other numbers: each head is then run alone."""
    name = f"attnopt_tests::{'wrong' if wrong else 'unable'}"
    made = torch.library.custom_op(name, unstackable, mutates_args=(), schema="(Tensor x) -> Tensor")
    made.register_fake(lambda x: torch.empty_like(x))

    def rule(info: Any, dims: Any, x: Tensor) -> tuple[Tensor, int]:
        if not wrong:
            raise RuntimeError("no stacks")
        return x * 2, dims[0]

    made.register_vmap(rule)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack(2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = made(self.stack(x))
            return out

    x, y = torch.randn(2, 2, 12, 16)
    found = attnopt.patch(Odd(), x, y, metric=lambda out: out[:, -1].sum())
    want = attnopt.patch(stack(2), x, y, metric=lambda out: out[:, -1].sum() + 32)
    assert [*found.values()] == [pytest.approx(values, rel=1e-5) for values in want.values()]


X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no function": ({"metric": 3}, PolicyError, "patch: metric is a int, expected a function"),
    "no scalar": ({"metric": lambda out: out}, CalibrationError, "returns a tensor of shape [2, 12, 16] in the clean run"),
    "nothing": ({"metric": lambda out: None}, CalibrationError, "returns NoneType in the clean run, expected one real number"),
    "a flag": ({"metric": lambda out: True}, CalibrationError, "returns bool"),
    "not a number": ({"metric": lambda out: out.sum() * torch.nan}, CalibrationError, "the metric is nan in the clean run"),
    "infinite": ({"metric": lambda out: out.sum() / 0}, CalibrationError, "inf in the clean run"),
    "another length": ({"corrupted": X[:, :7]}, CalibrationError, "input ['0'] is [2, 12, 16] torch.float32 in the"),
    "another type": ({"corrupted": X.double()}, CalibrationError, "torch.float64 in the corrupted run"),
    "other arguments": ({"corrupted": {"x": X}}, CalibrationError, "clean and corrupted have different arguments"),
    "no batch": ({"corrupted": 3}, CalibrationError, "corrupted is a int, expected a tensor"),
    "no such site": ({"sites": "layer.0"}, PolicyError, "no attention is named 'layer.0'\n  hint: did you mean 'layers.0'"),
    "no site at all": ({"sites": []}, PolicyError, "invalid value sites="),
    "no such head": ({"heads": [1, 4]}, PolicyError, "there is no head 4 in layers.0\n  hint: it has the heads 0, 1, 2, 3"),
    "a negative head": ({"heads": [-1]}, PolicyError, "heads=-1"),
    "another direction": ({"direction": "noise"}, PolicyError, "did you mean 'noising'"),
    "no model": ({"model": "model.onnx"}, CaptureError, "expected an nn.Module"),
    "no attention": ({"model": nn.Linear(16, 16)}, CalibrationError, "no attention was found"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_said(name: str) -> None:
    changed, kind, text = ERRORS[name]
    given: dict[str, Any] = {
        "model": small(),
        "clean": X,
        "corrupted": 2 * X,
        "metric": lambda out: out.sum(),
        **changed,
    }
    with pytest.raises(kind) as caught:
        attnopt.patch(given.pop("model"), given.pop("clean"), given.pop("corrupted"), **given)
    assert text in str(caught.value)


def test_a_patched_run_that_is_not_finite_names_the_head() -> None:
    calls = iter(range(100))

    def metric(out: Tensor) -> Tensor:
        return out.sum() * (torch.nan if next(calls) == 7 else 1)

    with pytest.raises(CalibrationError, match=r"nan with head 1 of layers\.1 patched"):
        attnopt.patch(stack(2), X, 2 * X, metric=metric)


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack(2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.stack(x)
            return out + torch.randn_like(out)

    with pytest.raises(RewriteError, match="draws random numbers"):
        attnopt.patch(Noisy(), X, 2 * X, metric=lambda out: out.sum())


def test_results_print_and_are_plain_data() -> None:
    found = attnopt.patch(Induction(), CLEAN, CORRUPTED, metric=said_right)
    text = str(found)
    assert "denoising: clean" in text
    assert "layers.1" in text
    assert found.to_json()["heads"] == {"layers.0": [0, 1, 2], "layers.1": [0, 1, 2]}
