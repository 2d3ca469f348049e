"""Gains by least squares: against a closed form where the readout is linear, and against another optimizer where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hooked_models
import numpy as np
import observed
import pytest
import torch
from observed import WIDTH
from paths import Plain, Stack, shares_of, shares_of_stack
from scipy.optimize import least_squares
from torch import Tensor

import attnopt
from attnopt.errors import CalibrationError, PolicyError, RewriteError

pytestmark = pytest.mark.usefixtures("one_capture")


@pytest.fixture(scope="module")
def data() -> tuple[Stack, list[Tensor], list[Tensor]]:
    """Targets that other gains would give, with noise."""
    torch.manual_seed(0)
    model, batches = observed.far(Stack()), [torch.randn(3, 6, WIDTH) for _ in range(3)]
    targets = []
    for x in batches:
        shares = shares_of_stack(model, x)
        told = model.head(sum((0.2 + 0.4 * i) * c for i, c in enumerate(shares.values()))).detach()
        targets.append(told + 0.3 * torch.randn_like(told))
    return model, batches, targets


def columns(model: Stack, batches: list[Tensor]) -> tuple[list[str], np.ndarray[Any, Any]]:
    """What each path alone would give, [numbers, paths]."""
    each = [shares_of_stack(model, x) for x in batches]
    found = [torch.cat([model.head(shares[path]).flatten() for shares in each]) for path in each[0]]
    return list(each[0]), torch.stack(found, 1).detach().double().numpy()


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_the_closed_form_of_a_linear_readout(data: Any, ridge: float) -> None:
    model, batches, targets = data
    paths, a = columns(model, batches)
    t = torch.cat([x.flatten() for x in targets]).double().numpy()
    weight = ridge * np.diag(a.T @ a).mean()
    want = np.linalg.solve(a.T @ a + weight * np.eye(len(paths)), a.T @ t + weight)
    found = attnopt.fit_path_gains(model, batches, targets, ridge=ridge)
    assert list(found) == paths
    assert list(found.values()) == pytest.approx(want.tolist(), rel=1e-3, abs=1e-4)
    assert found.before == pytest.approx(float(((a.sum(1) - t) ** 2).mean()), rel=1e-4)
    assert found.after == pytest.approx(float(((a @ want - t) ** 2).mean()), rel=1e-4)
    gained = attnopt.path_gain(model, found, (batches[0],))
    with torch.no_grad():
        apart = [float((m(batches[0]) - targets[0]).square().mean()) for m in (gained, model)]
    assert apart[0] < apart[1]


def test_some_paths_beside_given_ones(data: Any) -> None:
    model, batches, targets = data
    paths, a = columns(model, batches)
    t = torch.cat([x.flatten() for x in targets]).double().numpy()
    free = [i for i, path in enumerate(paths) if path.endswith("mlp")]
    fixed = {"embedding": 0.0, "layers.0.attn": 2.0}
    given = np.array([fixed.get(path, 1.0) for path in paths])
    given[free] = 0.0
    want = np.linalg.lstsq(a[:, free], t - a @ given, rcond=None)[0]
    found = attnopt.fit_path_gains(model, batches, targets, paths="*.mlp", fixed=fixed, ridge=0.0)
    assert [found[paths[i]] for i in free] == pytest.approx(want.tolist(), rel=1e-3, abs=1e-4)
    assert {path: found[path] for path in fixed} == fixed
    assert found.fixed == {*fixed}
    assert set(found) == {*fixed, *(paths[i] for i in free)}


def test_what_is_cut_is_made_up_for(data: Any) -> None:
    """The model's own outputs as targets."""
    model, batches, _ = data
    paths, a = columns(model, batches)
    cut = paths.index("layers.0.mlp")
    rest = [i for i in range(len(paths)) if i != cut]
    want = np.linalg.lstsq(a[:, rest], a.sum(1), rcond=None)[0]
    found = attnopt.fit_path_gains(model, batches, fixed={"layers.0.mlp": 0}, ridge=0.0)
    assert [found[paths[i]] for i in rest] == pytest.approx(want.tolist(), rel=1e-3, abs=1e-4)
    assert found.after < found.before


