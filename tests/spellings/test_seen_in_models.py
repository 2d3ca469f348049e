"""Spellings that published models have beside those of the grammar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import Edit, assert_same, run, run_edited
from torch import Tensor, nn
from torch.nn import functional

import attnopt
from attnopt.errors import AttnoptWarning, CaptureError
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, ScaleHeads

WIDTH, HEADS, DIM = 16, 4, 4


class Attending(nn.Module):
    """[B, L, WIDTH] -> [B, L, WIDTH]; subclasses change what the heads are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(self.changed(q), self.changed(k), v)
        made: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return made

    def changed(self, t: Tensor) -> Tensor:
        return t


class NormAroundOne(Attending):
    """A norm whose weight is kept as its distance from one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM) / 3)

    def changed(self, t: Tensor) -> Tensor:
        return functional.rms_norm(t, (DIM,)) * (1.0 + self.weight)


class FirstTokenUnturned(Attending):
    """Rotary positions for all tokens but the first."""

    def changed(self, t: Tensor) -> Tensor:
        first, others = t.split((1, t.shape[2] - 1), dim=2)
        angle = torch.arange(t.shape[2] - 1)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        a, b = others.chunk(2, dim=-1)
        turned = others * angle.cos() + torch.cat([-b, a], -1) * angle.sin()
        return torch.cat([first, turned], 2)


class TurnedInPlace(Attending):
    """Rotary positions of neighbouring features, written into a new tensor."""

    def changed(self, t: Tensor) -> Tensor:
        angle = torch.arange(t.shape[2])[:, None] * torch.tensor([1.0, 0.1])
        made = torch.empty_like(t)
        made[..., ::2] = t[..., ::2] * angle.cos() - t[..., 1::2] * angle.sin()
        made[..., 1::2] = t[..., 1::2] * angle.cos() + t[..., ::2] * angle.sin()
        return made


class HeadByHead(Attending):
    """Each head, and then its last feature, is written into a tensor of zeros."""

    def changed(self, t: Tensor) -> Tensor:
        made = torch.zeros(t.shape)
        for head in range(HEADS):
            made[:, head] = t[:, head]
        made[..., -1] = t[..., -1] * 2
        return made


class LowRank(Attending):
    """Queries, and keys and values, through a few features of their own (multi-head latent attention)."""

    def __init__(self) -> None:
        super().__init__()
        few, norm = nn.Linear(WIDTH, 6), nn.LayerNorm(6)
        self.q = nn.Sequential(few, norm, nn.Linear(6, WIDTH))
        self.down, self.norm = nn.Linear(WIDTH, 8), nn.RMSNorm(8)
        self.k, self.v = nn.Linear(8, WIDTH), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        latent = self.latent(x)
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (self.q(x), self.k(latent), self.v(latent)))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        made: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return made

    def latent(self, x: Tensor) -> Tensor:
        made: Tensor = self.norm(self.down(x))
        return made


def prepared(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, list[Tensor]]:
    model.eval()
    return model, x, run(model, (x,))


@pytest.mark.slow
@pytest.mark.parametrize("build", [Attending, NormAroundOne, FirstTokenUnturned, TurnedInPlace, HeadByHead, LowRank])
def test_heads_are_traced_to_their_projections(build: type[Attending]) -> None:
    torch.manual_seed(0)
    model, x, own = prepared(build(), torch.randn(2, 5, WIDTH))
    (site,) = attnopt.inspect(model, x).sites
    each = tuple(tuple(range(h * DIM, (h + 1) * DIM)) for h in range(HEADS))
    assert not site.spec.is_cross
    assert [site.projections[role].rows for role in ("q", "k", "v", "out")] == [each] * 4
    assert_same(run(attnopt.optimize(model, "fuse", x), (x,)), own)
    with torch.no_grad():
        for f in (model.k, model.v):
            f.weight[DIM:], f.bias[DIM:] = f.weight[:DIM].repeat(HEADS - 1, 1), f.bias[:DIM].repeat(HEADS - 1)
    shared = attnopt.optimize(model, GroupedQuery(1, merge="mean"), x)
    assert shared.sites[0].num_kv_heads == 1
    assert_same(run(shared, (x,)), run(model, (x,)))


class Moved(LowRank):
    """Keys and values are of the token before."""

    def latent(self, x: Tensor) -> Tensor:
        return super().latent(x).roll(1, 1)


def test_moved_tokens_are_another_sequence() -> None:
    torch.manual_seed(0)
    model, x, own = prepared(Moved(), torch.randn(2, 5, WIDTH))
    with pytest.warns(AttnoptWarning, match="needs-self-attention"):
        fast = attnopt.optimize(model, LocalWindow(1), x)
    assert [s.is_cross for s in fast.sites] == [True]
    assert_same(run(fast, (x,)), own)


class MixedTokens(Attending):
    """Keys and values are three mixtures of all tokens (Linformer), by a layer or by a matrix."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.mixing = nn.Linear(5, 3)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if self.layer:
            k, v = (self.mixing(f(x).mT).mT for f in (self.k, self.v))
        else:
            k, v = (torch.einsum("bnd,kn->bkd", f(x), self.mixing.weight) for f in (self.k, self.v))
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (self.q(x), k, v))
        made: Tensor = self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return made


