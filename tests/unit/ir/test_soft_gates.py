"""Heads that tokens are routed to, weighted as in MoH."""

from __future__ import annotations

from math import exp

import pytest
import tiny_models
import torch
from torch import Tensor, nn

import attnopt
from attnopt.errors import PolicyError
from attnopt.ir.call_tensor import known
from attnopt.ir.constant import Constant
from attnopt.ir.edit_registry import edit_from_json
from attnopt.ir.head_routing import Routed, SoftGates
from attnopt.passes import QueryRows, RouteHeads, Transplant
from attnopt.patterns import Full

pytestmark = pytest.mark.usefixtures("one_capture")


class Heads:
    """Four heads, of which number 2 is gone."""

    heads, kv_of_head, pattern = (0, 1, 3, 4), (0, 1, 2, 3), Full()


def a_route(soft: SoftGates | None) -> tuple[Routed, Tensor]:
    torch.manual_seed(0)
    router = torch.randn(4 * 5 + 1, 3)
    return Routed((1,), (0, 3, 4), 2, Constant.of(router), soft), router


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 2.0])
def test_gates_by_hand(sharpness: float) -> None:
    route, router = a_route(SoftGates(0.8, 1.3, sharpness))
    q, o = torch.randn(2, 4, 7, 5), torch.randn(2, 4, 7, 6)
    got = route.apply(Heads(), o, q, o, [router])
    for b in range(2):
        for i in range(7):
            scores = (torch.cat([q[b, h, i] for h in range(4)] + [torch.ones(1)]) @ router).tolist()
            used = sorted(range(3), key=lambda h: -scores[h])[:2]
            total = sum(exp(sharpness * scores[h]) for h in used)
            gates = [1.3 * 2 * exp(sharpness * scores[h]) / total if h in used else 0.0 for h in range(3)]
            factors = torch.tensor([gates[0], 0.8, *gates[1:]])  # heads 0, 1, 3 and 4
            torch.testing.assert_close(got[b, :, i], o[b, :, i] * factors[:, None])


def test_json() -> None:
    for soft in (None, SoftGates(0.8, 1.3, 2.0)):
        route, _ = a_route(soft)
        assert edit_from_json(route.to_json()) == route


def test_needs_scores_that_say_how_much_a_head_gives() -> None:
    with pytest.raises(PolicyError, match="use router='linear'"):
        RouteHeads([0], weights="soft")
    with pytest.raises(PolicyError, match="weights"):
        RouteHeads([0], router="linear", weights="firm")


def a_model() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    return tiny_models.Attention(width=32, heads=4, causal=False).eval(), [torch.randn(4, 12, 32) for _ in range(6)]


def test_nearer_to_all_heads_than_hard_gates() -> None:
    """On the tokens that they are fitted to, where factors of 1 are among the choices."""
    model, data = a_model()
    errors = {}
    for weights in ("hard", "soft"):
        policy = RouteHeads([0], 1, "linear", weights)
        fast = attnopt.optimize(model, policy, (data[0],), calibration=data, backend="sdpa")
        with torch.no_grad():
            errors[weights] = sum(float((fast(x) - model(x)).square().sum()) for x in data)
    assert errors["soft"] < errors["hard"]
    route = fast.sites[0].spec.route
    assert route is not None
    assert route.soft is not None
    assert "weighted" in str(fast.report)


def test_is_computed_as_it_is_told() -> None:
    """The output projection of head outputs times the gates of their queries."""
    model, data = a_model()
    fast = attnopt.optimize(model, RouteHeads([0], 1, "linear", "soft"), (data[0],), calibration=data, backend="sdpa")
    plain = attnopt.optimize(
        model, RouteHeads([0], 1, "linear", "soft"), (data[0],), calibration=data, backend="reference"
    )
    torch.testing.assert_close(fast(data[1]), plain(data[1]), atol=1e-5, rtol=1e-5)
    route = fast.sites[0].spec.route
    assert route is not None
    x = data[1]
    q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (model.q, model.k, model.v))
    o = (q @ k.mT / 8**0.5).softmax(-1) @ v
    o = route.apply(fast.sites[0].spec, o, q, v, known(route.tensors))
    torch.testing.assert_close(fast(x), model.o(o.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "blocked", "reference"])
def test_on_chosen_rows(backend: str) -> None:
    """Rows that are not chosen are zeros, and chosen ones are weighted."""
    model, data = a_model()
    policy = [RouteHeads([0], 1, "linear", "soft"), QueryRows("norm", 5)]
    fast = attnopt.optimize(model, policy, (data[0],), calibration=data, backend=backend)
    route, x = fast.sites[0].spec.route, data[1]
    assert route is not None
    q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (model.q, model.k, model.v))
    o = (q @ k.mT / 8**0.5).softmax(-1) @ v
    rows = q.square().sum(-1).mean(1).topk(5).indices
    o = o * torch.zeros(4, 12).scatter(1, rows, 1.0)[:, None, :, None]
    o = route.apply(fast.sites[0].spec, o, q, v, known(route.tensors))
    torch.testing.assert_close(fast(x), model.o(o.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-5)


def test_read_the_queries_of_this_run() -> None:
    model, data = a_model()
    torch.manual_seed(1)
    other = torch.randn(1, 2, 12, 8)
    policy = [RouteHeads([0], 1, "linear", "soft"), Transplant(q=other, heads=[1, 2])]
    fast = attnopt.optimize(model, policy, (data[0],), calibration=data, backend="sdpa")
    route, x = fast.sites[0].spec.route, data[1]
    assert route is not None
    q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (model.q, model.k, model.v))
    moved = torch.cat([q[:, :1], other.expand(4, -1, -1, -1), q[:, 3:]], 1)
    o = (moved @ k.mT / 8**0.5).softmax(-1) @ v
    o = route.apply(fast.sites[0].spec, o, q, v, known(route.tensors))
    torch.testing.assert_close(fast(x), model.o(o.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-5)
