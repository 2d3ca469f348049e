"""Scores that need the whole model: on circuits whose heads are known, and against an eager model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_only import INDUCTION_HEAD, PREVIOUS_HEAD, H, eager, induction_circuit, random_circuit
from torch import Tensor, nn

import attnopt
from attnopt import greedy_heads, head_importance
from attnopt.errors import CalibrationError, PolicyError
from attnopt.statistics import Ablation, Counterfactual, Retrieval, Sahara, Ships, UniqueCodes, needle_task

pytestmark = pytest.mark.usefixtures("one_capture")
KINDS = ("zero", "mean", "uniform", "resample")
L = 12


def best(scores: Any, above: float) -> set[tuple[int, int]]:
    """Layer and head of all scores above a number."""
    return {(n, h) for n, row in enumerate(scores.values()) for h, x in enumerate(row) if x > above}


# ---------------------------------------------------------------- planted circuits
def repeats() -> Tensor:
    """Texts whose second half repeats the first, which has no token twice."""
    g = torch.Generator().manual_seed(0)
    halves = torch.stack([torch.randperm(10, generator=g)[:6] for _ in range(8)])
    return torch.cat([halves, halves], 1)


def test_the_induction_head_is_found() -> None:
    scores = head_importance(induction_circuit(), [repeats()], "induction")
    assert best(scores, 0.6) == {INDUCTION_HEAD}
    assert list(scores.values())[1][1] > 0.9


def needles() -> tuple[list[list[int]], list[tuple[int, int]], list[list[int]]]:
    """Prompts that end with the first token of the needle in them."""
    prompts = [[7, 0, 1, 2, 3, 4, 8, 9, 0], [9, 8, 5, 6, 7, 1, 5], [0, 1, 2, 3, 4, 5, 6, 1]]
    return prompts, [(1, 6), (2, 5), (1, 5)], [[1, 2, 3, 4], [6, 7], [2, 3, 4]]


def test_the_head_that_copies_a_needle_is_found() -> None:
    data, method = needle_task(*needles())
    assert [x.shape[1] for x in data] == [13, 9, 11]
    scores = head_importance(induction_circuit(), data, method)
    assert best(scores, 0.0) == {INDUCTION_HEAD}
    assert scores["layers.1"][INDUCTION_HEAD[1]] == 1.0
    assert scores.method == "retrieval(needles=((1, 6), (2, 5), (1, 5)), answers=((9, 13), (7, 9), (8, 11)))"


def test_only_retrievals_that_succeed_count() -> None:
    """A wrong answer, at whose steps the head looks elsewhere, changes nothing."""
    prompts, places, expected = needles()
    data, method = needle_task([*prompts, prompts[0]], [*places, places[0]], [*expected, [4, 3, 2, 1]])
    scores = head_importance(induction_circuit(), data, method)
    assert scores["layers.1"][INDUCTION_HEAD[1]] == 1.0
    data, method = needle_task(prompts[:1], places[:1], [[4, 3, 2, 1]])
    with pytest.raises(CalibrationError, match="the model decodes none of the 1 answers"):
        head_importance(induction_circuit(), data, method)


def test_what_is_outside_of_the_needle_is_no_retrieval() -> None:
    """The same copies, with the needle given as other tokens that hold the same ids."""
    prompt = [1, 2, 7, 0, 1, 2, 8, 9, 0]
    data, method = needle_task([prompt], [(0, 2)], [[1, 2]])
    assert head_importance(induction_circuit(), data, method)["layers.1"][INDUCTION_HEAD[1]] == 0.0
    data, method = needle_task([prompt], [(3, 6)], [[1, 2]])
    scores = head_importance(induction_circuit(), data, method)["layers.1"]
    assert scores[INDUCTION_HEAD[1]] == 0.5  # after 1, both places of 1 are alike, and the first comes first


def test_a_step_that_makes_no_token_of_the_needle_does_not_count() -> None:
    prompts, places, _ = needles()
    data, method = needle_task(prompts[:1], [(1, 4)], [[1, 2, 3, 4]])
    assert head_importance(induction_circuit(), data, method)["layers.1"][INDUCTION_HEAD[1]] == 1.0
    data, method = needle_task(prompts[:1], [(6, 8)], [[1, 2, 3, 4]])
    with pytest.raises(CalibrationError, match="none of the tokens of the answers is in their needles"):
        head_importance(induction_circuit(), data, method)
    assert places


def test_batches_of_padded_texts() -> None:
    """Two texts in one batch, the second with padding after it."""
    data, method = needle_task(*needles())
    ids = torch.zeros(2, 13, dtype=torch.long)
    ids[0], ids[1, :9] = data[0], data[1]
    seen = torch.arange(13) < torch.tensor([13, 9])[:, None]
    both = Retrieval(method.needles[:2], method.answers[:2])
    scores = head_importance(induction_circuit(), [(ids, seen)], both)
    assert best(scores, 0.0) == {INDUCTION_HEAD}
    assert scores["layers.1"][INDUCTION_HEAD[1]] == 1.0


def test_retrieval_against_decoding_token_by_token() -> None:
    """On a model that is not made for it: greedy decoding of two tokens, which the text then holds as the answer."""
    model, g = random_circuit(seed=3), torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 10, (12, 8), generator=g)
    hits, steps = torch.zeros(2, H), 0
    texts, places, answers = [], [], []
    for prompt in prompts:
        ids, needle = prompt.unsqueeze(0), (1, 6)
        made = []
        for _ in range(2):
            logits, weights, _, _ = eager(model, ids)
            token = int(logits[0, -1].argmax())
            if token in prompt[1:6].tolist():
                steps += 1
                for n, p in enumerate(weights):
                    top = p[0, :, -1].argmax(-1)
                    hits[n] += (top >= 1) & (top < 6) & (ids[0, top] == token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            made.append(token)
        texts.append(prompt)
        places.append(needle)
        answers.append(made)
    assert steps > 4
    scores = head_importance(model, *needle_task(texts, places, answers))
    assert list(scores.values()) == [pytest.approx((row / steps).tolist()) for row in hits]


class TwoLayer(nn.Module):
    """Heads 1 and 3 attend to the second kind of token (images) alone, heads 0 and 2 to the first (text).  The last two
    features say what a token is, and stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))
        g = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for f in (self.q, self.k, self.v, self.o):
                f.weight.copy_(torch.randn(32, 32, generator=g) * 0.2)
                f.weight[:, 30:] = 0.0
            self.o.weight[30:] = 0.0
            for h in range(4):
                self.q.weight[h * 8] = self.k.weight[h * 8] = 0.0
                self.q.weight[h * 8, 30:] = 80.0
                self.k.weight[h * 8, 31 if h in Two.VISION else 30] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        out: Tensor = self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + out


