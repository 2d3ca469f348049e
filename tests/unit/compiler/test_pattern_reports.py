"""What a report says of patterns that leave a query without keys, and that a pattern's length is checked by the driver."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from needs import needs_compiler

import attnopt
from attnopt.passes import LocalWindow, Sparse
from attnopt.patterns import Causal, Neighborhood, PerHead, Window


@needs_compiler
def test_queries_without_keys_give_zeros_and_are_counted() -> None:
    model, (x,) = tiny_models.causal()
    fast = attnopt.optimize(model, Sparse(~Window(2, 0)), (x,), backend="blocked")
    assert fast.report.sites[0].notes == ("3 of 12 queries are fully masked: their output is zero",)
    first = model.layers[0]
    hidden = x[:, :3] + first.o.bias
    second = attnopt.optimize(model, {"layers.0": Sparse(~Window(2, 0)), "layers.1": []}, (x,))
    want = hidden + model.layers[1](torch.cat([hidden, x[:, 3:]], 1))[:, :3]
    torch.testing.assert_close(second(x)[:, :3], want)


@needs_compiler
def test_queries_without_keys_are_counted_by_head() -> None:
    model, args, kwargs = tiny_models.full()
    policy = Sparse(PerHead({1: ~Window(20, 20)}, default=Causal()))
    fast = attnopt.optimize(model, policy, args, kwargs, backend="blocked")
    assert fast.report.sites[1].notes == ("12 of 12 queries are fully masked in head 1: their output is zero",)
    assert attnopt.optimize(model, LocalWindow(0), args, kwargs, backend="blocked").report.sites[0].notes == ()


def test_a_pattern_that_is_no_more_than_a_mask_is_told() -> None:
    model, args, kwargs = tiny_models.full()
    site = attnopt.optimize(model, LocalWindow(2), args, kwargs).report.sites[0]
    assert site.backend != "blocked", "twelve tokens are not worth the call"
    assert site.notes == (
        f"{site.backend} computes all pairs under a mask, because blocked would be slower at 12 queries and 12 keys",
    )
    assert attnopt.optimize(model, "fuse", args, kwargs).report.sites[0].notes == ()


@needs_compiler
def test_a_short_example_of_varying_length_does_not_choose_a_mask() -> None:
    model, args, kwargs = tiny_models.full()
    site = attnopt.optimize(model, LocalWindow(2), args, kwargs, dynamic_shapes="auto").report.sites[0]
    assert (site.backend, site.notes) == ("blocked", ()), "a thousand tokens are"


def test_a_grid_needs_a_sequence_of_fixed_length() -> None:
    model, args, kwargs = tiny_models.full()
    policy = Sparse(Neighborhood((3, 4), 3))
    fast = attnopt.optimize(model, policy, args, kwargs)
    assert all(site.status == "rewritten" for site in fast.report.sites)
    with pytest.warns(attnopt.AttnoptWarning, match="found a dynamic length"):
        attnopt.optimize(model, policy, args, kwargs, dynamic_shapes="auto")
    fixed = attnopt.optimize(model, policy, args, kwargs, dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    assert fixed(torch.randn(3, 12, 16)).shape == (3, 12, 16)
