"""Models on the meta device, which know shapes and hold no values: inspected with a proof all the same, never rewritten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import decoys
import pytest
import torch
from tiny_models import Attention
from torch import Tensor, nn

import attnopt
from attnopt.backends import Blocked, Reference, Sdpa
from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.capture.signature import Signature
from attnopt.compiler.check import fitting
from attnopt.compiler.decide import decide
from attnopt.graph.nodes import value
from attnopt.lower.lower import lower
from attnopt.match import find as finding
from attnopt.match.find import find
from attnopt.match.raise_region import Raised
from attnopt.passes import DynamicSparse, Fuse, LocalWindow, PoolKeys, PruneHeads, Sparse
from attnopt.patterns import Blocks, Causal, Sinks

META = torch.device("meta")


class Masked(Attention):
    """Causal by a mask that is made at the call, or kept in a buffer; with a bias for each pair of heads and positions."""

    def __init__(self, stored: bool) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(12, 12, dtype=torch.bool).tril() if stored else None)
        self.bias = nn.Parameter(torch.randn(2, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        B, L, E = x.shape
        q, k, v = (f(x).view(B, L, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        seen = torch.ones(L, L, dtype=torch.bool, device=x.device).tril() if self.seen is None else self.seen
        scores = (q @ k.transpose(-1, -2) * 0.3 + self.bias).masked_fill(~seen, float("-inf"))
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, E))


def masked(stored: bool = False) -> tuple[nn.Module, Tensor]:
    return Masked(stored).eval(), torch.randn(2, 12, 16)


def on_meta(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return model.to(META), x.to(META)


def plain(found: attnopt.Inspection) -> Any:
    """What an inspection says of the model itself."""
    sites = [replace(s, notes=(), device="", parameters={}, refusals={}) for s in found.sites]
    return sites, [(m.name, m.refusal.code) for m in found.near_misses], found.candidates


def test_the_same_is_found_as_with_weights() -> None:
    model, x = masked()
    want = attnopt.inspect(model, (x,))
    got = attnopt.inspect(*on_meta(model, x))
    assert plain(got) == plain(want)
    (site,) = got.sites
    assert site.device == "meta"
    assert "verified on random weights" in str(got)
    assert "verified on random weights" not in str(want)


def test_a_mask_without_values_stays_unknown() -> None:
    model, x = masked(stored=True)
    (with_values,) = attnopt.inspect(model, (x,)).sites
    (without,) = attnopt.inspect(*on_meta(model, x)).sites
    assert (with_values.spec.pattern, with_values.spec.has_mask) == (Causal(), False)
    assert (str(without.spec.pattern), without.spec.has_mask) == ("Full()", True)


@pytest.mark.parametrize("make", decoys.NEVER)
def test_decoys(make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), torch.randn(2, decoys.L, decoys.E)
    want = plain(attnopt.inspect(model, (x,)))
    model, x = on_meta(model, x)
    with META:  # one of them makes its mask where the caller's default device is
        assert plain(attnopt.inspect(model, (x,))) == want


def test_the_proof_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that was raised wrongly is not found, with or without weights."""
    raise_region = finding.raise_region

    def wrong(*given: Any) -> Raised:
        raised = raise_region(*given)
        return replace(raised, spec=replace(raised.spec, scale=raised.spec.scale * 1.01))

    monkeypatch.setattr(finding, "raise_region", wrong)
    found = attnopt.inspect(*on_meta(*masked()))
    assert not found.sites
    assert [m.refusal.code for m in found.near_misses] == ["not-equal"]


def test_a_padding_mask_and_token_ids() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.attention = nn.Embedding(7, 16), Attention(causal=False)

        def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
            x = self.embedding(ids)
            a = self.attention
            q, k, v = (f(x).unflatten(-1, (a.heads, -1)).transpose(1, 2) for f in (a.q, a.k, a.v))
            scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~seen[:, None, None], float("-inf"))
            y: Tensor = a.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            return y

    model, ids, seen = Encoder().eval(), torch.zeros(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.bool)
    want = attnopt.inspect(model, (ids, seen))
    assert want.sites[0].spec.has_mask
    assert plain(attnopt.inspect(model.to(META), (ids.to(META), seen.to(META)))) == plain(want)


# ---------------------------------------------------------------- nothing is made that cannot be verified
@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: attnopt.optimize(m, "fuse", (x,)),
        lambda m, x: attnopt.optimize(m, "fuse")(x),
        lambda m, x: attnopt.head_importance(m, [x]),
    ],
    ids=["optimize", "deferred", "importance"],
)
def test_no_model_is_made(use: Callable[[nn.Module, Tensor], Any]) -> None:
    model, x = on_meta(*masked())
    with pytest.raises(attnopt.CaptureError, match=r"bias is on the meta device.*\n.*load the weights first"):
        use(model, x)


# ---------------------------------------------------------------- everything follows the model's device
POLICIES: dict[str, Any] = {
    "fuse": (Fuse(), Sdpa()),
    "reference": (LocalWindow(3), Reference()),
    "masked": (Sparse(Causal() & (Blocks(4) | Sinks(2))), Sdpa()),
    "blocked": (LocalWindow(3), Blocked()),
    "blocks": (Sparse(Blocks(4)), Blocked()),
    "dynamic": (DynamicSparse(keep=0.5, block=4), Reference()),
    "prune": (PruneHeads(heads=[1]), Sdpa()),
    "pool": (PoolKeys(3, heads=[1]), Sdpa()),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_made_lies_where_the_model_does(policy: str) -> None:
    """An operator of tensors on two devices raises on the meta device too; ``optimize`` would go on to verify."""
    chosen, backend = POLICIES[policy]
    model, x = on_meta(Attention(causal=False).eval(), torch.randn(2, 12, 16))
    program = capture(model, CallInputs((x,), {}))
    (found,) = find(program).found
    decision = decide(found, [chosen], [backend])
    assert decision.plan is not None, decision.refusals
    module = lower(program.module, [decision.plan])
    assert module(x).device == META
    assert {t.device for t in module.state_dict().values()} == {META}
    assert {value(n).device for n in module.graph.nodes if isinstance(value(n), Tensor)} == {META}


def test_calibration_goes_where_the_model_is() -> None:
    model, x = on_meta(Attention(causal=False).eval(), torch.randn(2, 12, 16))
    module = capture(model, CallInputs((x,), {})).module
    (args, _) = fitting(module, Signature.of(model.forward, (x,), {}), ((torch.randn(2, 12, 16),), {}), 0)
    assert args[0].device == META