class Two(nn.Module):
    VISION = (1, 3)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoLayer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def inputs(self, seed: int) -> Tensor:
        """Nine tokens, of which the last four are text."""
        x = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(seed))
        x[..., 30:] = 0.0
        x[:, :5, 31], x[:, 5:, 30] = 1.0, 1.0
        return x


def test_vision_heads_are_those_that_change_with_the_image() -> None:
    model, x = Two().eval(), Two().inputs(0)
    other = x.clone()
    other[:, :5, :30] = Two().inputs(1)[:, :5, :30]
    scores = head_importance(model, [x], Counterfactual([other]))
    assert {h for h, s in enumerate(scores["layers.0"]) if s > 1e-6} == set(Two.VISION)
    mass = head_importance(model, [x], attnopt.statistics.SegmentMass((5, 9), (0, 5)))
    assert mass["layers.0"] == pytest.approx([0, 1, 0, 1], abs=1e-5)
    assert mass.means["layers.0"] == pytest.approx(0.5, abs=1e-5)


def test_counterfactuals_against_hooks() -> None:
    model, g = random_circuit(), torch.Generator().manual_seed(1)
    ids, other = (torch.randint(0, 10, (4, L), generator=g) for _ in range(2))
    a, b = eager(model, ids)[2], eager(model, other)[2]
    last = head_importance(model, [ids[:2], ids[2:]], Counterfactual([other[:2], other[2:]]))
    every = head_importance(model, [ids], Counterfactual([other], at="all"))
    for n in range(2):
        apart = (a[n] - b[n]).norm(dim=-1)
        assert list(last.values())[n] == pytest.approx(apart[:, :, -1].mean(0).tolist(), rel=1e-4)
        assert list(every.values())[n] == pytest.approx(apart.mean((0, 2)).tolist(), rel=1e-4)


