"""Keys that a converted decoder evicts from its cache, against dense attention under masks that an oracle keeps by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from in_pieces import in_pieces
from torch import Tensor

import attnopt
from attnopt.errors import AttnoptError, AttnoptWarning, ConversionError, PolicyError, RewriteError
from attnopt.ir.eviction import Eviction
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.passes import EvictKeys, LocalWindow, PruneHeads
from attnopt.patterns import Causal, PerHead, Sinks, Window

transformers = pytest.importorskip("transformers")

from transformers.masking_utils import eager_mask  # noqa: E402  (they import transformers)

from attnopt.conversion.hf_attention import attend  # noqa: E402
from attnopt.conversion.hf_evicting_layer import EvictingLayer  # noqa: E402
from attnopt.conversion.hf_install import install_evictions  # noqa: E402

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # a model runs for each example: no shrinking
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def decoder(kv_heads: int = 2, **options: Any) -> Any:
    """Two layers of four heads in double precision, so that no choice between keys depends on rounding."""
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=kv_heads, **options)
    made = transformers.LlamaForCausalLM(config).eval().double()
    for p in made.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return made


def evicting(eviction: Eviction, kv_heads: int = 2, layers: Sequence[int] = (0, 1), **options: Any) -> Any:
    made = decoder(kv_heads, **options)
    install_evictions(made, {f"model.layers.{n}.self_attn": eviction for n in layers})
    return made


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------ the oracle
class Kept:
    """The keys that one key/value head of one text keeps, as the papers say it."""

    def __init__(self, eviction: Eviction) -> None:
        self.eviction, self.tokens, self.received = eviction, list[int](), dict[int, float]()

    def read(self, start: int, stop: int, weights: Tensor, real: Tensor) -> None:
        """Tokens ``start`` to ``stop``, whose queries gave ``weights`` [readers, stop - start, stop]."""
        self.tokens += range(start, stop)
        own, budget, recent = self.eviction, self.eviction.budget, self.eviction.recent
        if own.method == "h2o":
            for j in self.tokens:
                got = sum(float(weights[:, i - start, j].sum()) for i in range(start, stop) if real[i])
                self.received[j] = self.received.get(j, 0.0) + got
            newest = self.tokens[len(self.tokens) - (recent - 1) :]
            rest = [j for j in self.tokens if j not in newest]
            heavy = sorted(rest, key=lambda j: (-self.received[j], j))[: budget - recent]
            if len(self.tokens) > budget - 1:
                self.tokens = sorted(heavy) + newest
            return
        if stop - start == 1 or len(self.tokens) <= budget:
            return
        voters = [i for i in range(max(start, stop - recent), stop) if real[i]]
        newest = self.tokens[-recent:]
        rest = self.tokens[:-recent]
        votes = [sum(float(weights[:, i - start, j].sum()) for i in voters) for j in rest]
        reach = own.pool // 2
        smooth = [max(votes[max(0, n - reach) : n + reach + 1]) for n in range(len(votes))]
        best = sorted(range(len(rest)), key=lambda n: (not real[rest[n]], -smooth[n], n))[: budget - recent]
        self.tokens = sorted(rest[n] for n in best) + newest


@dataclass
class Oracle:
    """The model without a cache, on the whole text at each call, under masks that remember what each query saw."""

    eviction: Eviction
    kv_heads: int
    layers: Sequence[int] = (0, 1)

    def read(self, ids: Tensor, stops: list[int], padding: Tensor | None = None) -> Tensor:
        plain, weights_of = decoder(self.kv_heads), dict[int, Tensor]()

        def dense(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, None]:
            k, v = (t.repeat_interleave(4 // self.kv_heads, 1) for t in (k, v))
            weights_of[module.layer_idx] = (q @ k.mT / 8**0.5 + mask).softmax(-1)
            return (weights_of[module.layer_idx] @ v).transpose(1, 2).contiguous(), None

        transformers.AttentionInterface.register("dense", dense)
        transformers.AttentionMaskInterface.register("dense", eager_mask)
        plain.set_attn_implementation("dense")
        B, T = ids.shape
        real = torch.ones(B, T, dtype=torch.bool) if padding is None else padding.bool()
        seen = [torch.zeros(B, 4, T, T, dtype=torch.bool) for _ in range(2)]
        for n, layer in enumerate(plain.model.layers):

            def masked(module: Any, args: Any, kwargs: Any, n: int = n) -> tuple[Any, Any]:
                L = kwargs["hidden_states"].shape[1]
                low = torch.finfo(torch.float64).min
                mask = torch.zeros(B, 4, L, L, dtype=torch.float64).masked_fill(~seen[n][:, :, :L, :L], low)
                return args, {**kwargs, "attention_mask": mask}

            layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True)
        kept = [[[Kept(self.eviction) for _ in range(self.kv_heads)] for _ in range(B)] for _ in range(2)]
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        readers, pieces, start = 4 // self.kv_heads, [], 0
        for stop in stops:
            for n in range(2):
                for b in range(B):
                    for h in range(4):
                        for i in range(start, stop):
                            old = kept[n][b][h // readers].tokens if n in self.layers else range(start)
                            seen[n][b, h, i, [*old, *range(start, i + 1)]] = True
                            seen[n][b, h, i] &= real[b]
            with torch.no_grad():
                out = plain(ids[:, :stop], position_ids=positions[:, :stop], use_cache=False)
            pieces.append(out.logits[:, start:])
            for n in self.layers:
                for b in range(B):
                    for g in range(self.kv_heads):
                        weights = weights_of[n][b, g * readers : (g + 1) * readers, start:stop]
                        kept[n][b][g].read(start, stop, weights, real[b])
            start = stop
        self.kept = kept
        return torch.cat(pieces, 1)


EVICTIONS = st.builds(
    lambda method, budget, share, pool: Eviction(
        method, budget, max(1, round(share * budget)), 1 if method == "h2o" else pool
    ),
    st.sampled_from(["h2o", "snapkv"]),
    st.integers(1, 14),
    st.floats(0, 1),
    st.sampled_from([1, 3, 5]),
)


@settings(max_examples=40, deadline=None, phases=QUICK)
@given(
    eviction=EVICTIONS,
    kv_heads=st.sampled_from([1, 2, 4]),
    batch=st.sampled_from([1, 2]),
    prompt=st.integers(1, 17),
    chunks=st.sets(st.integers(1, 25), max_size=2),
    padded=st.sampled_from([0, 0, 3, 8]),
    attention=st.sampled_from(["sdpa", "eager"]),
    seed=st.integers(0, 5),
)
@example(Eviction("h2o", 6, 3), 2, 2, 13, set(), 8, "eager", 0)  # queries of padding weigh each other equally
def test_logits_are_those_of_the_oracle(
    eviction: Eviction, kv_heads: int, batch: int, prompt: int, chunks: set[int], padded: int, attention: str, seed: int
) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(1, 50, (batch, 25))
    padding = torch.ones_like(ids)
    padding[0, : min(padded, prompt - 1)] = 0
    stops = [prompt, *(n for n in range(prompt + 1, 26) if n not in chunks or n == 25)]
    oracle = Oracle(eviction, kv_heads)
    want = oracle.read(ids, stops, padding)
    got, cache = in_pieces(evicting(eviction, kv_heads, attn_implementation=attention), ids, stops, padding)
    real = padding.bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-6, rtol=1e-6)
    for layer, of_layer in zip(cache.layers, oracle.kept, strict=True):
        held = layer.positions if layer.positions.shape[-1] else torch.empty(batch, kv_heads, 0)
        for b in range(batch):
            for g in range(kv_heads):
                known = padding[b].bool()
                mine = [j for j in held[b, g].tolist() if known[j]]  # which padding is held is of no account
                assert mine == [j for j in of_layer[b][g].tokens if known[j]]
    assert cache.get_seq_length() == 25
    assert cache.get_mask_sizes(2, 1) == (27, 0)


@pytest.mark.parametrize("p", [EvictKeys("h2o", 6), EvictKeys("snapkv", 7, recent=3, pool=3)])
def test_a_text_is_continued_alike_beside_longer_ones(p: EvictKeys) -> None:
    ids, padding = tokens(3, 14), torch.ones(3, 14, dtype=torch.long)
    for row, padded in enumerate((0, 7, 4)):
        padding[row, :padded] = 0
    made = attnopt.convert(decoder(), p, ids)
    together = made.generate(ids, attention_mask=padding, max_new_tokens=12, **GREEDY)
    for row, padded in enumerate((0, 7, 4)):
        own = ids[row : row + 1, padded:]
        alone = made.generate(own, attention_mask=torch.ones_like(own), max_new_tokens=12, **GREEDY)
        assert alone[0].tolist() == together[row, padded:].tolist()


# ------------------------------------------------------------ generation
@pytest.mark.parametrize(
    "p",
    [
        EvictKeys("h2o", 9),
        pytest.param(EvictKeys("h2o", 5, recent=1), marks=pytest.mark.slow),
        EvictKeys("snapkv", 8, recent=3, pool=3),
    ],
)
def test_generated_text_is_that_of_the_oracle(p: EvictKeys) -> None:
    ids = tokens(2, 19)
    made = attnopt.convert(decoder(), p, ids)
    text = made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, **GREEDY)
    eviction = made.model.layers[0].self_attn.attnopt_eviction
    logits = Oracle(eviction, 2).read(text, [19, *range(20, 35)])
    assert torch.equal(logits[:, 18:-1].argmax(-1), text[:, 19:])
    whole = decoder().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, **GREEDY)
    assert not torch.equal(whole, text)


@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_a_budget_of_all_tokens_changes_nothing(method: str) -> None:
    ids = tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 15, **GREEDY, "return_dict_in_generate": True}
    want = decoder().generate(ids, output_logits=True, **options)
    # h2o: the last of 34 tokens is only written; snapkv: the prompt counts
    for budget, same in ((33 if method == "h2o" else 19, True), (8, False)):
        made = evicting(Eviction(method, budget, 4, 1 if method == "h2o" else 3))
        got = made.generate(ids, output_logits=True, **options)
        equal = torch.equal(got.sequences, want.sequences)
        assert equal == same
        if same:
            torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-9, rtol=0)


def test_memory_is_bounded_by_the_budget() -> None:
    ids, of_key = tokens(1, 200), 2 * 8 * 8  # bytes of a key and a value
    for stops in ([200], list(range(1, 201)), [120, 121, 200]):
        _, cache = in_pieces(evicting(Eviction("h2o", 12, 6)), ids, stops)
        for layer in cache.layers:
            assert layer.keys.shape == layer.values.shape == (1, 2, 11, 8)
            assert sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values)) == 2 * 11 * of_key
            assert sum(t.untyped_storage().nbytes() for t in (layer.positions, layer.received)) == 2 * 11 * 16
    _, cache = in_pieces(evicting(Eviction("snapkv", 12, 4, 3)), ids, [150, *range(151, 161)])
    for layer in cache.layers:
        assert sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values)) == 2 * (12 + 10) * of_key
        assert layer.received is None


def test_beams_and_sampled_texts_follow_their_tokens() -> None:
    made, ids = evicting(Eviction("h2o", 9, 4)), tokens(3, 30)
    want, _ = in_pieces(made, ids, [20, *range(21, 31)])
    _, cache = in_pieces(made, ids, [20, 21])
    before = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([4, 1, 2, 5, 3, 0]))
    cache.batch_select_indices(torch.tensor([0, 5, 3]))
    for layer, old in zip(cache.layers, before.layers, strict=True):
        for now, was in ((layer.keys, old.keys), (layer.positions, old.positions), (layer.received, old.received)):
            assert torch.equal(now, was[[2, 0, 2]])
    got, _ = in_pieces(made, ids[[2, 0, 2], 21:], list(range(1, 10)), cache=cache)
    torch.testing.assert_close(got, want[[2, 0, 2], 21:], atol=1e-9, rtol=0)
    text = made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, num_beams=3, **GREEDY)
    assert text.shape == (3, 39)


def test_a_cache_is_copied_and_used_again() -> None:
    made, ids = evicting(Eviction("h2o", 9, 4)), tokens(1, 30)
    want, _ = in_pieces(made, ids, [20, *range(21, 31)])
    _, cache = in_pieces(made, ids, [20])
    for other in (copy.deepcopy(cache), cache):
        got, _ = in_pieces(made, ids[:, 20:], list(range(1, 11)), cache=other)
        torch.testing.assert_close(got, want[:, 20:], atol=1e-9, rtol=0)
    cache.reset()
    got, _ = in_pieces(made, ids, [20, *range(21, 31)], cache=cache)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


def test_long_prompts_vote_in_runs_of_queries() -> None:
    """More queries than are computed at a time."""
    ids, eviction = tokens(1, 301), Eviction("h2o", 40, 10)
    want = Oracle(eviction, 4, layers=(1,)).read(ids, [299, 300, 301])
    got, cache = in_pieces(evicting(eviction, 4, layers=(1,)), ids, [299, 300, 301])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "EvictingLayer"]


# ------------------------------------------------------------ the attention function itself
@settings(max_examples=30, deadline=None)
@given(
    softcap=st.none() | st.just(2.0),
    s_aux=st.booleans(),
    mask=st.sampled_from([None, "bool", "float", "by head"]),
    windows=st.booleans(),
    new=st.sampled_from([1, 3]),
    seed=st.integers(0, 9),
)
def test_scores_of_each_head_stay_its_own(
    softcap: float | None, s_aux: bool, mask: str | None, windows: bool, new: int, seed: int
) -> None:
    """Two calls of the function over a layer, written out over dense scores; attention received is a sum of the same."""
    torch.manual_seed(seed)
    H, G, D, S, budget, recent = 4, 2, 8, 20, 9, 4
    pattern = Causal() & PerHead({(0, 1): Window(14, 0), 2: Window(12, 0) | Sinks(1)}) if windows else Causal()
    module: Any = SimpleNamespace(attnopt_pattern=pattern, num_key_value_groups=2, is_causal=True)
    k, v, q = (torch.randn(2, n, S, D, dtype=torch.float64) for n in (G, G, H))
    logit = torch.randn(H, dtype=torch.float64) if s_aux else None
    shown = torch.rand(2, H if mask == "by head" else 1, S, S) > 0.2
    shown |= torch.eye(S, dtype=torch.bool)
    given_mask = None if mask is None else shown
    if mask == "float":
        low = torch.finfo(torch.float64).min
        given_mask = torch.zeros(shown.shape, dtype=torch.float64).masked_fill(~shown, low)
    layer, made = EvictingLayer(Eviction("h2o", budget, recent)), []
    for start, stop in ((0, S - new), (S - new, S)):
        keys, values = layer.update(k[:, :, start:stop], v[:, :, start:stop])
        out, _ = attend(
            module, q[:, :, start:stop], keys, values,
            None if given_mask is None else given_mask[:, :, start:stop, :stop], softcap=softcap, s_aux=logit,
        )  # fmt: skip
        made.append(out)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / D**0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    i, j = torch.arange(S)[:, None], torch.arange(S)
    causal = j <= i
    each = [causal] * 4
    if windows:
        each = [causal & (i - j <= 14)] * 2 + [causal & ((i - j <= 12) | (j < 1)), causal]
    seen = torch.stack(each).expand(2, H, S, S) & (shown if mask is not None else True)

    def weights(seen: Tensor) -> Tensor:
        s = scores.masked_fill(~seen, -torch.inf)
        if logit is not None:
            s = torch.cat([s, logit.view(1, -1, 1, 1).expand(2, H, S, 1)], -1)
        return s.softmax(-1)[..., :S]

    first = S - new
    received = weights(seen)[:, :, :first, :first].sum(2).unflatten(1, (G, 2)).sum(2)
    heavy = received[..., : first - (recent - 1)].topk(budget - recent).indices
    held = torch.zeros(2, G, S, dtype=torch.bool).scatter(-1, heavy, True)
    held[..., first - (recent - 1) :] = True
    later = seen.clone()
    later[:, :, first:] &= held.repeat_interleave(2, 1).unsqueeze(2)
    want = weights(later) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(torch.cat(made, 1), want.transpose(1, 2), atol=1e-9, rtol=1e-9)


def test_a_class_that_computes_with_cached_keys_is_refused() -> None:
    layer = EvictingLayer(Eviction("h2o", 4, 2))
    module: Any = SimpleNamespace(is_causal=True)
    k = torch.randn(1, 2, 6, 8)
    keys, values = layer.update(k, k)
    attend(module, k, 2 * keys, values, None)
    with pytest.raises(AttnoptError, match="computes with cached keys"):
        layer.update(k, k)


def test_a_bias_by_position_is_refused() -> None:
    layer = EvictingLayer(Eviction("h2o", 4, 2))
    k = torch.randn(1, 2, 6, 8)
    module: Any = SimpleNamespace(is_causal=True)
    with pytest.raises(ConversionError, match="bias by position"):
        attend(module, k, *layer.update(k, k), None, position_bias=torch.randn(1, 2, 6, 6))


# ------------------------------------------------------------ what a cache refuses
def test_tokens_cannot_be_taken_back() -> None:
    made, ids = evicting(Eviction("h2o", 6, 3)), tokens(1, 12)
    _, cache = in_pieces(made, ids, [12])
    cache.crop(0)
    with pytest.raises(RuntimeError, match="cannot use an assistant model"):
        cache.crop(-1)
    with pytest.raises(RuntimeError, match="cannot use an assistant model"):
        made.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=decoder(4), max_new_tokens=20, **GREEDY)


def test_a_cache_that_another_model_filled_is_refused() -> None:
    made, ids = evicting(Eviction("h2o", 6, 3)), tokens(1, 12)
    _, cache = in_pieces(decoder(), ids, [12])
    with pytest.raises(AttnoptError, match="already holds tokens"):
        in_pieces(made, ids, [1], cache=cache)
    with pytest.raises(AttnoptError, match="StaticLayer"):
        made(ids, past_key_values=transformers.StaticCache(config=made.config, max_cache_len=32))


def test_a_sliding_window_of_the_class_is_refused() -> None:
    options = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, "num_hidden_layers": 2}
    config = transformers.Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_attention_heads=4, **options
    )
    with pytest.raises(AttnoptError, match="has its own sliding window"):
        attnopt.convert(transformers.Gemma2ForCausalLM(config).eval(), EvictKeys("h2o", 6), tokens(1, 12))


# ------------------------------------------------------------ the pass
@pytest.mark.slow  # generates with a whole model several times
def test_sinks_and_a_window_are_a_pattern(tmp_path: Path) -> None:
    model, ids = decoder(), tokens(1, 30)
    fast = attnopt.optimize(model, EvictKeys("sinks", 8, sinks=2), (ids,), {"use_cache": False})
    assert [str(site.spec.pattern) for site in fast.sites] == ["Causal() & (Window(left=5, right=0) | Sinks(2))"] * 2
    assert (fast.sites[0].spec.pattern.mask(30, 30).sum(-1) <= 8).all()
    same = attnopt.optimize(model, LocalWindow(left=5, sinks=2), (ids,), {"use_cache": False})
    with torch.no_grad():
        assert torch.equal(fast(ids, use_cache=False)[0], same(ids, use_cache=False)[0])
    made = attnopt.convert(model, EvictKeys("sinks", 8, sinks=2), ids)
    _, cache = in_pieces(made, ids, list(range(1, 31)))
    assert [layer.keys.shape[2] for layer in cache.layers] == [8, 8]


@pytest.mark.parametrize(
    ("budget", "sinks", "pattern"),
    [
        (9, None, "Causal() & (Window(left=4, right=0) | Sinks(4))"),
        (3, None, "Causal() & (Window(left=0, right=0) | Sinks(2))"),
        (1, None, "Causal() & Window(left=0, right=0)"),
        (3, 0, "Causal() & Window(left=2, right=0)"),
    ],
)
def test_how_many_sinks_a_budget_holds(budget: int, sinks: int | None, pattern: str) -> None:
    spec = replace(AttentionSpec.of(4, 2, 8, 8, scale=0.3), pattern=Causal())
    assert str(EvictKeys("sinks", budget, sinks).rewrite(Site("attention", spec, {})).spec.pattern) == pattern


@pytest.mark.parametrize(
    ("p", "eviction"),
    [
        (EvictKeys("h2o", 9), Eviction("h2o", 9, 5)),
        (EvictKeys("h2o", 1), Eviction("h2o", 1, 1)),
        (EvictKeys("h2o", 9, recent=9), Eviction("h2o", 9, 9)),
        (EvictKeys("snapkv", 100), Eviction("snapkv", 100, 32, 7)),
        (EvictKeys("snapkv", 10), Eviction("snapkv", 10, 5, 7)),
        (EvictKeys("snapkv", 10, recent=3, pool=1), Eviction("snapkv", 10, 3, 1)),
    ],
)
def test_the_defaults_of_each_method(p: EvictKeys, eviction: Eviction) -> None:
    spec = replace(AttentionSpec.of(4, 2, 8, 8, scale=0.3), pattern=Causal())
    assert p.rewrite(Site("attention", spec, {})).spec.eviction == eviction


def test_one_layer_of_two() -> None:
    made = attnopt.convert(decoder(), {"*layers.1*": EvictKeys("snapkv", 9)}, tokens(1, 12))
    assert made.model.layers[1].self_attn.attnopt_eviction == Eviction("snapkv", 9, 5, 7)
    assert not hasattr(made.model.layers[0].self_attn, "attnopt_eviction")
    first, second = made.attnopt_report.sites
    assert "cache evicted by snapkv (budget=9, recent=5, pool=7)" in second.spec_after
    assert "evicted" not in first.spec_after
    assert any("acts only while the model decodes from a cache" in note for note in second.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("h2o", 0), "evict-keys: invalid value budget=0: expected an integer from 1"),
        (("h2o", -3), "evict-keys: invalid value budget=-3: expected an integer from 1"),
        (("sinks", 0), "evict-keys: invalid value budget=0: expected an integer from 1"),
        (("h20", 4), "evict-keys: invalid value method='h20': expected one of 'sinks', 'h2o', 'snapkv'"),
        (("sinks", 4, 4), "evict-keys: 4 sinks leave no room for the query's own key in budget=4"),
        (("h2o", 4, 1), 'evict-keys: method="h2o" has no option sinks'),
        (("sinks", 4, None, 1), 'evict-keys: method="sinks" has no option recent'),
        (("h2o", 4, None, None, 3), 'evict-keys: method="h2o" has no option pool'),
        (("h2o", 4, None, 5), "evict-keys: recent=5 exceeds budget=4"),
        (("h2o", 4, None, 0), "evict-keys: invalid value recent=0"),
        (("snapkv", 4, None, None, 2), "evict-keys: invalid value pool=2: expected an odd number of keys"),
    ],
)
def test_wrong_options(options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PolicyError) as e:
        EvictKeys(*options)
    assert str(e.value).startswith(message)


def test_a_graph_cannot_evict() -> None:
    ids = tokens(1, 12)
    fast = attnopt.optimize(decoder(), [LocalWindow(5), EvictKeys("h2o", 4)], (ids,), {"use_cache": False})
    assert str(fast.report.sites[0].refusals["evict-keys"]).startswith(
        "[needs-cache] expected a model that decodes from the cache of its class, found a graph, for a cache evicted by "
        "h2o (budget=4, recent=2)"
    )
    assert 'method="sinks"' in fast.report.sites[0].refusals["evict-keys"].hint
    assert fast.report.sites[0].passes == ("local-window",)
    assert fast.sites[0].spec.eviction is None
    with pytest.raises(RewriteError, match="needs-cache"):
        attnopt.optimize(decoder(), EvictKeys("snapkv", 4), (ids,), {"use_cache": False}, strict=True)


def test_a_converted_model_is_captured_without_its_cache() -> None:
    ids, made = tokens(1, 12), evicting(Eviction("h2o", 6, 3))
    fast = attnopt.optimize(made, "fuse", (ids,), {"use_cache": False})
    with torch.no_grad():
        torch.testing.assert_close(fast(ids, use_cache=False)[0], made(ids, use_cache=False)[0], atol=1e-9, rtol=0)
    with pytest.raises(AttnoptError, match="a captured graph cannot evict keys"):
        attnopt.optimize(made, "fuse", (ids,))


def test_an_encoder_has_nothing_to_evict() -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=1
    )
    with pytest.warns(AttnoptWarning, match="needs-causal"):
        fast = attnopt.optimize(transformers.BertModel(config).eval(), EvictKeys("sinks", 4), (tokens(1, 12),))
    assert str(fast.report.sites[0].refusals["evict-keys"]).startswith(
        "[needs-causal] expected queries that see no later keys, found Full()"
    )


def test_one_method_for_a_site() -> None:
    both = [EvictKeys("h2o", 9), EvictKeys("snapkv", 9)]
    made = attnopt.convert(decoder(), both, tokens(1, 12))
    assert str(made.attnopt_report.sites[0].refusals["evict-keys"]).startswith(
        "[already-evicting] expected a cache without eviction, found cache evicted by h2o (budget=9, recent=5)"
    )
    assert made.model.layers[0].self_attn.attnopt_eviction.method == "h2o"


def test_a_model_without_its_cache_is_refused() -> None:
    ids = tokens(1, 12)
    embedded = decoder().model.embed_tokens(ids).detach()
    with pytest.raises(ConversionError, match="does not decode from a cache on the example inputs"):
        attnopt.convert(decoder(), EvictKeys("h2o", 9), kwargs={"inputs_embeds": embedded})


@pytest.mark.slow
def test_it_goes_with_fewer_heads_and_with_patterns() -> None:
    ids = tokens(1, 30)
    made = attnopt.convert(
        decoder(4), [PruneHeads(heads=[1, 2]), LocalWindow(left=20, heads=[0]), EvictKeys("h2o", 8)], ids
    )
    _, cache = in_pieces(made, ids, [25, *range(26, 31)])
    assert cache.layers[0].keys.shape == (1, 2, 7, 8)
    wide = attnopt.convert(
        decoder(4), [PruneHeads(heads=[1, 2]), LocalWindow(left=20, heads=[0]), EvictKeys("h2o", 30)], ids
    )
    plain = attnopt.convert(decoder(4), [PruneHeads(heads=[1, 2]), LocalWindow(left=20, heads=[0])], ids)
    got, want = (in_pieces(m, ids, [25, *range(26, 31)])[0] for m in (wide, plain))
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


def test_a_checkpoint_gets_its_eviction_back(tmp_path: Path) -> None:
    ids = tokens(1, 20)
    made = attnopt.convert(decoder(), {"*layers.0*": EvictKeys("snapkv", 7, recent=2, pool=3)}, ids)
    made.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    attnopt.apply_patterns(loaded)
    want, _ = in_pieces(made, ids, [15, *range(16, 21)])
    for other in (loaded, copy.deepcopy(made)):
        got, cache = in_pieces(other, ids, [15, *range(16, 21)])
        torch.testing.assert_close(
            got, want, atol=1e-12, rtol=0
        )  # products round otherwise where weights lie otherwise
        assert [type(layer).__name__ for layer in cache.layers] == ["EvictingLayer", "DynamicLayer"]