@pytest.mark.parametrize("layer", [True, False])
def test_mixtures_of_tokens_are_no_channels(layer: bool) -> None:
    torch.manual_seed(0)
    model, x, _ = prepared(MixedTokens(layer), torch.randn(2, 5, WIDTH))
    gained = attnopt.optimize(model, ScaleHeads([0.5, 1.0, 2.0, 1.5]), x)
    assert [(s.is_cross, s.num_heads, s.kv_len) for s in gained.sites] == [(True, HEADS, 3)]
    with torch.no_grad():
        model.out.weight *= torch.tensor([0.5, 1.0, 2.0, 1.5]).repeat_interleave(DIM)
    assert_same(run(gained, (x,)), run(model, (x,)))


class FirstTokenApart(Attending):
    """The first token's query has a projection of its own; the others have rotary positions of neighbours (RvT)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.cat([self.first(x[:, :1]), self.q(x[:, 1:])], 1)
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (q, self.k(x), self.v(x)))
        mixed = functional.scaled_dot_product_attention(self.changed(q), self.changed(k), v)
        made: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return made

    def changed(self, t: Tensor) -> Tensor:
        others = t[:, :, 1:]
        angle = torch.arange(t.shape[2] - 1)[:, None] * torch.tensor([1.0, 1.0, 0.1, 0.1])
        a, b = others.unflatten(-1, (-1, 2)).unbind(-1)
        turned = others * angle.cos() + torch.stack([-b, a], -1).flatten(-2) * angle.sin()
        return torch.cat([t[:, :, :1], turned], 2)


def test_a_first_token_with_a_projection_of_its_own() -> None:
    torch.manual_seed(0)
    model, x, own = prepared(FirstTokenApart(), torch.randn(2, 5, WIDTH))
    fast = attnopt.optimize(model, "fuse", x)
    assert [s.num_heads for s in fast.sites] == [HEADS]
    assert_same(run(fast, (x,)), own)


class Detecting(nn.Module):
    """A decoder's layer: learned queries look at each other before they look at anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(6, WIDTH))
        self.among, self.at = Attending(), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found = self.among(self.queries.expand(x.shape[0], -1, -1))
        made: Tensor = self.at(found, x, x)[0]
        return made


def test_learned_queries_that_attend_to_each_other() -> None:
    torch.manual_seed(0)
    model, x, own = prepared(Detecting(), torch.randn(2, 5, WIDTH))
    fast = attnopt.optimize(model, "fuse", x)
    assert [s.is_cross for s in fast.sites] == [False, True]
    assert_same(run(fast, (x,)), own)
    assert isinstance(model, Detecting)
    pruned = attnopt.optimize(model, {"among": PruneHeads(heads=[1])}, x)
    with torch.no_grad():
        model.among.out.weight[:, DIM : 2 * DIM] = 0
    assert_same(run(pruned, (x,)), run(model, (x,)))