def test_counterfactuals_without_the_segment() -> None:
    """Shorter, and padded: the last tokens that are none are compared."""
    model, g = random_circuit(), torch.Generator().manual_seed(1)
    ids, seen = torch.randint(0, 10, (2, L), generator=g), torch.arange(L) < torch.tensor([[12], [8]])
    short, short_seen = ids[:, 4:], torch.arange(8) < torch.tensor([[8], [4]])
    scores = head_importance(model, [(ids, seen)], Counterfactual([(short, short_seen)]))
    a, b = eager(model, ids, seen)[2], eager(model, short, short_seen)[2]
    for n in range(2):
        apart = [a[n][0, :, 11] - b[n][0, :, 7], a[n][1, :, 7] - b[n][1, :, 3]]
        assert list(scores.values())[n] == pytest.approx(torch.stack(apart).norm(dim=-1).mean(0).tolist(), rel=1e-4)
    with pytest.raises(CalibrationError, match="sequences of 12 tokens and counterparts of 8 cannot be compared"):
        head_importance(model, [(ids, seen)], Counterfactual([(short, short_seen)], at="all"))
    with pytest.raises(CalibrationError, match="2 sequences and 1 counterparts cannot be compared"):
        head_importance(model, [(ids, seen)], Counterfactual([(ids[:1], seen[:1])]))
    with pytest.raises(CalibrationError, match="2 counterfactual batches for 1 calibration batches"):
        head_importance(model, [(ids, seen)], Counterfactual([(ids, seen)] * 2))


# ---------------------------------------------------------------- ablation
def replaced_by(kind: str, layer: int, heads: list[int], means: list[Tensor], seen: Tensor | None = None) -> Any:
    def replaced(n: int, p: Tensor, z: Tensor) -> Tensor:
        if n != layer:
            return z
        z = z.clone()
        for h in heads:
            if kind == "zero":
                z[:, h] = 0.0
            elif kind == "mean":
                z[:, h] = means[n][h]
            elif kind == "resample":
                z[:, h] = z[:, h].roll(1, 0)
            else:
                visible = (torch.ones_like(p[0, 0]).tril() > 0).expand(len(p), -1, -1)
                visible = visible if seen is None else visible & seen[:, None]
                z[:, h] = (visible.double() / visible.sum(-1, keepdim=True).clamp(min=1)) @ values[n][:, h]
        return z

    values: dict[int, Tensor] = {}
    replaced.values = values  # type: ignore[attr-defined]
    return replaced


