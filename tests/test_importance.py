"""Head scores against a direct computation."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from torch import nn

from attnopt.errors import CalibrationError
from attnopt.importance import head_importance
from attnopt.patterns import Full
from attnopt.site import Projection, Site
from attnopt.spec import AttentionSpec

SPEC = AttentionSpec((0, 1), (0, 1), (0, 1), 8, 8, 8**-0.5, Full())
ROWS = tuple(range(8)), tuple(range(8, 16))


def _site(weight: str | None = "o.weight", rows: tuple[tuple[int, ...], ...] | None = ROWS) -> Site:
    return Site("", SPEC, {"out": Projection(weight=weight, rows=rows, why=None if rows else "it is computed")})


def _model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_models.Attention()


def test_score_is_the_mean_length_of_a_heads_contribution() -> None:
    model = _model()
    batches = [torch.randn(2, 5, 16), torch.randn(1, 7, 16)]
    seen: list[torch.Tensor] = []
    handle = model.get_submodule("o").register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 16)))
    for batch in batches:
        model(batch)
    handle.remove()
    z, weight = torch.cat(seen).detach(), model.get_parameter("o.weight").detach()
    wanted = [float((z[:, rows] @ weight[:, rows].T).norm(dim=-1).mean()) for rows in map(list, ROWS)]
    assert head_importance(model, batches, sites=[_site()])[""] == pytest.approx(wanted, rel=1e-5)


def test_only_heads_that_remain_are_scored() -> None:
    model, batches = _model(), [(torch.randn(2, 5, 16),)]
    both = head_importance(model, batches, sites=[_site()])[""]
    site = _site()
    assert head_importance(model, batches, sites=[replace(site, spec=SPEC.keeping([1]))])[""] == pytest.approx(both[1:])


def test_the_model_is_left_as_it_was() -> None:
    model = _model().train()
    head_importance(model, [{"x": torch.randn(2, 5, 16)}], sites=[_site()])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("site", "batches", "message"),
    [
        (_site(), [], "no calibration batch"),
        (_site(), ["text"], "a batch is a str"),
        (_site(), [torch.full((1, 2, 16), float("nan"))], "not finite"),
        (_site(weight=None), [torch.zeros(1, 2, 16)], "not known"),
        (_site(rows=None), [torch.zeros(1, 2, 16)], "it is computed"),
        (_site(weight="o"), [torch.zeros(1, 2, 16)], "expected an nn.Linear"),
    ],
)
def test_errors_name_what_is_wrong(site: Site, batches: list[object], message: str) -> None:
    model = _model()
    with pytest.raises(CalibrationError, match=message):
        head_importance(model, batches, sites=[site])  # type: ignore[arg-type]
    assert not any(module._forward_pre_hooks for module in model.modules())
