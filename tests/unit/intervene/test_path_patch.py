"""Path patching against hooks by hand, and on a circuit that was planted."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import hooked_models
import induction
import pytest
import torch
import zoo
from hooked_models import IDS, D, hooked, margin, outputs_of, recorded, with_slice
from induction import CLEAN, CORRUPTED, INDUCTION, PREVIOUS, Induction, said_right
from stacks import stack
from torch import Tensor, nn

import attnopt
from attnopt.compiler import head_sweep
from attnopt.errors import AttnoptWarning, PolicyError

pytestmark = pytest.mark.usefixtures("one_capture")
SITES = {"gpt2": "transformer.h.{}.attn", "llama": "model.layers.{}.self_attn"}


def inputs_of(model: Any, role: str) -> list[tuple[nn.Module, int]]:
    """For each layer the module whose output has the queries, keys or values of all heads, and where they start."""
    if hasattr(model, "transformer"):
        return [(block.attn.c_attn, "qkv".index(role) * 32) for block in model.transformer.h]
    return [(getattr(layer.self_attn, f"{role}_proj"), 0) for layer in model.model.layers]


def by_hand(
    model: Any, base: Tensor, other: Tensor, sender: tuple[int, int], receivers: list[tuple[int, int, str]] | None
) -> float:
    """The two runs of the paper: one with all heads frozen but the sender, one with what the receivers saw in it."""
    layer, head = sender
    ends = outputs_of(model)
    own, (given,) = recorded(model, ends, base), recorded(model, [ends[layer]], other)
    own[layer] = with_slice(own[layer], given, head * D, D)
    with hooked({m: lambda _, o=o: o for m, o in zip(ends, own, strict=True)}, {}):
        if receivers is None:
            return float(margin(model(base)))
        told = [(*inputs_of(model, role)[at], h) for at, h, role in receivers]
        seen = dict(
            zip([m for m, _, _ in told], recorded(model, [m for m, _, _ in told], base, output=True), strict=True)
        )

    def patched(module: nn.Module) -> Any:
        def change(x: Tensor) -> Tensor:
            for m, start, h in told:
                if m is module:
                    x = with_slice(x, seen[m], start + h * D, D)
            return x

        return change

    with hooked({}, {m: patched(m) for m, _, _ in told}):
        return float(margin(model(base)))


CASES = {
    "output": ((0, 1), None),
    "queries": ((0, 1), [(2, 3, "q")]),
    "keys": ((0, 2), [(1, 0, "k")]),
    "values": ((1, 2), [(2, 0, "v")]),
    "several of one layer": ((0, 0), [(2, 1, "q"), (2, 1, "k"), (2, 3, "v")]),
    "several layers": ((0, 3), [(1, 1, "v"), (2, 2, "q"), (2, 0, "k")]),
    "one before the sender": ((1, 3), [(0, 1, "v"), (2, 2, "q")]),
}


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("name", CASES)
def test_as_with_hooks(name: str, direction: str) -> None:
    (layer, head), receivers = CASES[name]
    model, site = hooked_models.gpt2(), SITES["gpt2"]
    to = "output" if receivers is None else [(site.format(at), h, role) for at, h, role in receivers]
    found = attnopt.path_patch(
        model, *IDS, metric=margin, senders=[(site.format(layer), head)], receivers=to, direction=direction
    )
    base, other = (IDS[0], IDS[1]) if direction == "noising" else (IDS[1], IDS[0])
    want = by_hand(model, base, other, (layer, head), receivers)
    assert found[site.format(layer)] == pytest.approx([want], rel=1e-4, abs=1e-4)
    assert abs(want - found.ends[0]) > 1e-3  # the path is there


def test_every_head_to_the_output_of_a_model_with_shared_keys() -> None:
    model = hooked_models.llama()
    found = attnopt.path_patch(model, *IDS, metric=margin)
    for layer in range(3):
        want = [by_hand(model, IDS[0], IDS[1], (layer, h), None) for h in range(4)]
        assert found[SITES["llama"].format(layer)] == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_one_head_of_those_that_share_keys() -> None:
    """As in the same model with keys and values of each head's own."""
    model = hooked_models.llama()
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = 4
    apart = type(model)(config).eval().requires_grad_(False)
    weights = model.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weight.reshape(2, D, -1).repeat_interleave(2, 0).reshape(4 * D, -1)
    apart.load_state_dict(weights)
    assert torch.allclose(apart(IDS[0]).logits, model(IDS[0]).logits, atol=1e-5)
    for role in "kv":
        want = by_hand(apart, *IDS, (0, 1), [(2, 2, role)])
        receiver = (SITES["llama"].format(2), 2, role)
        found = attnopt.path_patch(
            model, *IDS, metric=margin, senders=[(SITES["llama"].format(0), 1)], receivers=[receiver]
        )
        assert found[SITES["llama"].format(0)] == pytest.approx([want], rel=1e-4, abs=1e-4)
        assert abs(want - found.clean) > 1e-3


def test_the_circuit_is_recovered() -> None:
    model = Induction()
    for role in "qkv":
        found = attnopt.path_patch(model, CLEAN, CORRUPTED, metric=said_right, receivers=[(*INDUCTION, role)])
        assert set(found) == {PREVIOUS[0]}  # no head of the receiver's own layer comes before it
        for h, effect in enumerate(found.effects[PREVIOUS[0]]):
            assert effect > 0.9 if h == PREVIOUS[1] and role == "k" else abs(effect) < 0.01
    direct = attnopt.path_patch(model, CLEAN, CORRUPTED, metric=said_right).effects
    assert direct[INDUCTION[0]][INDUCTION[1]] == pytest.approx(1.0, abs=0.01)
    assert direct[PREVIOUS[0]] == pytest.approx([0.0] * induction.HEADS, abs=0.01)


