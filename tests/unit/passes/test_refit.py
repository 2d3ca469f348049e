"""The output projection fitted to what the layer gave in the original model, from what the rewritten model brings to it."""

from __future__ import annotations

import pytest
import torch
from stacks import Twice, batches, stack
from torch import Tensor, nn

import attnopt
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, Refit, ScaleHeads

DATA, OTHER = batches(6, 8), batches(2, 8, seed=7)


def error(fast: nn.Module, model: nn.Module, data: list[Tensor] = OTHER) -> float:
    with torch.no_grad():
        return sum(float((fast(x) - model(x)).square().sum()) for x in data)


def with_means(rows: Tensor, sequences: int) -> Tensor:
    """Tokens, and the mean of each sequence, ten times as heavy as all of its tokens."""
    of_sequence = rows.double().unflatten(0, (sequences, -1))
    return torch.cat([rows.double(), of_sequence.mean(1) * (10 * of_sequence.shape[1]) ** 0.5])


def optimized(model: nn.Module, policy: object) -> attnopt.OptimizedModel:
    return attnopt.optimize(model, policy, (DATA[0],), calibration=DATA)


def test_nothing_changes_where_nothing_was_changed() -> None:
    model = stack()
    fast = optimized(model, Refit())
    assert error(fast, model) < 1e-8
    own = dict(fast.graph_module.named_parameters())
    assert all(
        own[f"layers.{i}.o.{name}"] is getattr(model.layers[i].o, name) for i in (0, 1) for name in ("weight", "bias")
    )


def test_what_can_be_made_up_for_is() -> None:
    """The layer halves what it reads; its output projection can double it."""
    model = stack()
    halved = {"*": [ScaleHeads([0.5, 0.25, 2, 1])]}
    lost = error(optimized(model, halved), model)
    assert lost > 1
    assert error(optimized(model, {"*": [ScaleHeads([0.5, 0.25, 2, 1]), Refit()]}), model) < 1e-4 * lost


def test_it_is_the_least_squares_solution() -> None:
    """Of one layer, against one computed by hand: shrinkage and what is held out cost a little."""
    model, more = stack(1), batches(40, 8)
    fast = attnopt.optimize(model, [LocalWindow(1), Refit()], (DATA[0],), calibration=more)
    windowed = optimized(model, LocalWindow(1))
    layer, x = model.layers[0], torch.cat(more)
    B, L, _ = x.shape
    with torch.no_grad():
        q, k, v = (f(x).view(B, L, 4, 4).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
        near = torch.ones(L, L, dtype=torch.bool).tril() & ~torch.ones(L, L, dtype=torch.bool).tril(-2)
        z = ((q @ k.mT / 2).masked_fill(~near, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2).flatten(0, 1)
        z, y = with_means(torch.cat([z, torch.ones_like(z[:, :1])], 1), B), with_means((model(x) - x).flatten(0, 1), B)
        best = float((y - z @ torch.linalg.lstsq(z, y).solution).square().sum())
        wrong = [torch.cat([m(part) - model(part) for part in more]).flatten(0, 1) for m in (fast, windowed)]
        fitted, lost = (float(with_means(e, B).square().sum()) for e in wrong)
    assert best <= fitted * (1 + 1e-6)
    assert fitted < best + 0.1 * (lost - best)


def test_a_larger_ridge_keeps_more_of_the_weights() -> None:
    model = stack(1)
    old, moved = model.layers[0].o.weight, list[float]()
    for ridge in (0.0, 1.0, 25.0, 1e6):
        fast = optimized(model, [LocalWindow(1), Refit(ridge=ridge)])
        new = dict(fast.graph_module.named_parameters())["layers.0.o.weight"]
        moved.append(float((new - old).detach().norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 10 * moved[2] > 0
    assert moved[3] < 1e-3 * moved[0]


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), "much", True])
def test_a_ridge_that_is_none(ridge: object) -> None:
    with pytest.raises(attnopt.PolicyError, match="refit: invalid value ridge="):
        Refit(ridge=ridge)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("p", [LocalWindow(1), PruneHeads(heads=[0, 2], compensate="none"), GroupedQuery(1)])
def test_a_later_layer_makes_up_for_an_earlier_one(p: attnopt.Pass) -> None:
    """The last layer stays as it is; only the stream of the rewritten model tells it what the first one has lost."""
    model = stack(2)
    plain = optimized(model, {"layers.0": p})
    mended = optimized(model, {"layers.0": p, "layers.1": Refit()})
    assert mended.report.sites[1].status == "rewritten"
    assert error(mended, model) < 0.98 * error(plain, model)
    assert mended.report.cost_after == plain.report.cost_after


def test_a_stream_that_is_no_sum_is_not_made_up_for() -> None:
    """The layer's output is multiplied before it is added: adding what the stream lost to it would be wrong."""

    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.layers, self.scale = stack(2).layers, scale

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + self.scale * layer(x)
            return x

    from attnopt.base.call_inputs import CallInputs
    from attnopt.compiler.analyze import analyze_in_eval
    from attnopt.compiler.followed_calibration import FollowedStream
    from attnopt.compiler.job import backends_of

    for scale, known in ((1.0, True), (0.5, False)):
        analyzed = analyze_in_eval(Scaled(scale).eval(), CallInputs((DATA[0],), {}))
        gm, found = analyzed.program.module, analyzed.findings.found
        stream = FollowedStream(gm, found, [CallInputs((DATA[0],), {})], [], backends_of("auto"))
        for _, activations in stream.sites():
            assert activations.rewritten is not None
            assert bool(activations.rewritten.drift) == known
    model = Scaled(0.5).eval()
    plain, mended = (
        optimized(model, {"layers.0": ScaleHeads([3] * 4), **more}) for more in ({}, {"layers.1": Refit()})
    )
    assert error(mended, model) < error(plain, model)


def test_shared_weights_are_fitted_together() -> None:
    model = Twice().eval()
    count = sum(p.numel() for p in model.parameters())
    plain, fast = optimized(model, LocalWindow(1)), optimized(model, [LocalWindow(1), Refit()])
    assert error(fast, model) < error(plain, model)
    assert sum(p.numel() for p in fast.graph_module.parameters()) == count


def test_it_needs_data_and_is_a_policy() -> None:
    with pytest.warns(attnopt.AttnoptWarning, match="refit .needs-calibration."):
        attnopt.optimize(stack(), Refit(), (DATA[0],))
    assert attnopt.Policy.of("refit").passes == (Refit(),)
