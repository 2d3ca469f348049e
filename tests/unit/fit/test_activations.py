"""What sites compute on calibration data, and how that data is kept: against hooks and against formulas written anew."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from models import Attention, Spelling, inputs
from stacks import batches, head_inputs, stack
from torch import Tensor, nn

import attnopt
from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.compiler.compile import compiled
from attnopt.compiler.job import Options
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.fit.least_squares import Moments, fit, ridge
from attnopt.ir.activations import HELD_BACK
from attnopt.ir.operands import OperandTensors
from attnopt.match.find import find
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads


def test_stream_gives_what_hooks_see() -> None:
    model, data = stack(), batches()
    program = capture(model, CallInputs((data[0],), {}))
    found = find(program).found
    inputs = [((x,), {}) for x in data]
    wanted = head_inputs(model, data)
    for (f, activations), want in zip(Stream(program.module, found, inputs).sites(), wanted, strict=True):
        got = torch.cat([z.transpose(1, 2).flatten(2).flatten(0, 1) for z in activations.outputs(f.site.spec)])
        torch.testing.assert_close(got, want)
        kept = torch.cat([w[c] for w, c in zip(want.split(8 * 12), _flat(activations.counted(False)), strict=True)])
        held = torch.cat([w[c] for w, c in zip(want.split(8 * 12), _flat(activations.counted(True)), strict=True)])
        assert len(held) * (HELD_BACK - 1) == len(kept)
        assert activations.tokens == 4 * 8 * 12


@pytest.mark.slow
def test_stream_holds_one_layer_however_deep_the_model_is() -> None:
    model, data = stack(layers=7), batches()
    program = capture(model, CallInputs((data[0],), {}))
    held: list[int] = []
    for _f, _activations in Stream(program.module, find(program).found, [((x,), {}) for x in data]).sites():
        gc.collect()
        live = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in gc.get_objects()
            if type(x) is Tensor and x.shape[:1] == data[0].shape[:1]
        }
        held.append(sum(live.values()))
    assert held[0] > 0
    assert held[-2] == held[2], held  # the last one has none after it to keep anything for


@pytest.mark.slow
def test_decisions_hold_new_weights_once_and_in_the_precision_of_the_model() -> None:
    model, data = stack(), batches()
    made = compiled(model, GroupedQuery(2), CallInputs((data[0],), {}), [CallInputs((x,), {}) for x in data], Options())
    for d in made.decisions:
        assert d.plan is not None
        assert d.plan.edits
        assert {e.weight.dtype for e in d.plan.edits} == {torch.float32}
        assert all(d.site.parameters[name] is p for name, p in d.found.site.parameters.items())


def _flat(masks: list[Tensor]) -> list[Tensor]:
    return [m.flatten() for m in masks]


def test_activations_with_other_weights() -> None:
    model, data = stack(), batches(1)
    program = capture(model, CallInputs((data[0],), {}))
    found = find(program).found
    for f, activations in Stream(program.module, found, [((data[0],), {})]).sites():
        weight = torch.randn(4, 16)
        edited = activations.edited([attnopt.HeadWeights("k", 2, weight, torch.zeros(4))])
        before, after = activations.batches[0], edited.batches[0]
        assert torch.equal(before.q, after.q)
        assert torch.equal(before.k[:, [0, 1, 3]], after.k[:, [0, 1, 3]])
        if f.site.name == "layers.0":
            torch.testing.assert_close(after.k[:, 2], data[0] @ weight.T)
        assert edited.original is activations


@pytest.mark.parametrize("unpack", ["split", "chunk", "slice", "unbind", "select"])
def test_packed_projections_are_computed_anew(unpack: str) -> None:
    s = Spelling(packing="fused", unpack=unpack)
    given = inputs(s)
    program = capture(Attention(s), CallInputs((), given))
    ((_, activations),) = Stream(program.module, find(program).found, [CallInputs((), given)]).sites()
    weight = torch.randn(4, 12)
    after = activations.edited([attnopt.HeadWeights("k", 2, weight, torch.zeros(4))]).batches[0]
    torch.testing.assert_close(after.k[:, 2], given["x"] @ weight.T)
    before = activations.batches[0]
    assert all(
        torch.equal(a, b) for a, b in ((before.q, after.q), (before.v, after.v), (before.k[:, :2], after.k[:, :2]))
    )


def test_padding_does_not_count() -> None:
    q = torch.randn(2, 1, 5, 3)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    bias = torch.zeros(2, 1, 1, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    wanted = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert torch.equal(OperandTensors(q, q, q, mask=mask).real, wanted)
    assert torch.equal(OperandTensors(q, q, q, bias=bias).real, wanted)
    assert bool(OperandTensors(q, q[:, :, :4], q[:, :, :4], mask=mask[..., :4]).real.all()), (
        "queries of another sequence"
    )
    assert bool(OperandTensors(q, q, q, mask=mask, is_cross=True).real.all()), "as many queries of another sequence"
    assert bool(OperandTensors(q, q, q).real.all())
    causal = torch.ones(5, 5, dtype=torch.bool).tril() & mask.flip(3)  # padding first: its queries see nothing
    for hidden in (torch.finfo(torch.float32).min, -10000.0, -torch.inf):
        bias = torch.zeros(2, 1, 5, 5).masked_fill(~causal, hidden)
        assert torch.equal(OperandTensors(q, q, q, bias=bias).real, wanted.flip(1))
    assert bool(OperandTensors(q, q, q, bias=torch.linspace(0, -400, 5).reshape(1, 1, 1, 5)).real[:, 0].all())


def test_ridge_is_least_squares_toward_todays_weights() -> None:
    z, y, toward = torch.randn(50, 7).double(), torch.randn(50, 3).double(), torch.randn(7, 3).double()
    m = Moments(z.T @ z, z.T @ y, float(y.square().sum()), 50)
    reg = 0.01 * float(m.zz.diagonal()[:-1].mean())
    stacked = torch.cat([z, reg**0.5 * torch.eye(7).double()]), torch.cat([y, reg**0.5 * toward])
    torch.testing.assert_close(ridge(m, toward, 0.01), torch.linalg.lstsq(*stacked).solution)
    w = torch.randn(7, 3).double()
    assert m.error(w) == pytest.approx(float((y - z @ w).square().sum() / y.square().sum()))


def test_fit_is_accepted_only_where_held_back_data_agree() -> None:
    z, today = torch.randn(60, 5).double(), torch.randn(5, 2).double()
    better = today + torch.randn(5, 2).double()

    def moments(y: Tensor) -> Moments:
        return Moments(z.T @ z, z.T @ y, float(y.square().sum()), 60)

    found = fit(moments(z @ better), moments(z @ better), today, has_bias=True)
    assert found.step == 1.0
    torch.testing.assert_close(found.weights, better, atol=1e-2, rtol=1e-2)
    refused = fit(moments(z @ better), moments(z @ today), today, has_bias=True)
    assert refused.step == 0.0
    assert torch.equal(refused.weights, today)
    between = fit(moments(z @ better), moments(z @ (0.5 * today + 0.5 * better)), today, has_bias=True)
    assert between.step == 0.5
    without = fit(moments(z @ better), moments(z @ better), today, has_bias=False)
    assert torch.equal(without.weights[-1], today[-1])


def test_calibration_is_saved_and_loaded(tmp_path: Path) -> None:
    given: list[Any] = [
        torch.randn(2, 3),
        (torch.arange(3), {"a": [torch.ones(1), None]}),
        {"x": torch.zeros(2), "flag": True},
    ]
    calibration = attnopt.Calibration.of(given)
    calibration.save(tmp_path / "c.safetensors")
    again = attnopt.Calibration.load(tmp_path / "c.safetensors")
    assert len(again) == 3
    assert torch.equal(again.batches[0][0][0], given[0])
    assert torch.equal(again.batches[1][0][1]["a"][0], torch.ones(1))
    assert again.batches[1][0][1]["a"][1] is None
    assert again.batches[2][1]["flag"] is True
    assert attnopt.Calibration.of(again) is again
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(attnopt.ArchiveError, match="is not calibration data"):
        attnopt.Calibration.load(tmp_path / "broken")
    with pytest.raises(attnopt.ArchiveError, match="holds a Linear"):
        attnopt.Calibration.of([(nn.Linear(1, 1),)]).save(tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("policy", [PruneHeads(0.25), GroupedQuery(2)])
def test_bad_calibration_names_the_site(policy: Any) -> None:
    model = stack()
    few = [torch.randn(1, 12, 16)]
    with pytest.raises(
        attnopt.CalibrationError, match="12 calibration tokens are fewer than the 16 features"
    ) as caught:
        attnopt.optimize(model, policy, (few[0],), calibration=few)
    assert caught.value.site == "layers.0"
    broken = batches()
    broken[1][0, 0, 0] = torch.nan
    with pytest.raises(attnopt.CalibrationError, match="not finite on calibration batch 1") as caught:
        attnopt.optimize(model, policy, (broken[0],), calibration=broken)
    assert caught.value.site == "layers.0"
    with pytest.raises(attnopt.CalibrationError, match="batch 1 does not fit"):
        attnopt.optimize(model, policy, (few[0],), calibration=[few[0], torch.randn(1, 5, 16)])
    with pytest.raises(attnopt.CalibrationError, match="calibration is empty"):
        attnopt.optimize(model, policy, (few[0],), calibration=[])


def test_constant_features_are_no_obstacle() -> None:
    """Singular statistics: a head whose output is the same for all tokens, and one that is zero."""
    model, data = stack(1), batches()
    attention = model.layers[0]
    attention.v.weight.data[:8] = 0.0
    attention.v.bias.data[4:8] = 0.0
    fast = attnopt.optimize(model, PruneHeads(0.5), (data[0],), calibration=data)
    assert fast.sites[0].spec.heads == (2, 3)
    oracle.assert_same(oracle.run(fast, (data[0],)), oracle.run(model, (data[0],)), limit=2e-2)


def test_passes_without_need_of_it_only_measure() -> None:
    model, data = stack(), batches()
    fast = attnopt.optimize(model, LocalWindow(2), (data[0],), calibration=data)
    plain = attnopt.optimize(model, LocalWindow(2), (data[0],))
    oracle.assert_same(oracle.run(fast, (data[0],)), oracle.run(plain, (data[0],)), limit=0.0)
