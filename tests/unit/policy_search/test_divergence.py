"""What is compared, on which data, and that its memory is bounded."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stacks import batches, stack
from torch import Tensor, nn

import attnopt
from attnopt.base.call_inputs import CallInputs
from attnopt.errors import CalibrationError, PolicyError
from attnopt.policy_search import divergence
from attnopt.policy_search.data import resized, split
from attnopt.policy_search.divergence import Divergence, chosen, kind_of

G = torch.Generator().manual_seed(0)
WANT, GOT = (torch.randn(2, 5, 7, generator=G) for _ in range(2))
REAL = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()


def mean(kind: str, masks: tuple[Tensor, ...] = ()) -> float:
    made = Divergence(kind, 1, 0)
    made.learn(0, WANT, masks)
    total, count = made.of(0, GOT)
    return total / count


def test_kl_of_logits() -> None:
    p, q = WANT.double().softmax(-1), GOT.double().softmax(-1)
    each = (p * (p.log() - q.log())).sum(-1)
    assert mean("kl") == pytest.approx(float(each.mean()))
    assert mean("kl", (REAL,)) == pytest.approx(float(each[REAL].mean()))
    assert mean("kl") != pytest.approx(mean("kl", (REAL,)), rel=1e-3)


def test_cosine_distance_of_embeddings() -> None:
    each = 1 - torch.cosine_similarity(WANT.double(), GOT.double(), -1)
    assert mean("cosine") == pytest.approx(float(each.mean()))
    assert mean("cosine", (REAL[:, :3], REAL)) == pytest.approx(float(each[REAL].mean()))  # the first mask that fits


@pytest.mark.parametrize("kind", ["kl", "cosine"])
def test_the_original_is_at_no_distance(kind: str) -> None:
    made = Divergence(kind, 1, 0)
    made.learn(0, WANT)
    assert made.of(0, WANT) == (pytest.approx(0.0, abs=1e-12), 10.0)


def test_of_large_outputs_some_tokens_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "HELD", 2 * 4 * 7 * 3)  # three tokens of each of two pieces
    made = Divergence("kl", 2, 0)
    made.learn(0, WANT, (REAL,))
    made.learn(1, GOT, (REAL,))
    assert sum(r.wanted.numel() * 4 for r in made.references.values()) <= divergence.HELD
    assert all(
        set(r.rows.tolist()) <= set(REAL.flatten().nonzero().flatten().tolist()) for r in made.references.values()
    )
    assert made.of(0, GOT)[1] == 3.0
    again = Divergence("kl", 2, 0)
    again.learn(0, WANT, (REAL,))
    assert again.of(0, GOT) == made.of(0, GOT)


def test_outputs_that_are_not_finite() -> None:
    made = Divergence("kl", 1, 0)
    made.learn(0, WANT)
    broken = GOT.clone()
    broken[0, 0, 0] = math.nan
    assert made.of(0, broken)[0] == math.inf
    with pytest.raises(CalibrationError, match="the model's own output is not finite on piece 0"):
        made.learn(0, broken)
    with pytest.raises(CalibrationError, match="nothing but padding"):
        made.learn(0, WANT, (torch.zeros(2, 5).bool(),))


@pytest.mark.parametrize(
    ("output", "name", "kind"),
    [
        (WANT, "", "cosine"),
        ({"loss": GOT.sum(), "logits": WANT}, "logits", "kl"),
        (SimpleNamespace(logits=WANT), "logits", "kl"),
        ({"last_hidden_state": WANT, "pooler_output": GOT}, "last_hidden_state", "cosine"),
        ({"hidden_states": (GOT, WANT)}, "hidden_states", "cosine"),
        ((torch.ones(2).long(), WANT), "", "cosine"),
    ],
)
def test_what_of_an_output_is_compared(output: Any, name: str, kind: str) -> None:
    assert chosen(output)[0] == name
    assert torch.equal(chosen(output)[1], WANT)
    assert kind_of(output, "encoder.layer") == kind
    assert kind_of(output, "model.lm_head") == ("kl" if not name else kind)


def test_an_output_without_numbers() -> None:
    with pytest.raises(CalibrationError, match="pass evaluate="):
        chosen({"ids": torch.ones(2).long()})


def test_padding_counts_neither_where_it_is_masked_in_the_model() -> None:
    """The same texts with more padding are at the same distance."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            out: Tensor = self.attention(x, x, x, key_padding_mask=mask == 0, need_weights=False)[0]
            return out

    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(2, 12, 16)
    found = []
    for length in (8, 12):
        mask = (torch.arange(length) < 8).long().expand(2, -1)
        data = [(torch.where(mask[..., None] == 1, x[:, :length], 100 * x[:, :length]), mask)]
        policy = attnopt.passes.LocalWindow(1)
        search = attnopt.search(model, policy, data[0], calibration=data, budget=attnopt.Budget(flops=1.0))
        found.append(search.divergence)
    assert found[0] > 0.01
    assert found[1] == pytest.approx(found[0], rel=1e-4)