def values_of(model: Any, ids: Tensor, seen: Tensor | None) -> dict[int, Tensor]:
    taken: dict[int, Tensor] = {}
    handles = [
        layer.v.register_forward_hook(
            lambda _m, _a, out, n=n: taken.update({n: out.double().unflatten(-1, (H, 24)).transpose(1, 2)})
        )
        for n, layer in enumerate(model.layers)
    ]
    model(ids, seen)
    for handle in handles:
        handle.remove()
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_ships_is_the_divergence_at_the_last_token(kind: str) -> None:
    model, g = random_circuit(), torch.Generator().manual_seed(2)
    ids = torch.randint(0, 10, (3, L), generator=g)
    lengths = [12, 12, 12] if kind == "resample" else [12, 7, 9]
    seen = torch.arange(L) < torch.tensor(lengths)[:, None]
    scores = list(head_importance(model, [(ids, seen)], Ships(kind)).values())
    logits, _, outputs, _ = eager(model, ids, seen)
    want = torch.stack([logits[b, n - 1] for b, n in enumerate(lengths)]).log_softmax(-1)
    means = [z.transpose(1, 2)[seen].mean(0) for z in outputs]
    for layer in range(2):
        for h in range(H):
            replaced = replaced_by(kind, layer, [h], means, seen)
            replaced.values.update(values_of(model, ids, seen))
            made = eager(model, ids, seen, replaced)[0]
            got = torch.stack([made[b, n - 1] for b, n in enumerate(lengths)]).log_softmax(-1)
            divergence = float((want.exp() * (want - got)).sum(-1).mean())
            assert scores[layer][h] == pytest.approx(divergence, rel=2e-3, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_ablation_of_any_kind(kind: str) -> None:
    model, g = random_circuit(), torch.Generator().manual_seed(2)
    ids = torch.randint(0, 10, (3, L), generator=g)
    scores = head_importance(model, [ids], Ablation(kind))
    want, _, outputs, _ = eager(model, ids)
    replaced = replaced_by(kind, 1, [2], [z.mean((0, 2)) for z in outputs])
    replaced.values.update(values_of(model, ids, None))
    got = eager(model, ids, None, replaced)[0]
    change = float((got - want).square().sum() / want.square().sum())
    assert scores["layers.1"][2] == pytest.approx(change, rel=1e-3)
    assert scores.method == ("ablation" if kind == "zero" else f"ablation(kind='{kind}')")


def test_uniform_attention_ignores_bias_and_sinks_and_keeps_masks() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
            self.slopes = nn.Parameter(torch.tensor([1.0, 0.2]).reshape(1, 2, 1, 1))
            self.sinks = nn.Parameter(torch.tensor([2.0, -1.0]).reshape(1, 2, 1, 1))

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            B, S, _ = x.shape
            q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            apart = (torch.arange(S)[:, None] - torch.arange(S)).abs()
            s = q @ k.mT - self.slopes * apart
            s = s + torch.zeros(B, 1, 1, S).masked_fill(~seen[:, None, None], -10000.0)
            s = torch.cat([s, self.sinks.expand(B, -1, S, -1)], -1)
            out: Tensor = self.o((s.softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2))
            return out

    model, x = Biased().eval().requires_grad_(False), torch.randn(2, 7, 16)
    seen = torch.arange(7) < torch.tensor([[7], [4]])
    scores = head_importance(model, [(x, seen)], Ablation("uniform"), behaviour=lambda out: out[:, 0])
    v = model.v(x).unflatten(-1, (2, 8)).transpose(1, 2)
    want = model(x, seen)[:, 0].double().log_softmax(-1)
    for h in range(2):
        z: list[Tensor] = []
        handle = model.o.register_forward_pre_hook(lambda _m, a, z=z: z.append(a[0].clone()))
        model(x, seen)
        handle.remove()
        for b, n in enumerate((7, 4)):
            z[0][b, :, h * 8 : h * 8 + 8] = v[b, h, :n].mean(0)
        got = model.o(z[0])[:, 0].double().log_softmax(-1)
        assert scores[""][h] == pytest.approx(float((want.exp() * (want - got)).sum(-1).mean()), rel=1e-3)


def test_ships_finds_the_heads_of_the_circuit() -> None:
    scores = head_importance(induction_circuit(), [repeats()[:, :-1]], "ships")
    assert best(scores, 0.1) == {PREVIOUS_HEAD, INDUCTION_HEAD}


def test_resampling_needs_another_sequence() -> None:
    model, ids = random_circuit(), torch.zeros(1, L, dtype=torch.long)
    with pytest.raises(CalibrationError, match="batch 0 has one sequence"):
        head_importance(model, [ids], Ships("resample"))
    seen = torch.arange(L) < torch.tensor([[12], [9]])
    with pytest.raises(CalibrationError, match="batch 0 has sequences of several lengths"):
        head_importance(model, [(ids.expand(2, -1), seen)], Ships("resample"))


# ---------------------------------------------------------------- sahara
def subspace_angle(x: Tensor, y: Tensor, rank: int) -> float:
    u, w = (torch.linalg.svd(m.double(), full_matrices=False).U[:, :rank] for m in (x, y))
    return math.degrees(math.acos(min(1.0, float(torch.linalg.svdvals(u.T @ w).min()))))


@pytest.mark.parametrize("rank", [1, 3])
def test_sahara_is_the_largest_principal_angle(rank: int) -> None:
    model, g = random_circuit(), torch.Generator().manual_seed(2)
    ids = torch.randint(0, 10, (6, L), generator=g)
    scores = list(head_importance(model, [ids[:4], ids[4:]], Sahara(rank, "zero")).values())
    want = eager(model, ids)[0][:, -1]
    for layer in range(2):
        for h in range(H):
            got = eager(model, ids, None, replaced_by("zero", layer, [h], []))[0][:, -1]
            assert scores[layer][h] == pytest.approx(subspace_angle(want, got, rank), rel=1e-3, abs=1e-3)


def test_greedy_sets_add_the_head_that_turns_most() -> None:
    model, g = random_circuit(), torch.Generator().manual_seed(2)
    ids = torch.randint(0, 10, (6, L), generator=g)
    found = greedy_heads(model, [ids], Sahara(2, "zero"), size=3)
    want, off = eager(model, ids)[0][:, -1], list[tuple[int, int]]()
    for site, head, angle in found.steps:
        angles = {}
        for layer in range(2):
            for h in range(H):
                if (layer, h) in off:
                    continue
                both = [*off, (layer, h)]

                def replaced(n: int, p: Tensor, z: Tensor, both: list[tuple[int, int]] = both) -> Tensor:
                    z = z.clone()
                    z[:, [h for m, h in both if m == n]] = 0.0
                    return z

                angles[layer, h] = subspace_angle(want, eager(model, ids, None, replaced)[0][:, -1], 2)
        chosen = max(angles, key=angles.__getitem__)
        assert (site, head) == (f"layers.{chosen[0]}", chosen[1])
        assert angle == pytest.approx(angles[chosen], rel=1e-3)
        off.append(chosen)
    assert sum(map(len, found.heads.values())) == 3
    assert "heads found by sahara(rank=2, kind='zero')" in str(found)
    assert found.to_json()["steps"][0] == list(found.steps[0])


def test_too_few_sequences_for_a_subspace() -> None:
    with pytest.raises(CalibrationError, match="2 sequences with 10 features have no subspace of 2 that can turn"):
        head_importance(random_circuit(), [torch.zeros(2, L, dtype=torch.long)], Sahara(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "flap"}, "'flap' does not ablate sets of heads"),
        ({"size": 0}, "size=0: expected an integer from 1 to 8"),
        ({"size": 9}, "size=9"),
    ],
)
def test_greedy_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        greedy_heads(random_circuit(), [torch.zeros(4, L, dtype=torch.long)], **options)