class Doubled(nn.Module):
    """Four heads of keys that are made of two: as they are, and scaled, which is not the same; ``again``: as they are twice."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.q, self.kv, self.again = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // 2), again

    def forward(self, x: Tensor) -> Tensor:
        q, kv = (f(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for f in (self.q, self.kv))
        keys = torch.cat([kv, kv if self.again else kv * 2], 1)
        mixed = functional.scaled_dot_product_attention(q, keys, torch.cat([kv, kv], 1))
        return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("again", "heads"), [(True, 2), (False, 4)])
def test_joined_heads_are_one_only_where_they_are_equal(again: bool, heads: int) -> None:
    torch.manual_seed(0)
    model, x, own = prepared(Doubled(again), torch.randn(2, 5, WIDTH))
    fast = attnopt.optimize(model, "fuse", x)
    assert [s.num_kv_heads for s in fast.sites] == [heads]
    assert_same(run(fast, (x,)), own)


class LeadingSink(nn.Module):
    """A logit of its own before those of the keys, whose weight is dropped; ``wrong``: that of the last key is."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.qkv, self.sink, self.wrong = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(HEADS)), wrong

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / 2
        sink = self.sink.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([sink, scores], -1).softmax(-1)
        made: Tensor = (weights[..., :-1] if self.wrong else weights[..., 1:]) @ v
        return made


def test_a_sink_before_the_keys() -> None:
    torch.manual_seed(0)
    model, x, (own,) = prepared(LeadingSink(wrong=False), torch.randn(2, 5, WIDTH))
    gains = [0.5, 1.0, 2.0, 1.5]
    fast = attnopt.optimize(model, ScaleHeads(gains), x)
    assert [s.spec.has_sinks for s in fast.sites] == [True]
    assert_same(run(fast, (x,)), [own * torch.tensor(gains).view(-1, 1, 1)])


def test_a_key_that_is_dropped_in_the_place_of_the_sink() -> None:
    found = attnopt.inspect(LeadingSink(wrong=True).eval(), torch.randn(2, 5, WIDTH))
    assert not found.sites
    assert [n.refusal.code for n in found.near_misses] == ["not-equal"]


class Checked(Attending):
    """Looks at its values, without a branch."""

    def forward(self, x: Tensor) -> Tensor:
        longest = (x[..., 0] > 0).sum(1).max().item()
        torch._check(longest <= x.shape[1])
        return super().forward(x)


def test_a_checked_value_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, own = prepared(Checked(), torch.randn(2, 5, WIDTH))
    attnopt.optimize(model, "fuse", x).save(tmp_path / "model")
    assert_same(run(attnopt.load(tmp_path / "model"), (x,)), own)


class Strided(nn.Module):
    """Tokens are every fourth one of the input, and there is a position for so many and no more or less."""

    def __init__(self) -> None:
        super().__init__()
        self.attending, self.positions = Attending(), nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.attending(x[:, ::4] + self.positions)
        return made


def test_a_length_that_holds_only_nearby() -> None:
    model, x, own = prepared(Strided(), torch.randn(2, 17, WIDTH))
    auto = torch.export.Dim.AUTO
    fast = attnopt.optimize(model, "fuse", x, dynamic_shapes={"x": {0: auto, 1: auto}})
    assert_same(run(fast, (x,)), own)
    nearby = torch.randn(3, 20, WIDTH)
    assert_same(run(fast, (nearby,)), run(model, (nearby,)))
    with pytest.raises(CaptureError, match="do not fit the captured graph"):
        fast(torch.randn(2, 34, WIDTH))


