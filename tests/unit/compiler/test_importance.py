"""Head scores against direct computations on the model's own modules."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from stacks import batches, head_inputs, stack
from torch import Tensor, nn

import attnopt
from attnopt.compiler.importance import head_importance, methods
from attnopt.errors import CalibrationError, PolicyError
from attnopt.passes import PruneHeads

H, D = 4, 4
NEEDS_MORE = ("fisher", "retrieval", "induction", "counterfactual", "unique-codes", "segment-mass")
NEEDS_NO_MORE = [m for m in methods() if m not in NEEDS_MORE]


def contributions(model: nn.Module, data: list[Tensor], layer: int) -> Tensor:
    """[H, tokens, out]: what each head adds to the layer's output."""
    z = head_inputs(model, data)[layer].double().view(-1, H, D)
    out = model.layers[layer].o.weight.detach().double().view(-1, H, D)
    return torch.einsum("nhd,ohd->hno", z, out)


def silenced(model: nn.Module, x: Tensor, layer: int, head: int) -> Tensor:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., head * D : head * D + D] = 0.0
        return (z,)

    handle = model.layers[layer].o.register_forward_pre_hook(hook)
    with torch.no_grad():
        out: Tensor = model(x)
    handle.remove()
    return out


def test_output_norm_is_the_mean_length_of_a_heads_contribution() -> None:
    model, data = stack(), batches()
    scores = head_importance(model, data, "output-norm")
    for i, name in enumerate(scores):
        assert scores[name] == pytest.approx(contributions(model, data, i).norm(dim=-1).mean(1).tolist(), rel=1e-5)


def test_flap_is_the_weighted_variance() -> None:
    model, data = stack(), batches()
    scores = head_importance(model, data, "flap")
    z = head_inputs(model, data)[1].double()
    wanted = (z.var(0, unbiased=False) * model.layers[1].o.weight.detach().double().square().sum(0)).view(H, D).sum(1)
    assert scores["layers.1"] == pytest.approx(wanted.tolist(), rel=1e-5)


