"""Relative positions whose rows are looked up for each pair: the products are looked up instead, and nothing else changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from oracle import Edit, assert_same, run, run_edited
from torch import Tensor, nn
from torch.nn import functional as F
from travelling import assert_travels

import attnopt
from attnopt.passes import LocalWindow, PruneHeads

pytestmark = [
    pytest.mark.usefixtures("one_capture"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning"),
]
B, N, H, D = 2, 7, 3, 8
WIDTH, MOST = H * D, 40


class Relative(nn.Module):
    """Subclasses say how positions enter the scores [B, H, L, S]."""

    rows = 2 * MOST - 1

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.table = nn.Parameter(torch.randn(self.rows, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (H, D)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = ((self.of_positions(q) + q @ k.mT) / D**0.5).softmax(-1)
        made: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return made

    def distances(self, n: int) -> Tensor:
        """j - i"""
        return torch.arange(n)[None, :] - torch.arange(n)[:, None]

    def of_positions(self, q: Tensor) -> Tensor:
        raise NotImplementedError


class Indexed(Relative):
    def of_positions(self, q: Tensor) -> Tensor:
        return torch.einsum("bhid,ijd->bhij", q, self.table[self.distances(q.shape[2]) + MOST - 1])


class FromTheEnd(Relative):
    """Python counts negative indices from the end."""

    def of_positions(self, q: Tensor) -> Tensor:
        return (q.unsqueeze(3) * self.table[self.distances(q.shape[2])]).sum(-1)


class Clamped(Relative):
    """Far keys share a row (arXiv:1803.02155)."""

    rows = 9

    def of_positions(self, q: Tensor) -> Tensor:
        rows = F.embedding(self.distances(q.shape[2]).clamp(-4, 4) + 4, self.table)
        return torch.einsum("bhld,lrd->bhlr", q, rows)


class ByQuery(Relative):
    """One product for each query, as in SpeechT5."""

    def of_positions(self, q: Tensor) -> Tensor:
        n = q.shape[2]
        rows = self.table.index_select(0, (self.distances(n) + MOST - 1).reshape(-1)).view(n, n, D)
        return torch.matmul(q.flatten(0, 1).transpose(0, 1), rows.mT).transpose(0, 1).unflatten(0, (-1, H))


class Backwards(Relative):
    """i - j, with keys before queries (Transformer-XL, arXiv:1901.02860), and its own bias on the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(H, 1, D))

    def of_positions(self, q: Tensor) -> Tensor:
        rows = self.table[self.distances(q.shape[2]) + MOST - 1]  # [keys, queries, D]
        return torch.einsum("jid,bhid->bhij", rows, q + self.u)


class OfHeads(Relative):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(H, self.rows, D))

    def of_positions(self, q: Tensor) -> Tensor:
        return torch.einsum("bhid,hijd->bhij", q, self.table[:, self.distances(q.shape[2]) + MOST - 1])


class Mirrored(Relative):
    """The index depends on i + j: it is no distance."""

    rows = 9

    def of_positions(self, q: Tensor) -> Tensor:
        n = q.shape[2]
        return torch.einsum("bhid,ijd->bhij", q, self.table[(torch.arange(n)[:, None] + torch.arange(n)) % 9])


class OneElsewhere(Relative):
    """One pair far from the first row and column has a row of its own, counted from the end."""

    rows = 9

    def of_positions(self, q: Tensor) -> Tensor:
        index = self.distances(q.shape[2]).clamp(-4, 4) + 4
        index = torch.where((torch.arange(q.shape[2])[:, None] == 3) & (torch.arange(q.shape[2]) == 5), -2, index)
        return torch.einsum("bhid,ijd->bhij", q, self.table[index])


BY_DISTANCE = (Indexed, FromTheEnd, Clamped, ByQuery, Backwards, OfHeads)
OTHERS = (Mirrored, OneElsewhere)
each = pytest.mark.parametrize("kind", [*BY_DISTANCE, *OTHERS], ids=lambda kind: kind.__name__)


def made(kind: Callable[[], nn.Module], n: int = N) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind().eval(), torch.randn(B, n, WIDTH)


def sizes(module: nn.Module) -> list[tuple[int, ...]]:
    """Of every tensor that the graph computes."""
    nodes = module.graph_module.graph.nodes  # type: ignore[union-attr]
    found = (n.meta["val"] for n in nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor))
    return [tuple(int(s) if isinstance(s, int) else s.node.hint for s in x.shape) for x in found]


def looks_up_pairs(module: nn.Module, n: int) -> bool:
    """It makes a row of features for each pair."""
    return any(list(s).count(n) >= 2 and s[-1] == D for s in sizes(module)) or any(
        s[-1] == D and n * n in s for s in sizes(module)
    )


@each
def test_no_row_for_each_pair_and_equal_at_other_sizes(kind: type[Relative]) -> None:
    model, x = made(kind)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes="auto")
    assert [s.spec.has_bias for s in fast.sites] == [True]
    assert not looks_up_pairs(fast, N)
    for other in (x, torch.randn(2, 1, WIDTH), torch.randn(1, 2, WIDTH), torch.randn(3, 13, WIDTH)):
        assert_same(run(fast, (other,)), run(model, (other,)))