# ---------------------------------------------------------------- codes
def test_unique_codes_find_the_heads_of_a_task() -> None:
    """Positive texts end where the induction head finds its token; in negative ones the last token is new."""
    positive = repeats()[:, :9]
    negative = positive.clone()
    for row in negative:
        row[8] = next(t for t in range(10) if t not in row[:8].tolist())
    scores = head_importance(induction_circuit(), [positive], UniqueCodes([negative], codes=8))
    assert scores["layers.1"][INDUCTION_HEAD[1]] == 1.0
    assert best(scores, 0.99) == {INDUCTION_HEAD}
    assert scores.method == "unique-codes(codes=8)"


def test_codes_of_outputs_that_are_alike() -> None:
    ids = repeats()
    same = head_importance(induction_circuit(), [ids], UniqueCodes([ids]))
    assert {s for row in same.values() for s in row} == {0.0}
    with pytest.raises(CalibrationError, match="there are no negative examples"):
        head_importance(induction_circuit(), [ids], UniqueCodes([]))


# ---------------------------------------------------------------- models that do not fit
class Both(nn.Module):
    """Not causal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attention, self.head = (
            nn.Embedding(10, 16),
            nn.MultiheadAttention(16, 2, batch_first=True),
            nn.Linear(16, 10),
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out: Tensor = self.head(x + self.attention(x, x, x, need_weights=False)[0])
        return out


def test_retrieval_needs_a_causal_language_model() -> None:
    data, method = needle_task(*needles())
    with pytest.raises(CalibrationError, match="the model is not causal"):
        head_importance(Both().eval(), data, method)
    with pytest.raises(CalibrationError, match="are not those of a language model"):
        head_importance(induction_circuit(), data, method, behaviour=lambda out: out[:, -1])
    with pytest.raises(
        CalibrationError, match=r"needle \(1, 6\) and answer \(9, 14\) do not fit sequence 0 of batch 0"
    ):
        head_importance(induction_circuit(), data[:1], Retrieval([(1, 6)], [(9, 14)]))
    with pytest.raises(CalibrationError, match="needles of 3 sequences for 1 sequences"):
        head_importance(induction_circuit(), data[:1], method)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Retrieval([(1, 3)], []), "1 needles for 0 answers"),
        (lambda: Retrieval([(3, 3)], [(4, 5)]), r"invalid span \(3, 3\) in needles"),
        (lambda: Retrieval([(0, 3)], [(0, 5)]), r"invalid span \(0, 5\) in answers"),
        (lambda: needle_task([[1]], [(0, 1)], []), "1 prompts, 1 needles and 0 answers"),
        (lambda: Ships("none"), "kind='none'"),
        (lambda: Sahara(0), "rank=0"),
        (lambda: UniqueCodes([], codes=1), "codes=1"),
        (lambda: Counterfactual([], at="first"), "at='first'"),
    ],
)
def test_options_are_checked(make: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make()


def test_an_output_without_logits() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Both()

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            out = self.model(ids)
            return out, out

    ids = torch.zeros(3, L, dtype=torch.long)
    with pytest.raises(CalibrationError, match="the output of the model gives no logits: found tuple") as caught:
        head_importance(Pair().eval(), [ids], "ships")
    assert caught.value.hint is not None
    assert "behaviour=" in caught.value.hint
    head_importance(Pair().eval(), [ids], "ships", behaviour=lambda out: out[0])
