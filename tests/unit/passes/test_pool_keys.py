"""The pass that pools keys: its options, reports and costs, and where it is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from models import Attention, Spelling, inputs
from pooled import full
from sites import a_site, applied, refusal

import attnopt
from attnopt.compiler.explain import explain
from attnopt.errors import PolicyError
from attnopt.ir.pooled_keys import PooledKeys
from attnopt.passes import (
    DynamicSparse,
    LocalWindow,
    PoolKeys,
    PruneHeads,
    SegmentGain,
    Sparse,
)
from attnopt.patterns import Causal, PerHead, Window

pytestmark = pytest.mark.usefixtures("one_capture")


def test_policies() -> None:
    p = PoolKeys((2, 3), (4, 6), heads=[3, 1], prefix=1)
    assert attnopt.Policy.from_json(attnopt.Policy.of(p).to_json()) == attnopt.Policy.of(p)
    assert attnopt.Policy.of("pool-keys((2, 3), grid=(4, 6), heads=[1, 3], prefix=1)") == attnopt.Policy.of(p)
    assert attnopt.Policy.of("pool-keys(2, [4, 6])") == attnopt.Policy.of(PoolKeys((2, 2), (4, 6)))
    assert PoolKeys(2, (4, 6)).size == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "pool-keys: invalid value size=0: expected an integer from 1"),
        ({"size": (2, 2)}, "pool-keys: invalid value size=(2, 2): expected one integer or 1 of them"),
        ({"size": (2, 2, 2), "grid": (4, 4)}, "pool-keys: invalid value size=(2, 2, 2): expected one integer or 2 of"),
        ({"size": 2, "grid": (4, 0)}, "pool-keys: invalid value grid=0"),
        ({"size": 2, "prefix": -1}, "pool-keys: invalid value prefix=-1"),
        ({"size": 2, "heads": [-1]}, "pool-keys: invalid value heads=-1"),
        ({"size": 2, "grid": (2**31 - 1, 4)}, "use a size that divides 2147483647 (1), or pad the tokens"),
        (
            {"size": (2, 4), "grid": (4, 6)},
            "pool-keys: grid=(4, 6) cannot be cut into pools of 2 x 4: 6 is not a multiple of 4\n"
            "  hint: use a size that divides 6 (1, 2, 3, 6), or pad the tokens to whole pools",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        PoolKeys(**options)
    assert message in str(caught.value)


def test_one_key_in_a_pool_changes_nothing() -> None:
    model, x = full()
    for p in (PoolKeys(1), PoolKeys(1, (3, 4)), PoolKeys(2, heads=[])):
        fast = attnopt.optimize(model, p, (x,))
        (site,) = fast.report.sites
        assert site.spec_before == site.spec_after
        assert site.cost_before == site.cost_after
        assert fast.sites[0].spec.pooling is None
        torch.testing.assert_close(fast(x), model(x))
    assert site.notes == ()
    assert "pool-keys: pools of one key change nothing" in str(attnopt.optimize(model, PoolKeys(1), (x,)).report)


def test_reports_and_costs() -> None:
    model, x = full()
    fast = attnopt.optimize(model, PoolKeys(3, heads=[1, 2]), (x,), backend="sdpa")
    (site,) = fast.report.sites
    assert site.spec_after == "4 heads, Full(), heads 1, 2 read keys pooled by 3"
    assert site.notes == ()
    projections = 4 * 2 * 32 * 32 * 12
    assert site.cost_before.flops - projections == 4 * (2 * 12 * 12 * 16)
    early = 2 * 2 * 32 * 32 * (12 + (12 + 4) // 2)  # half of the keys and values are projected from pooled tokens
    assert site.cost_after.flops - early == 2 * (2 * 12 * 12 * 16) + 2 * (2 * 12 * 4 * 16)
    assert site.cost_after.parameters == site.cost_before.parameters
    assert "heads 1, 2 read keys pooled by 3" in str(fast.sites[0].spec)
    (kept,) = attnopt.optimize(model, [PoolKeys(3, heads=[1, 2]), LocalWindow(2)], (x,), backend="sdpa").report.sites
    told = "the pools of heads 1, 2 are computed key by key under a pattern, bias, mask or gain: no time is saved"
    assert told in kept.notes
    assert kept.cost_after.flops - projections == 4 * (2 * 54 * 16)
    (plain,) = attnopt.optimize(model, PoolKeys(3), (x,), backend="reference").report.sites
    assert plain.notes == ("reference: pooled keys are computed like all others: no time is saved",)


def test_steps_of_a_size() -> None:
    for length, step in ((12, 0), (6 * torch.export.Dim("a"), 6), (4 * torch.export.Dim("b") + 4, 4)):
        model, x = full()
        shapes = None if length == 12 else {"x": {1: length}}
        (site,) = attnopt.inspect(model, (x,), dynamic_shapes=shapes).sites
        assert (site.kv_len, site.kv_step, site.is_dynamic) == (12, step, step > 0)


REFUSED = {
    "heads": (PoolKeys(3, heads=[4]), {}, "[unknown-head] expected heads from 0 to 3, found head 4"),
    "length": (
        PoolKeys(5), {}, "[wrong-length] expected a multiple of 5 keys, found 12 keys (at model.py:88)\n  hint: pad the "
        "tokens to whole pools, or choose a size that divides their number",
    ),
    "class token": (
        PoolKeys(11), {}, "[wrong-length] expected a multiple of 11 keys, found 12 keys (at model.py:88)\n  hint: pad the "
        "tokens to whole pools, or choose a size that divides their number; leave a class token out of the pools with "
        "prefix=1",
    ),
    "prefix": (PoolKeys(3, prefix=1), {}, "[wrong-length] expected 1 and a multiple of 3 keys, found 12 keys"),
    "grid": (
        PoolKeys(2, (2, 6), prefix=1), {}, "[wrong-length] expected 1 and 2 x 6 keys, 13 in all, found 12 keys (at "
        "model.py:88)\n  hint: give the grid of the keys, with the number of class and register tokens before it as prefix=",
    ),
    "dynamic": (
        PoolKeys(3), {"kv_step": 1}, "[wrong-length] expected a multiple of 3 keys, found a dynamic number of keys (at "
        "model.py:88)\n  hint: remove their axis from dynamic_shapes, or make it a multiple, such as 3 * "
        'torch.export.Dim("pools")',
    ),
    "dynamic grid": (
        PoolKeys(2, (2, 6)), {"kv_step": 12}, "[wrong-length] expected 2 x 6 keys, 12 in all, found a dynamic number of "
        "keys (at model.py:88)\n  hint: remove their axis from dynamic_shapes",
    ),
    "causal": (
        PoolKeys(3), {"pattern": Causal()}, "[causal-pools] expected queries that may see later keys, found Causal() (at "
        "model.py:88)\n  hint: the mean of a pool mixes later keys into visible ones; use grouped-query or local-window",
    ),
    "causal head": (PoolKeys(3, heads=[1]), {"pattern": PerHead({1: Window(2, 0)})}, "[causal-pools]"),
    "mask": (
        PoolKeys(3), {"has_mask": True}, "[masked-pools] expected keys that are never hidden, found a mask operand (at "
        "model.py:88)\n  hint: hidden keys, such as padding, would enter the means; capture the model without padding and "
        "its mask",
    ),
    "cache": (
        PoolKeys(3), {"alignment": "last", "q_len": 2}, "[cached-keys] expected keys that are all computed in this call, "
        "found 2 queries after 10 past keys (at model.py:88)\n  hint: pools would change with every new token; capture the "
        "model without its cache",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_cannot_be_applied(name: str) -> None:
    p, changes, text = REFUSED[name]
    own = {k: v for k, v in changes.items() if k in ("kv_step", "alignment", "q_len")}
    site = replace(a_site(**{k: v for k, v in changes.items() if k not in own}), **own)
    assert refusal(p, site).startswith(text)


def test_where_it_can_be_applied() -> None:
    for p, site in (
        (PoolKeys(3, heads=[0]), a_site(pattern=PerHead({1: Causal()}))),
        (PoolKeys(3), a_site(is_cross=True)),
        (PoolKeys(3), replace(a_site(q_len=5), kv_step=6, alignment="none")),
        (PoolKeys((2, 3), (2, 5 + 1)), a_site(has_bias=True)),
        (PoolKeys((2, 3), (2, 3), prefix=6), a_site()),
    ):
        assert applied(p, site).spec.pooling is not None


def test_once_and_not_with_chosen_blocks() -> None:
    pooled = applied(PoolKeys(3, heads=[0]), a_site())
    text = "[already-pooled] expected an attention without pooled keys, found head 0 reads keys pooled by 3"
    assert refusal(PoolKeys(2, heads=[1]), pooled).startswith(text)
    assert refusal(DynamicSparse(), pooled).startswith(text)
    assert refusal(PoolKeys(3), applied(DynamicSparse(), a_site())).startswith("[already-selected]")
    without = applied(PruneHeads(heads=[0]), pooled)
    assert applied(PoolKeys(2, heads=[0, 1]), without).spec.pooling == PooledKeys(2, [1])


HIDING = [
    Spelling(mask=(kind,), apply=how)
    for kind in ("padding", "float-padding", "given")
    for how in ("add-inf", "add-min", "where", "masked_fill", "moderate")
]


SHOWING = [Spelling(bias_kind=kind) for kind in ("alibi", "table")]


@pytest.mark.parametrize("s", HIDING, ids=lambda s: f"{s.mask[0]}-{s.apply}")
def test_padding_in_every_form_is_refused(s: Spelling) -> None:
    """Also as a bias: the mean of a pool with a hidden key would not be hidden."""
    (site,) = attnopt.inspect(Attention(s), (), inputs(s)).sites
    refused = PoolKeys(7).check(site)
    assert refused is not None
    assert refused.code == "masked-pools"


@pytest.mark.parametrize("s", SHOWING, ids=lambda s: s.bias_kind)
def test_a_bias_of_positions_is_not_a_mask(s: Spelling) -> None:
    (site,) = attnopt.inspect(Attention(s), (), inputs(s)).sites
    assert site.spec.has_bias
    assert PoolKeys(7).check(site) is None


@pytest.mark.parametrize(
    "hidden",
    [LocalWindow(3, 0), Sparse(Causal()), Sparse(PerHead({2: Window(2, 0)})), SegmentGain(~Causal(), 0.0)],
)
def test_later_keys_stay_out_of_pools_in_both_orders(hidden: attnopt.Pass) -> None:
    model, x = full()
    for policy in ([PoolKeys(3, heads=[2]), hidden], [hidden, PoolKeys(3, heads=[2])]):
        (site,) = attnopt.optimize(model, policy, (x,)).report.sites
        (refused,) = site.refusals.items()
        assert refused[0] == policy[1].name
        assert refused[1].code == "causal-pools"
    others = [PoolKeys(3, heads=[1]), LocalWindow(3, 0, heads=[2])]
    assert not attnopt.optimize(model, others, (x,)).report.sites[0].refusals


@pytest.mark.parametrize("causal", [True, False])
def test_where_it_applies_is_told(causal: bool) -> None:
    """By ``inspect`` and ``explain``, whatever the options."""
    model, x = tiny_models.Attention(causal=causal), torch.randn(2, 12, 16)
    (site,) = attnopt.inspect(model, (x,)).sites
    (explained,) = explain(model, "(root)", (x,), {})
    for refusals in (site.refusals, explained.refusals):
        assert ("pool-keys" in refusals) == causal
    assert ("pool-keys" in explained.accepted) != causal
    (explained,) = explain(model, "(root)", (x,), {}, attnopt.Policy.of(PoolKeys(5)))
    assert explained.refusals["pool-keys"].code == ("causal-pools" if causal else "wrong-length")
