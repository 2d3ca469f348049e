"""Behaviours that a rewritten model keeps or loses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from induction import CLEAN, INDUCTION, PREVIOUS, Induction, said_right
from stacks import stack
from torch import Tensor

import attnopt
from attnopt.errors import AttnoptWarning, CalibrationError, PolicyError
from attnopt.passes import DynamicSparse, HeadPatch, LocalWindow, PruneHeads, ScaleHeads, Sparse
from attnopt.patterns import Keys

pytestmark = pytest.mark.usefixtures("one_capture")
INDUCES = attnopt.Behaviour("induction", CLEAN, said_right)
MODEL = Induction().eval()


def test_a_removed_head_that_is_needed_is_named() -> None:
    fast = attnopt.optimize(MODEL, {INDUCTION[0]: PruneHeads(heads=[0, INDUCTION[1]])}, (CLEAN,))
    with pytest.warns(AttnoptWarning, match=r"guard: induction: .* before, .* after .*needs head 2 of layers\.1"):
        (found,) = attnopt.guard(MODEL, fast, [INDUCES])
    assert not found.is_kept
    assert found.drop > 0.9
    assert found.heads[0][:2] == INDUCTION
    assert (found.before, found.after) == pytest.approx(
        [float(said_right(m(CLEAN)).detach()) for m in (MODEL, fast)], abs=1e-4
    )


def test_a_window_that_is_too_short_is_named() -> None:
    fast = attnopt.optimize(MODEL, LocalWindow(1, heads=[0, INDUCTION[1]]), (CLEAN,))
    with pytest.warns(AttnoptWarning, match="induction"):
        (found,) = attnopt.guard(MODEL, fast, [INDUCES])
    assert found.heads[0][:2] == INDUCTION
    assert PREVIOUS not in {head[:2] for head in found.heads}  # it was left as it is


@pytest.mark.parametrize(
    "policy",
    [ScaleHeads({2: 0.0}), HeadPatch([2]), DynamicSparse(keep=1, block=4, sinks=0), Sparse(Keys([0]))],
    ids=str,
)
def test_heads_that_lose_what_they_read_in_any_way_are_named(policy: Any) -> None:
    fast = attnopt.optimize(MODEL, {INDUCTION[0]: policy}, (CLEAN,))
    with pytest.warns(AttnoptWarning, match="induction"):
        (found,) = attnopt.guard(MODEL, fast, [INDUCES])
    assert found.heads[0][:2] == INDUCTION


def test_what_is_kept_is_not_warned_of() -> None:
    protected = {PREVIOUS[0]: [PREVIOUS[1]], INDUCTION[0]: [INDUCTION[1]]}
    fast = attnopt.optimize(MODEL, PruneHeads(0.34, protect=protected), (CLEAN,))
    assert {s.name: len(s.spec.heads) for s in fast.sites} == {"layers.0": 2, "layers.1": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = attnopt.guard(MODEL, fast, [INDUCES])
    assert found.is_kept
    assert found.heads == ()
    assert abs(found.drop) < 0.05


def test_what_is_allowed() -> None:
    fast = attnopt.optimize(MODEL, {INDUCTION[0]: PruneHeads(heads=[INDUCTION[1]])}, (CLEAN,))
    lenient = attnopt.Behaviour("induction", CLEAN, said_right, allowed=1.5)
    (found,) = attnopt.guard(MODEL, fast, [lenient])
    assert found.is_kept


@pytest.mark.parametrize("budget", ["site", "global"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_heads_are_protected_by_site(budget: str, calibrated: bool) -> None:
    model, x = stack(2), torch.randn(2, 12, 16)
    protect = {"layers.0": [0, 3], "layers.1": [1]}
    data = [x] if calibrated else None
    fast = attnopt.optimize(model, PruneHeads(0.5, protect=protect, budget=budget), (x,), calibration=data)
    assert all(set(protect[s.name]) <= set(s.spec.heads) for s in fast.sites)
    assert sum(len(s.spec.heads) for s in fast.sites) == 4
    again = attnopt.Policy.from_json(fast.report.policy)
    assert again.rules[0][1][0].protect == (("layers.0", (0, 3)), ("layers.1", (1,)))


def test_protecting_a_site_that_is_not_there_is_an_error() -> None:
    x = torch.randn(2, 12, 16)
    with pytest.raises(PolicyError, match=r"no attention is named 'layer\.0'"):
        attnopt.optimize(stack(2), PruneHeads(0.5, protect={"layer.0": [0]}), (x,))


def wrong(output: Tensor) -> Any:
    return output


def test_what_is_wrong_is_said() -> None:
    fast = attnopt.optimize(MODEL, "fuse", (CLEAN,))
    with pytest.raises(PolicyError, match="no behaviour is given"):
        attnopt.guard(MODEL, fast, [])
    with pytest.raises(CalibrationError, match="of induction in the model, expected one real number"):
        attnopt.guard(MODEL, fast, [attnopt.Behaviour("induction", CLEAN, wrong)])
    with pytest.raises(PolicyError, match="has no attention"):
        attnopt.guard(stack(3), fast, [attnopt.Behaviour("x", torch.randn(2, 12, 16), lambda out: out.sum())])
    with pytest.raises(PolicyError, match="allowed"):
        attnopt.Behaviour("x", CLEAN, said_right, allowed=-1.0)
    with pytest.raises(PolicyError, match="metric is a int"):
        attnopt.Behaviour("x", CLEAN, 3)  # type: ignore[arg-type]
