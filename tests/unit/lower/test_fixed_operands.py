"""Queries, keys and values that no input changes are computed once."""

from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.graph.nodes import opname
from attnopt.passes import LocalWindow, PruneHeads, SoftPAG

E, H, N = 16, 2, 5  # features, heads, learned tokens
BATCH = {"x": {0: torch.export.Dim("batch")}}


def heads_of(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], H, -1).transpose(1, 2)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Cross(nn.Module):
    """An attention with its own norm and projections."""

    def __init__(self, tokens: int = N) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(E)
        self.q, self.k, self.v, self.out = (nn.Linear(E, E) for _ in range(4))
        self.learned = nn.Parameter(torch.randn(tokens, E))

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = super().__call__(x)
        return result


class LearnedQueries(Cross):
    """As in Perceiver."""

    def forward(self, x: Tensor) -> Tensor:
        own = self.norm(self.learned.expand(x.shape[0], -1, -1))
        return self.out(attended(heads_of(self.q(own)), heads_of(self.k(x)), heads_of(self.v(x))))


class Bank(Cross):
    """Keys and values of a memory bank, as in RestoreFormer++."""

    def forward(self, x: Tensor) -> Tensor:
        bank = self.norm(self.learned).unsqueeze(0).repeat(x.shape[0], 1, 1)
        return self.out(attended(heads_of(self.q(x)), heads_of(self.k(bank)), heads_of(self.v(bank))))


class BroadcastBank(Cross):
    """Keys and values without a batch."""

    def forward(self, x: Tensor) -> Tensor:
        k, v = (f(self.learned).reshape(N, H, -1).transpose(0, 1) for f in (self.k, self.v))
        return self.out(attended(heads_of(self.q(x)), k, v))


class JoinedBank(Cross):
    """Learned keys and values before those of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        bank = self.learned.expand(x.shape[0], -1, -1)
        k, v = (torch.cat([f(bank), f(x)], 1) for f in (self.k, self.v))
        return self.out(attended(heads_of(self.q(x)), heads_of(k), heads_of(v)))


class Decoder(nn.Module):
    """The first layer of DETR's decoder: its queries attend to each other before they see a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(N, E)
        self.own, self.cross = nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H)
        self.norm = nn.LayerNorm(E)

    def forward(self, x: Tensor) -> Tensor:
        memory = x.transpose(0, 1)
        places = self.places.weight.unsqueeze(1).repeat(1, x.shape[0], 1)
        start = torch.zeros_like(places)
        first = start + self.own(start + places, start + places, start, need_weights=False)[0]
        first = self.norm(first)
        seen = self.cross(first + places, memory, memory, need_weights=False)[0]
        return (first + seen).transpose(0, 1)