def test_all_receivers_and_the_output_are_the_whole_effect() -> None:
    """In two layers, the sender's paths lead to the output alone, or through the other layer's heads."""
    model, site = hooked_models.gpt2(2), SITES["gpt2"]
    everywhere = [(site.format(1), h, role) for h in range(4) for role in "qkv"]
    heads = attnopt.path_patch(model, *IDS, metric=margin, senders=site.format(0), receivers=everywhere)
    whole = attnopt.patch(model, *IDS, metric=margin, sites=site.format(0), direction="noising")
    direct = attnopt.path_patch(model, *IDS, metric=margin, senders=site.format(0))
    assert max(abs(a - b) for a, b in zip(heads[site.format(0)], whole[site.format(0)], strict=True)) > 1e-3
    last = attnopt.path_patch(model, *IDS, metric=margin, senders=site.format(1))
    assert last[site.format(1)] == pytest.approx(
        attnopt.patch(model, *IDS, metric=margin, sites=site.format(1), direction="noising")[site.format(1)],
        rel=1e-4,
        abs=1e-4,
    )  # behind the last layer there are no other heads
    assert direct[site.format(0)] != pytest.approx(whole[site.format(0)], abs=1e-3)


def test_from_an_encoder_to_all_that_reads_it() -> None:
    """A head of the last layer of an encoder acts on the output through keys and values of the decoder alone."""
    model, args, kwargs = zoo.mt5()
    clean = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    ids = clean["input_ids"].clone()
    ids[:, 2], ids[:, 4] = 7, 9
    corrupted = {**clean, "input_ids": ids}
    crossing = [site for site in attnopt.inspect(model, kwargs=clean).sites if site.is_cross]
    receivers = [(site.name, h, role) for site in crossing for h in range(site.num_heads) for role in "kv"]

    def size(output: Any) -> Tensor:
        return output.last_hidden_state.square().sum()

    encoder = "encoder.block.0.layer.0.SelfAttention"
    told = attnopt.path_patch(model, clean, corrupted, metric=size, senders=encoder, receivers=receivers)
    whole = attnopt.patch(model, clean, corrupted, metric=size, sites=encoder, direction="noising")
    assert told[encoder] == pytest.approx(whole[encoder], rel=1e-5)
    assert told[encoder] != pytest.approx([whole.clean] * 4, rel=1e-3)
    assert str(told).startswith("noising to k of head 0 of ")
    assert " and 4 more: clean" in str(told)


def test_one_at_a_time_and_stacked_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, receivers = hooked_models.gpt2(), [(SITES["gpt2"].format(2), 1, "q"), (SITES["gpt2"].format(1), 0, "v")]
    together = attnopt.path_patch(model, *IDS, metric=margin, receivers=receivers)
    monkeypatch.setattr(head_sweep, "ROWS", {"cpu": 1, "cuda": 1})
    alone = attnopt.path_patch(model, *IDS, metric=margin, receivers=receivers)
    assert set(together) == {SITES["gpt2"].format(i) for i in range(2)}
    for name in together:
        assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-4)


def test_an_attention_that_is_not_read_is_no_silent_hole() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack, self.w = stack(1), nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stack(x)
            q, k, v = self.w(x).chunk(3, -1)
            weights = (q @ k.mT).softmax(-1)
            out: Tensor = x + (weights * weights) @ v
            return out

    model, x = Half(), torch.randn(2, 12, 16)
    assert attnopt.inspect(model, (x,)).near_misses
    with pytest.warns(AttnoptWarning, match="nothing in it is frozen"):
        attnopt.path_patch(model, x, 2 * x, metric=lambda out: out.sum())


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "a receiver without a role": ({"receivers": [("layers.1", 0)]}, "invalid receiver ('layers.1', 0)"),
    "another role": ({"receivers": [("layers.1", 0, "o")]}, 'hint: expected "output" or (site, head, "q"'),
    "no receivers": ({"receivers": []}, "invalid value receivers=[]"),
    "a glob of receivers": ({"receivers": "*"}, "invalid value receivers='*'"),
    "a receiver that is not there": ({"receivers": [("layers.7", 0, "q")]}, "no attention is named 'layers.7'"),
    "a head that is not there": ({"receivers": [("layers.1", 4, "q")]}, "there is no head 4 in layers.1"),
    "a sender that is not there": ({"senders": [("layers.0", 9)]}, "there is no head 9 in layers.0"),
    "a sender without a head": ({"senders": ["layers.0"]}, "invalid sender 'layers.0'"),
    "no senders": ({"senders": []}, "no sender is given"),
    "a sender behind the receiver": (
        {"senders": [("layers.1", 0)], "receivers": [("layers.0", 0, "q")]}, "no path leads from layers.1 to the receivers",
    ),
    "only senders behind the receiver": ({"receivers": [("layers.0", 0, "q")]}, "no path leads from a sender"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_wrong_is_said(name: str) -> None:
    changed, text = ERRORS[name]
    x = torch.randn(2, 12, 16)
    with pytest.raises(PolicyError) as caught:
        attnopt.path_patch(stack(2), x, 2 * x, metric=lambda out: out.sum(), **changed)
    assert text in str(caught.value)