@each
@pytest.mark.slow
@pytest.mark.parametrize("n", [1, N])
def test_static_lengths(kind: type[Relative], n: int) -> None:
    model, x = made(kind, n)
    fast = attnopt.optimize(model, "fuse", (x,))
    assert_same(run(fast, (x,)), run(model, (x,)))


@pytest.mark.parametrize("kind", [OfHeads, Mirrored], ids=lambda kind: kind.__name__)
def test_windows_and_pruned_heads(kind: type[Relative]) -> None:
    model, x = made(kind)
    near = (torch.arange(N)[:, None] - torch.arange(N)).abs() <= 2
    fast = attnopt.optimize(model, [LocalWindow(2), PruneHeads(heads=[1])], (x,))
    assert_same(run(fast, (x,)), run_edited(model, (x,), None, {0: Edit(near, gains=(1.0, 0.0, 1.0))}))


@pytest.mark.usefixtures("one_torchlib")
@pytest.mark.parametrize(
    "kind", [Backwards, pytest.param(Mirrored, marks=pytest.mark.slow)], ids=lambda kind: kind.__name__
)
def test_saved_and_in_onnx(kind: type[Relative], tmp_path: Path) -> None:
    model, x = made(kind)
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes="auto")
    assert_travels(fast, tmp_path, [x, torch.randn(1, 11, WIDTH)])


class OfInputs(Relative):
    """Positions that a call brings: [B, L]"""

    def forward(self, x: Tensor, at: Tensor) -> Tensor:  # type: ignore[override]
        self.at = at
        return super().forward(x)

    def of_positions(self, q: Tensor) -> Tensor:
        return torch.einsum("bhid,bijd->bhij", q, self.table[self.at[:, None, :] - self.at[:, :, None] + MOST - 1])


def test_positions_that_a_call_brings() -> None:
    model, x = made(OfInputs)
    at = torch.randint(MOST, (B, N))
    model.rows = Relative.rows
    fast = attnopt.optimize(model, "fuse", (x, at))
    other = (torch.randn(B, N, WIDTH), torch.randint(MOST, (B, N)))
    assert_same(run(fast, other), run(model, other))


def test_many_heads_keep_the_rows() -> None:
    """Where the rows of pairs are fewer numbers than the products, they stay."""
    model, _ = made(Indexed)
    x = torch.randn(64, N, WIDTH)
    fast = attnopt.optimize(model, "fuse", (x,))
    assert looks_up_pairs(fast, N)
    assert_same(run(fast, (x,)), run(model, (x,)))


class Skewed(Relative):
    """Music Transformer's own skewing (arXiv:1809.04281): nothing is looked up."""

    def of_positions(self, q: Tensor) -> Tensor:
        n = q.shape[2]
        products = q @ self.table[MOST - n : MOST + n - 1].T  # by distance, from 1 - n
        return F.pad(products, (0, 1)).flatten(2)[..., n - 1 :][..., : n * (2 * n - 1)].unflatten(-1, (n, -1))[..., :n]


class Shifted(Relative):
    """Transformer-XL's (arXiv:1901.02860): a column of zeros, laid out anew."""

    def of_positions(self, q: Tensor) -> Tensor:
        n = q.shape[2]
        products = q @ self.table[MOST - n : MOST + n - 1].T
        padded = F.pad(products, (1, 0))
        return padded.view(*q.shape[:2], 2 * n, n)[:, :, 1:].reshape(*q.shape[:3], 2 * n - 1)[..., :n]


@pytest.mark.parametrize("kind", [Skewed, Shifted], ids=lambda kind: kind.__name__)
def test_skewed_by_the_model(kind: type[Relative]) -> None:
    model, x = made(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = attnopt.optimize(model, "fuse", (x,))
    assert [s.spec.has_bias for s in fast.sites] == [True]
    assert_same(run(fast, (x,)), run(model, (x,)))


def speech_t5() -> nn.Module:
    import transformers
    from transformers.models.speecht5.modeling_speecht5 import SpeechT5Encoder

    config = transformers.SpeechT5Config(
        hidden_size=32,
        encoder_layers=1,
        encoder_attention_heads=4,
        encoder_ffn_dim=32,
        encoder_max_relative_position=16,
    )
    return zoo.loud(SpeechT5Encoder(config))


def wav2vec2_bert() -> nn.Module:
    config = {"left_max_position_embeddings": 8, "right_max_position_embeddings": 4, "intermediate_size": 32}
    return zoo.hf(
        "Wav2Vec2BertModel", "Wav2Vec2BertConfig", hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        feature_projection_input_dim=32, position_embeddings_type="relative_key", **config,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("build", [speech_t5, wav2vec2_bert], ids=lambda build: build.__name__)
def test_models_of_transformers(build: Callable[[], nn.Module]) -> None:
    model, x = build(), torch.randn(2, 40, 32)
    fast = attnopt.optimize(model, "fuse", (x,))
    assert [(s.spec.has_bias, s.q_len) for s in fast.sites] == [(True, 40)]
    assert not any(list(s).count(40) >= 2 and s[-1] == 8 for s in sizes(fast))
    assert_same(run(fast, (x,)), run(model, (x,)))