MODELS = {m.__name__: m for m in (LearnedQueries, Bank, BroadcastBank, JoinedBank, Decoder)}
LEFT = {"LearnedQueries": 3, "Bank": 2, "BroadcastBank": 2, "JoinedBank": 4, "Decoder": 2}  # products that are left
ROLES = {
    "LearnedQueries": "queries",
    "Bank": "keys and values",
    "BroadcastBank": "keys and values",
    "JoinedBank": "keys and values",
    "Decoder": "queries, keys and values",
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MODELS[name]().eval(), torch.randn(3, 7, E)


def count(fast: attnopt.OptimizedModel, name: str = "linear") -> int:
    return sum(opname(n) == name for n in fast.graph_module.graph.nodes)


@pytest.mark.parametrize("shapes", [None, BATCH, "auto"], ids=["static", "batch", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_is_computed_once_and_repeated_over_the_batch(name: str, shapes: object) -> None:
    model, x = made(name)
    fast = attnopt.optimize(model, args=(x,), dynamic_shapes=shapes)
    assert count(fast) == LEFT[name]
    assert ROLES[name] in "".join(fast.report.sites[0].notes)
    for batch in (3,) if shapes is None else (3, 1, 2, 5):
        given = torch.randn(batch, 7, E)
        torch.testing.assert_close(fast(given), model(given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_one_copy_is_stored(name: str) -> None:
    model, x = made(name)
    fast = attnopt.optimize(model, args=(x,), dynamic_shapes=BATCH)
    sizes = {n: p.numel() for n, p in fast.named_parameters() if "fixed" in n}
    assert sizes
    assert set(sizes.values()) == {N * E}
    assert not any("q." in n and name == "LearnedQueries" for n, _ in fast.named_parameters())


def test_the_first_attention_of_a_decoder_is_gone() -> None:
    model, x = made("Decoder")
    fast = attnopt.optimize(model, args=(x,))
    assert count(fast, "scaled_dot_product_attention") == 1
    assert "queries" in "".join(fast.report.sites[1].notes)


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_exported(name: str, tmp_path: Path) -> None:
    model, x = made(name)
    fast = attnopt.optimize(model, args=(x,), dynamic_shapes=BATCH)
    fast.save(tmp_path / "saved")
    again = attnopt.load(tmp_path / "saved")
    assert torch.equal(again(x), fast(x))
    fast.export_onnx(tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx")
    for batch in (3, 1, 5):
        given = torch.randn(batch, 7, E)
        (got,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(given), atol=1e-4, rtol=1e-4)


def test_bytes_are_reported() -> None:
    model, x = made("Bank")
    fast = attnopt.optimize(model, args=(x,))
    stored = sum(p.nbytes for p in fast.parameters())
    before = sum(p.nbytes for p in model.parameters())
    assert f"{before - stored:,} bytes less in the whole model" in fast.report.sites[0].notes[-1]


def test_results_of_parameters_still_train() -> None:
    model, x = made("Bank")
    fast = attnopt.optimize(model, args=(x,))
    fast(x).sum().backward()
    results = [p for n, p in fast.named_parameters() if "fixed" in n]
    assert len(results) == 2
    assert all(p.requires_grad and p.grad is not None and bool(p.grad.any()) for p in results)


def test_results_of_frozen_parameters_do_not_train() -> None:
    model, x = made("Bank")
    fast = attnopt.optimize(model.requires_grad_(False), args=(x,))
    assert count(fast) == LEFT["Bank"]
    assert not any(p.requires_grad for p in fast.parameters())


def test_a_model_in_training_keeps_its_parameters() -> None:
    model, x = made("Bank")
    fast = attnopt.optimize(model.train(), args=(x,))
    fast(x).square().sum().backward()
    model(x).square().sum().backward()
    got, want = dict(fast.graph_module.named_parameters()), dict(model.named_parameters())
    assert got.keys() == want.keys()
    for name, p in want.items():
        torch.testing.assert_close(got[name].grad, p.grad)


def test_frozen_parameters_are_computed_in_training_too() -> None:
    model, x = made("Bank")
    for p in (model.learned, *model.norm.parameters(), *model.k.parameters()):
        p.requires_grad_(False)
    fast = attnopt.optimize(model.train(), args=(x,))
    assert count(fast) == 3  # the values' weights train
    assert "no input changes the keys:" in fast.report.sites[0].notes[-1]


def test_after_the_passes() -> None:
    model, x = made("Bank")
    pruned = attnopt.optimize(model, PruneHeads(heads=[1]), (x,), dynamic_shapes=BATCH)
    assert {p.numel() for n, p in pruned.named_parameters() if "fixed" in n} == {N * E // H}
    gone = attnopt.optimize(model.train(), PruneHeads(heads=[1]), (x,), dynamic_shapes=BATCH)
    torch.testing.assert_close(pruned(x), gone(x))


def test_a_result_is_optimized_again() -> None:
    model, x = made("LearnedQueries")
    fast = attnopt.optimize(model, args=(x,))
    again = attnopt.optimize(fast, PruneHeads(heads=[0]), (x,))
    want = attnopt.optimize(model, PruneHeads(heads=[0]), (x,))
    torch.testing.assert_close(again(x), want(x))


def test_branches_of_guidance_share_it() -> None:
    model, x = made("Bank")
    both = nn.Sequential(model, made("LearnedQueries")[0]).eval()
    guided = attnopt.guidance(both, {"1": SoftPAG([0], 0.5)}, (x,), scale=2.0)
    assert (
        sum("fixed" in n for n, _ in guided.named_parameters()) == 3
    )  # keys and values of the first, queries of the second


class PerLength(Cross):
    """Queries that no value changes, but the length does."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])[:, None] / torch.arange(1, E + 1)
        own = self.norm(places.sin()).expand(x.shape[0], -1, -1)
        return self.out(attended(heads_of(self.q(own)), heads_of(self.k(x)), heads_of(self.v(x))))


class PerSequence(Cross):
    """Each sequence of the batch has its own queries."""

    def forward(self, x: Tensor) -> Tensor:
        own = self.learned.expand(x.shape[0], -1, -1) * torch.arange(x.shape[0])[:, None, None]
        return self.out(attended(heads_of(self.q(own)), heads_of(self.k(x)), heads_of(self.v(x))))


class OfBatchSize(Cross):
    """The same queries for every sequence, which depend on their number."""

    def forward(self, x: Tensor) -> Tensor:
        total = self.learned.expand(x.shape[0], -1, -1).sum(0, keepdim=True).expand(x.shape[0], -1, -1)
        return self.out(attended(heads_of(self.q(total)), heads_of(self.k(x)), heads_of(self.v(x))))


class Capped(Cross):
    """The same, which only a large batch shows."""

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(self.learned).expand(x.shape[0], -1, -1).sum(0, keepdim=True)
        total = (self.learned * ones.clamp(min=9)).expand(x.shape[0], -1, -1)
        return self.out(attended(heads_of(self.q(total)), heads_of(self.k(x)), heads_of(self.v(x))))


class Scrambled(Cross):
    """The batch joins an axis from inside."""

    def forward(self, x: Tensor) -> Tensor:
        own = self.learned.unsqueeze(1).expand(-1, x.shape[0], -1).reshape(x.shape[0], -1, E)
        return self.out(attended(heads_of(self.q(own)), heads_of(self.k(x)), heads_of(self.v(x))))


class Noisy(Cross):
    def forward(self, x: Tensor) -> Tensor:
        own = torch.rand_like(self.learned).expand(x.shape[0], -1, -1)
        return self.out(attended(heads_of(self.q(own)), heads_of(self.k(x)), heads_of(self.v(x))))


class Counting(Cross):
    """Queries from state that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones(N, E))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        own = self.calls.expand(x.shape[0], -1, -1)
        return self.out(attended(heads_of(self.q(own)), heads_of(self.k(x)), heads_of(self.v(x))))


class Returned(Cross):
    """The caller may write into the queries."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q = heads_of(self.q(self.learned.expand(x.shape[0], -1, -1)))
        return self.out(attended(q, heads_of(self.k(x)), heads_of(self.v(x)))), q


@pytest.mark.parametrize("kind", [PerLength, PerSequence, OfBatchSize, Capped, Scrambled])
def test_what_sizes_change_stays(kind: type[Cross]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(3, 7, E)
    fast = attnopt.optimize(model, args=(x,), dynamic_shapes="auto")
    for shape in ((3, 7), (2, 7), (4, 7)) if kind is Scrambled else ((3, 7), (2, 9), (12, 7), (5, 4)):
        given = torch.randn(*shape, E)
        torch.testing.assert_close(fast(given), model(given), atol=1e-5, rtol=1e-5)
    assert count(fast) == 4


@pytest.mark.parametrize("kind", [PerLength, PerSequence, OfBatchSize, Capped, Scrambled])
def test_static_sizes_change_nothing(kind: type[Cross]) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(3, 7, E)
    fast = attnopt.optimize(model, args=(x,), dynamic_shapes=None)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    assert count(fast) == 3


@pytest.mark.parametrize("kind", [Noisy, Counting, Returned])
def test_what_differs_between_calls_stays(kind: type[Cross]) -> None:
    torch.manual_seed(0)
    fast = attnopt.optimize(kind().eval(), args=(torch.randn(3, 7, E),), dynamic_shapes=None)
    assert count(fast) == 4


def test_a_model_hardly_grows() -> None:
    """40,000 learned tokens of 16 features take 2.5 MB as keys, and 2.5 MB as values."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": Cross(40_000)})["a"]
    model.__class__ = Bank
    fast = attnopt.optimize(model.eval(), args=(torch.randn(1, 3, E),), dynamic_shapes=None)
    assert count(fast) == 4


def test_rotated_positions_are_no_operand() -> None:
    """Tables of sine and cosine stay computed, so that a rotation is still seen."""
    torch.manual_seed(0)

    class Rotated(Cross):
        def forward(self, x: Tensor) -> Tensor:
            angles = torch.arange(x.shape[1])[:, None].float() @ self.learned[:1, : E // H]
            q, k = (heads_of(f(x)) * angles.cos() + heads_of(f(x)).roll(1, -1) * angles.sin() for f in (self.q, self.k))
            return self.out(attended(q, k, heads_of(self.v(x))))

    fast = attnopt.optimize(Rotated().eval(), args=(torch.randn(2, 7, E),), dynamic_shapes=None)
    assert count(fast, "cos") == 1
    assert not any("fixed" in n for n, _ in fast.named_parameters())


def test_weights_computed_from_weights_stay() -> None:
    """A low-rank update of a weight is no operand."""
    torch.manual_seed(0)

    class Updated(Cross):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.q.weight + self.learned.T @ self.learned
            q = heads_of(nn.functional.linear(x, weight, self.q.bias))
            return self.out(attended(q, heads_of(self.k(x)), heads_of(self.v(x))))

    fast = attnopt.optimize(Updated().eval(), args=(torch.randn(2, 7, E),))
    assert not any("fixed" in n for n, _ in fast.named_parameters())


def test_a_window_of_learned_queries_is_refused_as_before() -> None:
    model, x = made("LearnedQueries")
    with pytest.warns(attnopt.AttnoptWarning, match="needs-self-attention"):
        fast = attnopt.optimize(model, LocalWindow(1), (x,))
    assert fast.report.sites[0].status == "refused"
