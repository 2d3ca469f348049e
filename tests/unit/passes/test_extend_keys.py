"""The pass that extends keys: its options, reports and costs, and where it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from models import Attention, Spelling, inputs
from needs import needs_compiler
from pooled import full
from sites import a_site, applied, refusal
from torch import Tensor, nn

import attnopt
from attnopt.errors import ConversionError, ExportError, PolicyError
from attnopt.ir.site import Site, TokenFeatures
from attnopt.match import token_axes
from attnopt.passes import ExtendKeys, GroupedQuery, PoolKeys, SegmentGain
from attnopt.patterns import Keys

pytestmark = pytest.mark.usefixtures("one_capture")
REFERENCE = torch.arange(24.0).reshape(3, 8)


def site(**changes: Any) -> Site:
    return replace(a_site(), features=TokenFeatures(8, changes.get("batch", 1)), **changes)


def test_policies() -> None:
    for p in (
        ExtendKeys(REFERENCE, 2.0, [2, 0], [True, False, True]),
        ExtendKeys(REFERENCE.bfloat16()[None], mask=[[True, False, True]]),
        ExtendKeys([[0.5, 1], [2, 3]]),
        ExtendKeys([]),
    ):
        assert attnopt.Policy.from_json(attnopt.Policy.of(p).to_json()) == attnopt.Policy.of(p)
    text = attnopt.Policy.of("extend-keys([[0.5, 1.0]], weight=2, heads=[1])")
    assert text == attnopt.Policy.of(ExtendKeys([[0.5, 1.0]], 2.0, [1]))


NOT_A_REFERENCE = (
    "hint: use finite floating-point numbers, [tokens, features] or [batch, tokens, features]; or an Input"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "extend-keys: invalid value weight=-1.0: expected a number of at least 0"),
        ({"weight": float("nan")}, "extend-keys: invalid value weight=nan: expected a finite number"),
        ({"heads": []}, "extend-keys: invalid value heads=[]: expected at least one head, each listed once"),
        ({"reference": torch.tensor([[1.0, float("nan")]])}, f"invalid reference of shape [1, 2]\n  {NOT_A_REFERENCE}"),
        ({"reference": torch.ones(3)}, f"invalid reference of shape [3]\n  {NOT_A_REFERENCE}"),
        ({"reference": torch.ones(3, 2, dtype=torch.int64)}, f"invalid reference of shape [3, 2]\n  {NOT_A_REFERENCE}"),
        ({"reference": "ref"}, f"invalid reference 'ref'\n  {NOT_A_REFERENCE}"),
        ({"reference": [[1.0], [2.0, 3.0]]}, f"invalid reference [[1.0], [2.0, 3.0]]\n  {NOT_A_REFERENCE}"),
        ({"mask": [1, 0, 1]}, "invalid mask [1, 0, 1]\n  hint: use bools, [tokens] or [batch, tokens]; or an Input"),
        (
            {"mask": [True]},
            "extend-keys: a mask of 1 for a reference of 3 tokens\n  hint: give one bool for each token",
        ),
        (
            {"mask": [[True] * 3] * 2, "reference": torch.ones(4, 3, 8)},
            "extend-keys: a mask of 2 x 3 for a reference of 4 x 3 tokens",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        ExtendKeys(**{"reference": REFERENCE, **options})
    assert message in str(caught.value)


@needs_compiler
def test_reports_and_costs() -> None:
    model, x = full()
    fast = attnopt.optimize(model, ExtendKeys(torch.randn(5, 32), heads=[1, 2]), (x,), backend="blocked")
    (found,) = fast.report.sites
    assert found.spec_after == "4 heads, Full(), heads 1, 2 read 5 more keys"
    assert found.cost_after.flops - found.cost_before.flops == 2 * (2 * 12 * 5 * 16)
    assert found.cost_after.parameters == found.cost_before.parameters
    assert found.notes == (
        "extend-keys: the keys and values of the reference are stored, and do not follow later changes of weights",
        "blocked: computes own and other keys apart and merges them; ONNX Runtime computes each densely",
    )
    assert "heads 1, 2 read 5 more keys" in str(fast.report)
    whole = attnopt.optimize(model, ExtendKeys(torch.randn(5, 32)), (x,), backend="blocked")
    assert len(whole.report.sites[0].notes) == 1


GAIN = SegmentGain(Keys([0]), 0.5)
REFUSED: dict[str, tuple[ExtendKeys, Callable[[], Site], str]] = {
    "heads": (ExtendKeys(REFERENCE, heads=[4]), site, "[unknown-head] expected heads from 0 to 3, found head 4"),
    "width": (
        ExtendKeys(torch.ones(3, 7)), site,
        "[other-features] expected a reference of tokens x 8, or of 1 x tokens x 8 numbers, found 3 x 7 (at model.py:88)\n  "
        "hint: give what the key projection of this site reads, such as the input of the layer after its norm",
    ),
    "batch": (
        ExtendKeys(torch.ones(3, 2, 8)), lambda: site(batch=2),
        "[other-features] expected a reference of tokens x 8, or of 1 or 2 x tokens x 8 numbers, found 3 x 2 x 8",
    ),
    "mask of a batch": (
        ExtendKeys(REFERENCE, mask=[[True, False, True], [False, False, True]]), site,
        "[other-features] expected a mask for 1 sequence, found one for 2 (at model.py:88)\n  hint: give one for all sequences",
    ),
    "twice": (
        ExtendKeys(REFERENCE), lambda: applied(ExtendKeys(REFERENCE), site()),
        "[already-extended] expected an attention of its own keys alone, found heads 0, 1, 2, 3 read 3 more keys (at "
        "model.py:88)\n  hint: give all tokens to one extend-keys",
    ),
    "pools": (
        ExtendKeys(REFERENCE), lambda: applied(PoolKeys(3), site()),
        "[already-pooled] expected an attention without pooled keys, found heads 0, 1, 2, 3 read keys pooled by 3 (at "
        "model.py:88)\n  hint: use either pool-keys or extend-keys at a site",
    ),
    "gains": (
        ExtendKeys(REFERENCE), lambda: applied(GAIN, site()),
        "hint: use either segment-gain or extend-keys at a site; weight= is a gain on the reference",
    ),
    "cache": (
        ExtendKeys(REFERENCE), lambda: site(alignment="last", q_len=2),
        "[cached-keys] expected keys that are all computed in this call, found 2 queries after 10 past keys (at model.py:88)\n  "
        "hint: capture the model without its cache",
    ),
    "unknown": (ExtendKeys(REFERENCE), a_site, "[unknown-features] expected known features of tokens, found a site of a saved"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_sites(name: str) -> None:
    p, made, told = REFUSED[name]
    assert told in refusal(p, made())


def test_other_passes_refuse_it() -> None:
    extended = applied(ExtendKeys(REFERENCE), site())
    told = "[already-extended] expected an attention of its own keys alone"
    assert told in refusal(PoolKeys(3), extended)
    assert told in refusal(GAIN, extended)
    assert SegmentGain(Keys([0]), 0.0).check(extended) is None  # hides own keys
    fitted = GroupedQuery(kv_heads=2, merge="svd")
    assert "let this pass come before extend-keys, whose tokens calibration does not know" in refusal(fitted, extended)


class Convolved(nn.Module):
    """Keys of a token and its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = (nn.Linear(16, 16) for _ in range(3))
        self.k = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k(x.mT).mT
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in (self.q(x), k, self.v(x)))
        return self.o(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Placed(tiny_models.Attention):
    """Keys with a table of positions."""

    def __init__(self) -> None:
        super().__init__(16, 4, causal=False)
        self.table = nn.Parameter(torch.randn(7, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in (self.q(x), self.k(x) + self.table, self.v(x)))
        return self.o(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Detr(tiny_models.Attention):
    """Keys read the sum of features and of positions that each call brings, values read the features."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (self.q(x), self.k(x + positions), self.v(x)))
        return self.o(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))


ROTATED = [replace(Spelling(head_dim=4), rope=kind) for kind in ("half", "interleaved", "in-place", "complex")]
X = torch.randn(2, 7, 16)
NOT_TOKEN_WISE: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], str]] = {
    "convolution": (Convolved, (X,), "[not-token-wise] expected keys and values that are computed from each token alone, "
                    "wherever it stands, found conv1d (test_extend_keys.py:"),
    "table": (Placed, (X,), "[not-token-wise]"),
    "positions": (Detr, (X, X), "[several-sources] expected keys and values that are computed from one tensor of features, "
                  "found positions, x"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(NOT_TOKEN_WISE))
def test_keys_that_depend_on_more_than_their_token(name: str) -> None:
    kind, args, told = NOT_TOKEN_WISE[name]
    model = kind().eval()
    fast = attnopt.optimize(model, ["fuse", ExtendKeys(torch.randn(3, 16))], args)
    (found,) = fast.report.sites
    assert str(found.refusals["extend-keys"]).startswith(told)
    torch.testing.assert_close(fast(*args), model(*args))


@pytest.mark.parametrize("s", ROTATED, ids=lambda s: s.rope)
def test_rotated_keys(s: Spelling) -> None:
    model, given = Attention(s), inputs(s)
    fast = attnopt.optimize(model, ["fuse", ExtendKeys(torch.randn(3, 12))], (), given)
    (found,) = fast.report.sites
    refused = found.refusals["extend-keys"]
    assert refused.code == "not-token-wise"
    assert "the reference has no places in the sequence of the tokens, which rotated keys" in refused.hint
    torch.testing.assert_close(fast(**given), model(**given))


def test_the_path_is_held_to_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that takes reversed tokens for their own layout is noticed by numbers."""

    class Reversed(tiny_models.Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in (self.q(x), self.k(x).flip(1), self.v(x)))
            return self.o(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))

    model = Reversed(16, 4, causal=False).eval()
    policy = ["fuse", ExtendKeys(torch.randn(3, 16))]
    found = attnopt.optimize(model, policy, (X,)).report.sites[0].refusals["extend-keys"]
    assert (found.code, found.found[:4]) == ("not-token-wise", "flip")
    monkeypatch.setitem(token_axes._RULES, torch.ops.aten.flip.default, lambda axes, node: axes.of(node.args[0]))
    found = attnopt.optimize(model, policy, (X,)).report.sites[0].refusals["extend-keys"]
    assert found.code == "not-token-wise"
    assert found.found.startswith("a relative difference of")


@pytest.mark.slow
def test_no_class_holds_it() -> None:
    from zoo import deit

    model, args, _ = deit()
    with pytest.raises(ConversionError, match="keys and values of other tokens cannot be represented in this model"):
        attnopt.convert(model, ExtendKeys(torch.randn(3, 24)), args)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_decoders_do_not_have_it(causal: bool, tmp_path: Path) -> None:
    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.attention = nn.Embedding(9, 32), tiny_models.Attention(32, 4, causal=causal)

        def forward(self, input_ids: Tensor) -> Tensor:
            made: Tensor = self.attention(self.tokens(input_ids)) @ self.tokens.weight.mT
            return made

    ids, shapes = torch.randint(9, (2, 12)), {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    for backend in ("blocked", "sdpa", "reference"):
        fast = attnopt.optimize(
            Generator(), ExtendKeys(torch.randn(3, 32)), (ids,), dynamic_shapes=shapes, backend=backend
        )
        with pytest.raises(ExportError, match=r"attention|its keys and queries come from different sequences"):
            fast.export_decoder(tmp_path / "m", context_length=32, eos_token_id=1)