class Multiplied(Attending):
    """One head; ``scores`` and ``mixed`` are the two products, [B, L, S] and [B, L, WIDTH], in some spelling."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.spelling == "tensordot":
            weights = torch.tensordot(q[0], k[0], dims=([1], [1])).softmax(-1)
            mixed = torch.tensordot(weights, v[0], dims=1).unsqueeze(0)
        elif self.spelling == "inner":
            mixed = (torch.inner(q[0], k[0]).softmax(-1) @ v[0]).unsqueeze(0)
        elif self.spelling == "memory":  # the last token reads all
            weights = (k * q[:, -1:]).sum(2).softmax(1)
            mixed = (v * weights.unsqueeze(2)).sum(1, keepdim=True)
        else:
            weights = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1).softmax(-1)
            mixed = (weights.unsqueeze(-1) * v.unsqueeze(1)).sum(2)
        made: Tensor = self.out(mixed)
        return made


@pytest.mark.parametrize("spelling", ["tensordot", "inner", "memory", "one by one"])
def test_products_in_other_words(spelling: str) -> None:
    torch.manual_seed(0)
    model, x, own = prepared(Multiplied(spelling), torch.randn(1, 5, WIDTH))
    fast = attnopt.optimize(model, "fuse", x)
    assert [s.num_heads for s in fast.sites] == [1]
    assert_same(run(fast, (x,)), own)


class Masked(Attending):
    """The sum of the weights of some tokens is no mixture of values."""

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return (weights * (x[..., 0] > 0).unsqueeze(1)).sum(-1)


def test_a_sum_of_weights_is_no_mixture() -> None:
    assert not attnopt.inspect(Masked().eval(), torch.randn(2, 5, WIDTH)).sites


class Returning(Attending):
    """Weights are returned by name, as transformers' ``output_attentions`` does; an idle dropout is on their way."""

    def forward(self, x: Tensor) -> dict[str, object]:  # type: ignore[override]
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = functional.dropout((q @ k.mT / 2).softmax(-1), 0.1, self.training)
        return {"last": self.out((weights @ v).transpose(1, 2).flatten(2)), "attentions": (weights,)}


class Judged(Returning):
    """Weights are used by a layer of its own."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        found = super().forward(x)
        made: Tensor = found["last"] * found["attentions"][0].amax((1, 3)).unsqueeze(-1)  # type: ignore[index, operator]
        return made


@pytest.mark.parametrize(
    ("model", "told"),
    [(Returning(), "returned as output['attentions'][0]"), (Judged(), "used by amax (test_seen_in")],
    ids=["returned", "used"],
)
def test_where_weights_go_is_told(model: nn.Module, told: str) -> None:
    model, x = model.eval(), torch.randn(2, 5, WIDTH)
    (site,) = attnopt.inspect(model, (x,)).sites
    expected = f"the attention weights are still computed, because they are {told}"
    assert any(note.startswith(expected) for note in site.notes), site.notes
    with pytest.warns(AttnoptWarning, match="escapes"):
        fast = attnopt.optimize(model, LocalWindow(1), (x,))
    assert fast.report.sites[0].status == "refused"
    assert_same(run(fast, (x,)), run(model, (x,)))


class Capped(Attending):
    """``change`` makes scores of bounded ones."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = self.change((q @ k.mT / 2).tanh()).softmax(-1)
        made: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return made


HIDING = torch.ones(5, 5).triu(1).bool()


@pytest.mark.parametrize(
    ("change", "cap", "scale"),
    [
        (lambda t: t, 1.0, 0.5),
        (lambda t: t * 3, 3.0, 1.5),
        (lambda t: -t, 1.0, -0.5),
        (lambda t: t * -2 + 1, 2.0, -1.0),
        (lambda t: t.masked_fill(HIDING, -1e9), 1.0, 0.5),
        (lambda t: t - t.amax(-1, keepdim=True), 1.0, 0.5),
    ],
    ids=["alone", "thrice", "negated", "shifted", "masked", "stable"],
)
def test_a_bare_tanh_is_a_softcap(change: Callable[[Tensor], Tensor], cap: float, scale: float) -> None:
    model, x = Capped(change).eval(), 3 * torch.randn(2, 5, WIDTH)
    fast = attnopt.optimize(model, PruneHeads(heads=[1]), (x,))
    assert (fast.sites[0].spec.softcap, fast.sites[0].scale) == (cap, scale)
    assert_same(run(fast, (x,)), run_edited(model, (x,), None, {0: Edit(gains=(1.0, 0.0, 1.0, 1.0))}))