def test_obs_is_the_rise_of_the_best_squared_error() -> None:
    model, data = stack(), batches()
    scores = head_importance(model, data, "obs")["layers.0"]
    z = head_inputs(model, data)[0].double()
    y = z @ model.layers[0].o.weight.detach().double().T
    features = torch.cat([z, torch.ones(len(z), 1).double()], 1)
    reg = 1e-3 * float(z.square().sum(0).mean())
    today = torch.cat([model.layers[0].o.weight.detach().double().T, torch.zeros(1, 16).double()])

    def objective(kept: list[int]) -> float:
        a, r = features[:, kept], today[kept]
        w = torch.linalg.solve(a.T @ a + reg * torch.eye(len(kept)).double(), a.T @ y + reg * r)
        gone = today.square().sum() - r.square().sum()  # the shrinkage counts what is set to zero, too
        return float((y - a @ w).square().sum() + reg * ((w - r).square().sum() + gone))

    everything = [*range(16), 16]
    whole = objective(everything)
    for h in range(H):
        kept = [f for f in everything if f == 16 or f // D != h]
        assert scores[h] == pytest.approx((objective(kept) - whole) / float(y.square().sum()), rel=1e-4)


def test_ablation_is_the_change_of_the_models_output() -> None:
    model, data = stack().requires_grad_(False), batches(2)
    scores = head_importance(model, data, "ablation")
    for i, name in enumerate(scores):
        for h in range(H):
            apart = [
                float((silenced(model, x, i, h) - model(x)).double().square().sum() / model(x).double().square().sum())
                for x in data
            ]
            assert scores[name][h] == pytest.approx(sum(apart) / len(apart), rel=1e-3)


def test_ablation_against_a_behaviour() -> None:
    model, data = stack().requires_grad_(False), batches(1)

    def last(output: Tensor) -> Tensor:
        return output[:, -1]

    scores = head_importance(model, data, "ablation", behaviour=last)
    want = model(data[0])[:, -1].double().log_softmax(-1)
    got = silenced(model, data[0], 1, 2)[:, -1].double().log_softmax(-1)
    assert scores["layers.1"][2] == pytest.approx(float((want.exp() * (want - got)).sum(-1).mean()), rel=1e-3)


def test_gradients_of_gates() -> None:
    model, data = stack(), batches(2)

    def loss(output: Tensor, batch: object) -> Tensor:
        return output.square().mean()

    def slope(x: Tensor, layer: int, head: int) -> float:
        """Of the loss in the head's gate, by differences: the gate is linear in what silencing takes away."""
        scaled = 1e-3
        weight = model.layers[layer].o.weight
        kept = weight.detach().clone()
        values = []
        for sign in (1, -1):
            weight.data[:, head * D : head * D + D] = kept[:, head * D : head * D + D] * (1 + sign * scaled)
            values.append(float(model.double()(x.double()).square().mean().detach()))
            model.float()
            weight.data.copy_(kept)
        return (values[0] - values[1]) / (2 * scaled)

    taylor, fisher = (head_importance(model, data, m, loss=loss) for m in ("taylor", "fisher"))
    slopes = [slope(x, 1, 3) for x in data]
    assert taylor["layers.1"][3] == pytest.approx(sum(map(abs, slopes)) / 2, rel=1e-2)
    assert fisher["layers.1"][3] == pytest.approx(sum(s * s for s in slopes) / 2, rel=2e-2)


def test_sensitivity_without_labels_ranks_a_silent_head_last() -> None:
    model, data = stack(), batches(2)
    model.layers[1].o.weight.data[:, D : 2 * D] *= 1e-3
    scores = head_importance(model, data, "taylor")["layers.1"]
    assert min(range(H), key=scores.__getitem__) == 1
    assert scores[1] < 1e-4 * max(scores)


def test_entropy_and_locality_of_known_attention() -> None:
    """Head 0 attends to itself alone, head 1 to all keys alike."""
    model, data = stack(1, causal=False), batches(1)
    attention = model.layers[0]
    attention.q.weight.data[:4] = attention.k.weight.data[:4] = 0.0
    attention.q.weight.data[4:8] = 0.0
    attention.q.bias.data[4:8] = 0.0
    data = [torch.nn.functional.one_hot(torch.arange(12), 16).float().expand(8, 12, 16).clone()]
    attention.q.weight.data[:4, :12] = attention.k.weight.data[:4, :12] = 40 * _directions(12)
    attention.q.bias.data[:4] = attention.k.bias.data[:4] = 0.0
    entropy, locality = (head_importance(model, data, m)["layers.0"] for m in ("entropy", "locality"))
    assert entropy[0] == pytest.approx(1.0, abs=1e-3)
    assert entropy[1] == pytest.approx(0.0, abs=1e-6)
    assert locality[0] == pytest.approx(0.0, abs=1e-3)
    assert locality[1] == pytest.approx(-(12**2 - 1) / (3 * 12), rel=1e-4)


def _directions(count: int) -> Tensor:
    """[4, count] unit vectors, no two of them alike."""
    return nn.functional.normalize(torch.randn(4, count, generator=torch.Generator().manual_seed(3)), dim=0)


class Reader(nn.Module):
    """A model of token ids whose embedding feeds the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.stack = nn.Embedding(9, 16), stack(1)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.stack(self.embed(ids))
        return out


def test_induction_is_attention_to_what_followed() -> None:
    model = Reader().eval()
    ids = torch.tensor([[1, 2, 3, 1, 4, 2]])
    scores = head_importance(model, [ids], "induction")["stack.layers.0"]
    x, layer = model.embed(ids), model.stack.layers[0]
    q, k = (f(x).view(1, 6, H, D).transpose(1, 2) for f in (layer.q, layer.k))
    s = (q @ k.mT / D**0.5).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)[0]
    wanted = (s[:, 3, 1] + s[:, 5, 2]) / 2  # 1 was followed by 2; 2 by 3
    assert scores == pytest.approx(wanted.tolist(), rel=1e-4)
    with pytest.raises(CalibrationError, match="no token occurs twice"):
        head_importance(model, [torch.tensor([[1, 2, 3]])], "induction")
    with pytest.raises(CalibrationError, match="has no token ids input"):
        head_importance(stack(1), batches(1), "induction")


@pytest.mark.parametrize("method", NEEDS_NO_MORE)
def test_every_method_gives_a_table_that_prints_and_prunes(method: str) -> None:
    model, data = stack(), batches(1)
    found = head_importance(model, data, method)
    assert list(found) == ["layers.0", "layers.1"]
    assert all(len(s) == H for s in found.values())
    assert "layers.1" in str(found)
    assert found.to_json()["method"] == method
    assert head_importance(model, data, method) == found
    fast = attnopt.optimize(model, PruneHeads(0.25, importance=found), (data[0],))
    for site in fast.sites:
        least = min(range(H), key=lambda h, name=site.name: (found[name][h], -h))
        assert site.spec.heads == tuple(h for h in range(H) if h != least)


def test_only_heads_that_remain_are_scored() -> None:
    model, data = stack(), batches(1)
    fast = attnopt.optimize(model, PruneHeads(heads=[0, 2]), (data[0],))
    both, some = (head_importance(model, data, "flap", sites=s) for s in (None, fast.sites[:1]))
    assert dict(some) == {"layers.0": (both["layers.0"][1], both["layers.0"][3])}
    assert some.heads == {"layers.0": (1, 3)}


def test_batches_of_several_sizes_and_the_model_as_it_was() -> None:
    model, (x,) = stack().train(), batches(1)
    score = head_importance(model, [x, x[:2, :5]], "output-norm")
    assert model.training
    parts = [head_importance(model, [d], "output-norm")["layers.0"] for d in (x, x[:2, :5])]
    wanted = [(a * 96 + b * 10) / 106 for a, b in zip(*parts, strict=True)]
    assert score["layers.0"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "gradient"}, PolicyError, "invalid value method='gradient': expected one of 'weights'"),
        ({"method": "fisher"}, PolicyError, "'fisher' needs a loss"),
        ({"method": "flap", "loss": lambda o, b: o.sum()}, PolicyError, "loss is not used by 'flap'"),
        ({"method": "flap", "behaviour": lambda o: o}, PolicyError, "behaviour is not used by 'flap'"),
        ({"method": "taylor", "loss": lambda o, b: o}, CalibrationError, "the loss does not return a scalar"),
        ({"calibration": []}, CalibrationError, "calibration is empty"),
        ({"calibration": ["text"]}, CalibrationError, "calibration batch 0 is a str"),
        ({"calibration": [torch.full((8, 12, 16), torch.nan)]}, CalibrationError, "not finite on calibration batch 0"),
    ],
)
def test_errors_name_what_is_wrong(options: dict[str, object], error: type[Exception], message: str) -> None:
    given = {"calibration": batches(1), **options}
    with pytest.raises(error, match=message):
        head_importance(stack(), **given)  # type: ignore[arg-type]


def test_sites_that_are_not_there() -> None:
    model, data = stack(), batches(1)
    sites = attnopt.inspect(tiny_models.Attention(), (torch.randn(1, 4, 16),)).sites
    with pytest.raises(CalibrationError, match="no attention of '' was found"):
        head_importance(model, data, sites=sites)