# ------------------------------------------------------------ the data
def numbers(given: Any) -> list[int]:
    return [int(b.args[0].flatten()[0]) for b in given]


def test_a_quarter_is_held_back_if_something_is_fitted() -> None:
    data = [CallInputs((torch.full((2, 3), i),), {}) for i in range(9)]
    parts = split(data, True)
    assert numbers(parts.judged) == [3, 7]
    assert numbers(parts.fitted) == [0, 1, 2, 4, 5, 6, 8]
    assert numbers(split(data[:3], True).judged) == [2]
    assert numbers(split(data, False).judged) == [*range(9)]
    assert split(data, False).fitted == ()


def test_one_batch_is_cut_between_sequences() -> None:
    (parts,) = [split([CallInputs((torch.arange(8).reshape(8, 1),), {"scale": 2.0})], True)]
    assert [b.args[0].flatten().tolist() for b in parts.fitted] == [[0, 1, 2, 3, 4, 5]]
    assert [b.args[0].flatten().tolist() for b in parts.judged] == [[6, 7]]
    assert parts.judged[0].kwargs == {"scale": 2.0}
    with pytest.raises(PolicyError, match="one batch of one sequence"):
        split([CallInputs((torch.ones(1, 8),), {})], True)


def test_the_call_that_counts_has_the_sizes_of_the_budget() -> None:
    ids, mask = torch.arange(12).reshape(2, 6), torch.ones(2, 1, 6, 6)
    made = resized(CallInputs((ids,), {"mask": mask}), (3, 8))
    assert made.args[0].tolist()[0] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert made.args[0].shape == (3, 8)
    assert made.kwargs["mask"].shape == (3, 1, 8, 8)
    features = torch.ones(2, 6, 6)
    assert resized(CallInputs((features,), {}), (None, 4)).args[0].shape == (2, 4, 6)
    with pytest.raises(PolicyError, match="no axis of tokens"):
        resized(CallInputs((torch.ones(2, 3, 8, 8),), {}), (1, 4))


@pytest.mark.filterwarnings("ignore:search. the calibration data has at most 12 tokens")
def test_costs_grow_with_the_length_that_counts() -> None:
    model, data = stack(1), batches(4, 4)
    policy = attnopt.Choice(None, attnopt.passes.LocalWindow(1))
    short, long = (
        attnopt.search(model, policy, (data[0],), calibration=data, budget=attnopt.Budget(kv_bytes=0.9, at=at)).report
        for at in (None, (1, 48))
    )
    assert long.original["kv_bytes"] == short.original["kv_bytes"]  # 4 x 12 tokens, and 1 x 48
    assert long.original["flops"] > short.original["flops"]
    assert long.best is not None
    assert long.best.costs["kv_bytes"] / long.original["kv_bytes"] == pytest.approx(2 / 48)