@pytest.mark.slow  # fits gains of all paths
def test_through_a_norm_and_a_softmax() -> None:
    """Against scipy on the model written by hand."""
    model = hooked_models.llama()
    batches = [{"input_ids": ids, "use_cache": False} for ids in hooked_models.IDS]
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")]
    each = [shares_of(model, b, {n: n for n in names}, "model.layers.0.input_layernorm") for b in batches]
    generator = torch.Generator().manual_seed(0)
    labels = [torch.randint(0, 50, (2,), generator=generator) for _ in batches]
    targets = [torch.nn.functional.one_hot(x, 50).double() for x in labels]
    stacked = [torch.stack([s[:, -1] for s in shares.values()]).double() for shares in each]
    norm, head = model.model.norm.weight.double(), model.lm_head.weight.double()

    def residual(gains: Any) -> Any:
        told = []
        for parts, t in zip(stacked, targets, strict=True):
            y = torch.einsum("p,pbc->bc", torch.tensor(gains, dtype=torch.float64), parts)
            y = y * (y.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt() * norm
            told.append(((y @ head.T).softmax(-1) - t).flatten())
        return torch.cat(told).numpy()

    def read(out: Any) -> Tensor:
        return out.logits[:, -1].double().softmax(-1)

    found = attnopt.fit_path_gains(model, batches, targets, read=read, ridge=0.05, limit=100)
    assert found.before == pytest.approx(float((residual(np.ones(7)) ** 2).mean()), rel=1e-4)
    assert found.after == pytest.approx(float((residual(list(found.values())) ** 2).mean()), rel=1e-4)
    assert found.after < found.before
    weight = 0.05 * _curvature(residual)

    def penalised(gains: Any) -> Any:
        return np.concatenate([residual(gains), weight**0.5 * (np.asarray(gains) - 1)])

    best = least_squares(penalised, np.ones(7), xtol=1e-12, ftol=1e-12, gtol=1e-12)
    reached = float((penalised(list(found.values())) ** 2).sum())
    assert reached <= 2 * best.cost * (1 + 1e-3)


def _curvature(residual: Any) -> float:
    step = 1e-6
    base = residual(np.ones(7))
    each = [((residual(np.ones(7) + step * np.eye(7)[i]) - base) / step) for i in range(7)]
    return float(np.mean([column @ column for column in each]))


def test_it_prints_as_a_table(data: Any) -> None:
    model, batches, targets = data
    text = str(attnopt.fit_path_gains(model, batches, targets, fixed={"layers.0.attn": [1, 0, 1, 1]}))
    assert "path gains, mean squared error" in text
    assert "1, 0, 1, 1" in text
    assert "given" in text
    assert "fitted" in text


def test_batches_of_other_lengths(data: Any) -> None:
    model, batches, targets = data
    shorter = [batches[0], batches[1][:2, :4], batches[2]]
    found = attnopt.fit_path_gains(model, shorter, [targets[0], targets[1][:2, :4], targets[2]], ridge=0.0)
    paths, a = columns(model, shorter)
    t = torch.cat([targets[0].flatten(), targets[1][:2, :4].flatten(), targets[2].flatten()]).double().numpy()
    assert list(found.values()) == pytest.approx(np.linalg.lstsq(a, t, rcond=None)[0].tolist(), rel=1e-3, abs=1e-4)
    assert len(paths) == 5


def errors() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    return {
        "no targets": ({"targets": None}, PolicyError, "the model's own outputs are fitted"),
        "too few": ({"targets": []}, CalibrationError, "0 targets for 3 batches"),
        "shape": ({"targets": [torch.zeros(3, 6)] * 3}, CalibrationError, "target 0 has the shape [3, 6]"),
        "nan": ({"targets": [torch.full((3, 6, 5), torch.nan)] * 3}, CalibrationError, "NaN or infinities"),
        "no data": ({"calibration": []}, CalibrationError, "calibration is empty"),
        "path": ({"paths": "layers.*.mpl"}, PolicyError, "no path is named 'layers.*.mpl'"),
        "none left": ({"paths": "embedding", "fixed": {"*": 0}}, PolicyError, "none is left to fit"),
        "ridge": ({"ridge": -1}, PolicyError, "expected at least 0"),
        "nan ridge": ({"ridge": float("nan")}, PolicyError, "expected a finite number"),
        "limit": ({"limit": 0}, PolicyError, "limit=0"),
        "read": ({"read": 3}, PolicyError, "expected a function"),
        "what is read": ({"read": lambda out: [out]}, CalibrationError, "is list, expected a tensor"),
        "nothing": ({"read": lambda out: 0 * out}, CalibrationError, "no path changes what is read"),
    }


@pytest.mark.parametrize("case", errors())
def test_errors_say_what_to_do(data: Any, case: str) -> None:
    changed, kind, told = errors()[case]
    model, batches, targets = data
    given: dict[str, Any] = {"calibration": batches, "targets": targets, **changed}
    with pytest.raises(kind) as e:
        attnopt.fit_path_gains(model, **given)
    assert told in str(e.value)


def test_a_model_without_a_stream() -> None:
    x = torch.randn(2, 6, WIDTH)
    with pytest.raises(RewriteError, match="residual stream"):
        attnopt.fit_path_gains(Plain().eval(), [x], [x])


def test_the_model_stays_as_it_is(data: Any) -> None:
    model, batches, targets = data
    state: Mapping[str, Tensor] = {k: v.clone() for k, v in model.state_dict().items()}
    attnopt.fit_path_gains(model, batches, targets)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