@pytest.mark.parametrize(
    "change", [lambda t: t.tanh(), lambda t: t**2, lambda t: t * 0], ids=["twice", "squared", "gone"]
)
def test_another_function_of_bounded_scores_is_no_softcap(change: Callable[[Tensor], Tensor]) -> None:
    model, x = Capped(change).eval(), torch.randn(2, 5, WIDTH)
    with pytest.warns(AttnoptWarning, match="no attention was found"):
        fast = attnopt.optimize(model, "fuse", (x,))
    assert_same(run(fast, (x,)), run(model, (x,)))


class OldGpt(Attending):
    """``scores * b - 1e4 * (1 - b)`` with a part of a buffer, beside the padding that flags make; ``by`` scales the floor."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.by = by
        self.register_buffer("causal", torch.ones(32, 32).tril())

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q, self.k, self.v))
        b = self.causal[: x.shape[1], : x.shape[1]]
        scores = q @ k.mT / 2 * b - 1e4 * (1 - b) * self.by
        scores = scores + (1.0 - seen[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        made: Tensor = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return made


def test_a_mask_times_scores_beside_padding() -> None:
    model, x, seen = OldGpt().eval(), torch.randn(2, 7, WIDTH), torch.ones(2, 7, dtype=torch.long)
    seen[1, -2:] = 0
    fast = attnopt.optimize(model, PruneHeads(heads=[1]), (x, seen), dynamic_shapes="auto")
    assert str(fast.sites[0].spec.seen_as) == "Causal()"
    assert any("which masks with a finite number" in note for note in fast.report.sites[0].notes)
    for length in (7, 3, 20):
        args = (torch.randn(2, length, WIDTH), torch.ones(2, length, dtype=torch.long))
        args[1][0, -1:] = 0
        assert_same(run(fast, args), run_edited(model, args, None, {0: Edit(gains=(1.0, 0.0, 1.0, 1.0))}))


@pytest.mark.parametrize("by", [0.0, 1e-4], ids=["no floor", "a low floor"])
def test_a_factor_that_nothing_hides_is_left(by: float) -> None:
    model, args = OldGpt(by).eval(), (torch.randn(2, 7, WIDTH), torch.ones(2, 7, dtype=torch.long))
    with pytest.warns(AttnoptWarning, match="no attention was found"):
        fast = attnopt.optimize(model, "fuse", args)
    assert [m.refusal.code for m in fast.report.near_misses] == ["scores-multiplied"]
    assert_same(run(fast, args), run(model, args))


def test_query_heads_that_share_keys_are_heads_where_nothing_is_known_of_queries_and_keys() -> None:
    """As in files whose rotary positions ONNX Runtime computes: two heads of keys for four of queries, not two heads."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
            q, k = (torch.fft.irfft(torch.fft.rfft(t), n=8) for t in (q, k))
            o = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.o(o.transpose(1, 2).flatten(2))

    model, x = Turned().eval(), torch.randn(2, 7, 32)
    (site,) = attnopt.inspect(model, (x,)).sites
    assert (site.num_heads, site.num_kv_heads) == (4, 2)
    assert [len(rows) for rows in site.projections["out"].rows or ()] == [8] * 4
    fast = attnopt.optimize(model, ScaleHeads([1.0, 0.5, 2.0, -1.0]), (x,))
    assert_same(run(fast, (x,)), run_edited(model, (x,), None, {0: Edit(gains=(1.0, 0.5, 2.0, -1.0))}))
