"""Layers whose heads see unequally far back: each group of heads keeps its own tokens, and computes what a full cache would."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from in_pieces import in_pieces
from tiny_llama import tiny_llama
from torch import Tensor

import attnopt
from attnopt.errors import AttnoptError
from attnopt.passes import EvictKeys, LocalWindow
from attnopt.patterns import Causal, PerHead, Sinks, Strided, Window
from attnopt.patterns.algebra import Pattern

transformers = pytest.importorskip("transformers")

from attnopt.conversion.hf_attention import attend  # noqa: E402  (they import transformers)
from attnopt.conversion.hf_cache import RollingLayer  # noqa: E402
from attnopt.conversion.hf_cached_keys import source_of  # noqa: E402
from attnopt.conversion.hf_groups_layer import HeadGroupsLayer  # noqa: E402

SITE = "model.layers.0.self_attn"
MIXED = Causal() & PerHead({(0, 1): Window(6, 0) | Sinks(2)})  # of four heads, the last two read everything
QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # a model runs for each example: no shrinking
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
HEAD = 2 * 8 * 4  # bytes of a key and a value of one head of `tiny_llama`


def model(pattern: Pattern = MIXED, kv_heads: int = 2) -> Any:
    made = tiny_llama(kv_heads)
    attnopt.apply_patterns(made, {SITE: pattern})
    return made


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def by_hand(seen_HLS: Tensor, ids: Tensor, padding: Tensor | None, kv_heads: int) -> Tensor:
    """Logits of the model without patterns on the whole text, under a dense mask."""
    plain = tiny_llama(kv_heads)
    seen = seen_HLS[None].expand(ids.shape[0], -1, -1, -1)
    seen = seen if padding is None else seen & padding.bool()[:, None, None]

    def masked(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, {**kwargs, "attention_mask": torch.zeros(seen.shape).masked_fill(~seen, -1e30)}

    plain.model.layers[0].self_attn.register_forward_pre_hook(masked, with_kwargs=True)
    positions = None if padding is None else (padding.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return plain(ids, position_ids=positions, use_cache=False).logits  # type: ignore[no-any-return]


def seen_by(heads: Mapping[int, tuple[int, int] | None], length: int) -> Tensor:
    """[4, L, L]: heads with (window, sinks) see the last tokens, their own included, and the first; the others all."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    made = [
        (j <= i) if (own := heads.get(h)) is None else (j <= i) & ((i - j < own[0]) | (j < own[1])) for h in range(4)
    ]
    return torch.stack(made)


def stored(layer: Any) -> int:
    """The bytes that a layer of a cache keeps alive."""
    if isinstance(layer, HeadGroupsLayer):
        assert layer.keys is None
        assert layer.values is None
        return sum(map(stored, layer.layers))
    return sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values))


def own_pattern(heads: Mapping[int, tuple[int, int] | None]) -> Pattern:
    windows = {h: Window(own[0] - 1, 0) | Sinks(own[1]) for h, own in heads.items() if own is not None}
    return Causal() & PerHead(windows)


# ------------------------------------------------------------ the law
@settings(max_examples=25, deadline=None, phases=QUICK)
@given(
    heads=st.dictionaries(st.integers(0, 3), st.none() | st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1),
    kv_heads=st.sampled_from([1, 2, 4]),
    batch=st.sampled_from([1, 3]),
    stops=st.sets(st.integers(1, 30), max_size=6),
    padded=st.integers(0, 7),
    seed=st.integers(0, 3),
)
def test_logits_are_those_of_a_full_cache_under_the_mask(
    heads: dict[int, tuple[int, int] | None], kv_heads: int, batch: int, stops: set[int], padded: int, seed: int
) -> None:
    torch.manual_seed(seed)
    ids = torch.randint(1, 50, (batch, 31))
    padding = torch.ones_like(ids)
    padding[0, :padded] = 0
    want = by_hand(seen_by(heads, 31), ids, padding, kv_heads)
    got, cache = in_pieces(model(own_pattern(heads), kv_heads), ids, [*sorted(stops), 31], padding)
    real = padding.bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=1e-4)
    assert cache.get_seq_length() == 31
    assert cache.get_mask_sizes(3, 0) == (34, 0)


def test_heads_that_share_keys_and_see_unequally_far() -> None:
    """A padded text in pieces: the mask has columns for keys that the shared cache dropped."""
    heads = {0: (6, 0), 1: (10, 0), 2: (4, 2), 3: None}
    ids = tokens(2, 31)
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    want = by_hand(seen_by(heads, 31), ids, padding, 2)
    got, _ = in_pieces(model(own_pattern(heads), 2), ids, [17, 18, 19, 25, 31], padding)
    real = padding.bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=1e-4)


def test_heads_that_differ_and_see_equally_far() -> None:
    """A pattern for all heads bounds each of them, the unnamed ones too: one cache, whose mask has columns for dropped keys."""
    pattern = Causal() & PerHead({0: Window(0, 0), (1, 2): Window(0, 0) | Sinks(1)}) & (Window(1, 1) | Sinks(1))
    ids = tokens(2, 14)
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    want = by_hand(pattern.mask(14, 14, num_heads=4), ids, padding, 2)
    got, _ = in_pieces(model(pattern, 2), ids, [8, 9, 14], padding)
    real = padding.bool()
    torch.testing.assert_close(got[real], want[real], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_each_head_keeps_what_it_can_see(kv_heads: int) -> None:
    """Bytes, after 300 tokens read one by one and after a long prompt."""
    heads = {0: (7, 2), 1: (7, 2), 2: (20, 0), 3: None}
    made = model(own_pattern(heads), kv_heads)
    kept = {1: [300], 2: [2 + 6, 300], 4: [2 + 6, 2 + 6, 19, 300]}[
        kv_heads
    ]  # of each key/value head, before the newest
    now = sum(n + (n < 300) for n in kept)
    _, cache = in_pieces(made, tokens(1, 300), list(range(1, 301)))
    assert stored(cache.layers[0]) == now * HEAD
    assert stored(cache.layers[0]) < 300 * kv_heads * HEAD or kv_heads == 1
    _, cache = in_pieces(made, tokens(1, 300), [300])
    assert stored(cache.layers[0]) == sum(min(300, n + 64) for n in kept) * HEAD


def test_generated_text() -> None:
    """Greedy, sampled and with beams, with a padded batch."""
    made, ids = model(), tokens(3, 23)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for options in (
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 2, "num_return_sequences": 2},
    ):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            texts.append(
                made.generate(ids, attention_mask=mask, max_new_tokens=33, use_cache=use_cache, **{**GREEDY, **options})
            )
        assert torch.equal(*texts)
        assert texts[0].shape[1] == 23 + 33


def test_an_assistant_writes_the_same_text() -> None:
    made, ids = model(), tokens(1, 30)
    mask = torch.ones_like(ids)
    alone = made.generate(ids, attention_mask=mask, max_new_tokens=40, **GREEDY)
    helped = made.generate(ids, attention_mask=mask, max_new_tokens=40, assistant_model=tiny_llama(2), **GREEDY)
    assert torch.equal(alone, helped)


def test_chunks_of_a_prompt() -> None:
    made, ids = model(), tokens(2, 41)
    mask = torch.ones_like(ids)
    whole = made.generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY)
    assert torch.equal(
        made.generate(ids, attention_mask=mask, max_new_tokens=20, prefill_chunk_size=7, **GREEDY), whole
    )


# ------------------------------------------------------------ which layers there are
@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        (MIXED, "HeadGroupsLayer"),
        (Causal() & PerHead({0: Window(3, 0)}, default=Window(9, 0)), "HeadGroupsLayer"),
        (Causal() & PerHead({0: Window(3, 0)}, default=Window(3, 2)), "RollingLayer"),
        (Causal() & PerHead({0: Strided(2)}), "DynamicLayer"),
        (Causal() & Window(3, 0), "RollingLayer"),
    ],
)
def test_only_heads_of_unequal_reach_are_stored_apart(pattern: Pattern, kind: str) -> None:
    _, cache = in_pieces(model(pattern), tokens(1, 20), [10, 11, 20])
    assert [type(layer).__name__ for layer in cache.layers] == [kind]


def test_heads_that_share_keys_keep_the_most_of_them() -> None:
    _, cache = in_pieces(model(Causal() & PerHead({0: Window(3, 0), 3: Window(5, 0) | Sinks(1)})), tokens(1, 20), [20])
    assert [g.past for g in cache.layers[0].groups] == [None]
    pattern = Causal() & PerHead({0: Window(3, 0), 1: Window(2, 0) | Sinks(4), (2, 3): Window(5, 0)})
    _, cache = in_pieces(model(pattern), tokens(1, 20), [20])
    assert [(g.kv_heads, g.heads, g.past.sinks, g.past.recent) for g in cache.layers[0].groups] == [
        ((0,), (0, 1), 4, 3),
        ((1,), (2, 3), 0, 5),
    ]


# ------------------------------------------------------------ what is done to a cache
def test_tokens_are_taken_back_from_all_heads_or_none() -> None:
    made, ids = model(Causal() & PerHead({(2, 3): Window(6, 0) | Sinks(2)})), tokens(2, 120)  # the first heads keep all
    want, _ = in_pieces(made, ids, [100, 120])
    _, cache = in_pieces(made, ids, [100, 120])
    cache.crop(-20)
    again, _ = in_pieces(made, ids[:, 100:], [20], cache=cache)
    assert cache.get_seq_length() == 120
    torch.testing.assert_close(again, want[:, 100:], atol=1e-4, rtol=0)
    before = [layer.keys.clone() for layer in cache.layers[0].layers]
    with pytest.raises(RuntimeError, match="21 tokens cannot be removed"):
        cache.crop(-21)
    assert all(torch.equal(layer.keys, old) for layer, old in zip(cache.layers[0].layers, before, strict=True))
    with pytest.raises(ValueError, match="negative"):
        cache.crop(1)


def test_a_recorded_past_can_be_taken_back() -> None:
    made, ids = model(), tokens(1, 140)
    want, _ = in_pieces(made, ids, [30, 140])
    for early in (True, False):
        cache = transformers.DynamicCache(config=made.config)
        if not early:
            in_pieces(made, ids, [30], cache=cache)
        else:  # before the first keys, as for an assistant
            cache.layers[0] = HeadGroupsLayer()
        cache.activate_past_recording()
        if early:
            in_pieces(made, ids, [30], cache=cache)
        assert cache.is_recording_past(0)
        in_pieces(made, ids[:, 30:], [1, 50, 110], cache=cache)
        cache.crop(-110)
        cache.layers[0].record_past = False
        got, _ = in_pieces(made, ids[:, 30:], [60, 61, 110], cache=cache)
        torch.testing.assert_close(got, want[:, 30:], atol=1e-4, rtol=0)
        assert stored(cache.layers[0]) < 1.5 * 140 * HEAD


def test_the_batch_of_a_cache() -> None:
    made, ids = model(), tokens(3, 40)
    want, _ = in_pieces(made, ids, [30, 40])
    _, cache = in_pieces(made, ids, [30])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([4, 1, 2, 5, 3, 0]))
    cache.batch_select_indices(torch.tensor([0, 5, 3]))
    got, _ = in_pieces(made, ids[[2, 0, 2], 30:], [3, 10], cache=cache)
    torch.testing.assert_close(got, want[[2, 0, 2], 30:], atol=1e-4, rtol=0)


def test_a_cache_is_copied_and_used_again() -> None:
    made, ids = model(), tokens(1, 40)
    want, _ = in_pieces(made, ids, [30, 40])
    _, cache = in_pieces(made, ids, [30])
    for other in (copy.deepcopy(cache), cache):
        got, _ = in_pieces(made, ids[:, 30:], [4, 10], cache=other)
        torch.testing.assert_close(got, want[:, 30:], atol=1e-4, rtol=0)
    cache.reset()
    assert cache.get_seq_length() == 0
    got, _ = in_pieces(made, ids, [30, 40], cache=cache)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_it_is_moved_with_its_heads() -> None:
    _, cache = in_pieces(model(), tokens(1, 40), [40])
    layer = cache.layers[0]
    before = stored(layer)
    layer.offload()
    layer.prefetch()
    assert stored(layer) == before
    assert {part.keys.device.type for part in layer.layers} == {"cpu"}


# ------------------------------------------------------------ the attention function itself
@settings(max_examples=25, deadline=None)
@given(
    softcap=st.none() | st.just(2.0),
    s_aux=st.booleans(),
    bias=st.booleans(),
    mask=st.sampled_from([None, "bool", "float", "by head"]),
    new=st.sampled_from([1, 3]),
    seed=st.integers(0, 9),
)
def test_scores_of_each_head_stay_its_own(
    softcap: float | None, s_aux: bool, bias: bool, mask: str | None, new: int, seed: int
) -> None:
    torch.manual_seed(seed)
    H, G, D, S = 4, 2, 8, 20
    pattern = Causal() & PerHead({(0, 1): Window(4, 0) | Sinks(1), (2, 3): Window(9, 0)})
    module: Any = SimpleNamespace(attnopt_pattern=pattern, num_key_value_groups=2, is_causal=True)
    k, v, q = torch.randn(2, G, S, D), torch.randn(2, G, S, D), torch.randn(2, H, S, D)
    logit = torch.randn(H) if s_aux else None
    offset = torch.randn(2, H, S, S) if bias else None
    shown = torch.rand(2, H if mask == "by head" else 1, S, S) > 0.2
    shown |= torch.eye(S, dtype=torch.bool)
    given_mask = None if mask is None else shown
    if mask == "float":
        given_mask = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    layer, made = HeadGroupsLayer(), []
    for start, stop in ((0, S - new), (S - new, S)):
        keys, values = layer.update(k[:, :, start:stop], v[:, :, start:stop])
        part = (slice(None), slice(None), slice(start, stop), slice(None, stop))
        out, _ = attend(
            module, q[:, :, start:stop], keys, values,
            None if given_mask is None else given_mask[part], softcap=softcap, s_aux=logit,
            position_bias=None if offset is None else offset[part],
        )  # fmt: skip
        made.append(out)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / D**0.5
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores if offset is None else scores + offset
    i, j = torch.arange(S)[:, None], torch.arange(S)
    near, wide = (j <= i) & ((i - j <= 4) | (j < 1)), (j <= i) & (i - j <= 9)
    seen = torch.stack([near, near, wide, wide]) & (shown if mask is not None else True)
    scores = scores.masked_fill(~seen, -torch.inf)
    if logit is not None:
        scores = torch.cat([scores, logit.view(1, -1, 1, 1).expand(2, H, S, 1)], -1)
    want = scores.softmax(-1)[..., :S] @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(torch.cat(made, 1), want.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert all(isinstance(part, RollingLayer) for part in layer.layers)


def test_a_class_that_computes_with_cached_keys_keeps_all_of_them() -> None:
    """Some store latents from which they compute keys after the cache (multi-head latent attention)."""
    layer = HeadGroupsLayer()
    module: Any = SimpleNamespace(attnopt_pattern=MIXED, num_key_value_groups=1, is_causal=True)
    k, q = torch.randn(1, 4, 30, 8), torch.randn(1, 4, 30, 8)
    made = []
    for n in range(30):
        keys, values = layer.update(k[:, :, n : n + 1], k[:, :, n : n + 1])
        assert source_of(keys) is not None
        assert source_of(2 * keys) is None
        made.append(attend(module, q[:, :, n : n + 1], 2 * keys, values, None)[0])
    scores = (q @ k.transpose(-1, -2) * 2 / 8**0.5).masked_fill(~seen_by({0: (7, 2), 1: (7, 2)}, 30), -torch.inf)
    torch.testing.assert_close(torch.cat(made, 1), (scores.softmax(-1) @ k).transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert layer.keys.shape[2] == 30


def gpt2() -> tuple[Any, str]:
    config = transformers.GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=1, n_head=4)
    return transformers.GPT2LMHeadModel(config), "transformer.h.0.attn"


def gemma2() -> tuple[Any, str]:
    """A softcap; the layer before has a sliding window of its own."""
    config = transformers.Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config), "model.layers.1.self_attn"


def gpt_oss() -> tuple[Any, str]:
    """Sink logits."""
    config = transformers.GptOssConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config), "model.layers.1.self_attn"


@pytest.mark.parametrize(
    ("make", "attention"), [(gpt2, "sdpa"), (gpt2, "eager"), (gemma2, "eager"), (gpt_oss, "eager")]
)
def test_other_classes(make: Any, attention: str) -> None:
    torch.manual_seed(0)
    made, site = make()
    for p in made.eval().parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    made.set_attn_implementation(attention)
    attnopt.apply_patterns(made, {site: MIXED})
    ids = tokens(2, 40)
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    with torch.no_grad():
        positions = (padding.cumsum(-1) - 1).clamp(min=0)
        want = made(ids, attention_mask=padding, position_ids=positions, use_cache=False).logits
    got, cache = in_pieces(made, ids, [20, 21, 22, 30, *range(31, 41)], padding)
    torch.testing.assert_close(got[padding.bool()], want[padding.bool()], atol=5e-4, rtol=1e-4)
    layer = cache.layers[int(site.split(".")[-2])]
    assert sorted(part.keys.shape[2] for part in layer.layers) == [9, 40]


@pytest.mark.slow  # generates with a whole model several times
def test_a_model_that_stores_latents() -> None:
    """DeepSeek: its report promises no smaller cache, and no keys can be evicted."""
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 1,
    }  # fmt: skip
    latent = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes)).eval()
    made = attnopt.convert(latent, LocalWindow(3, heads=[0, 1]), tokens(1, 12))
    got, cache = in_pieces(made, tokens(2, 30), list(range(1, 31)))
    with torch.no_grad():
        want = made(tokens(2, 30), use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert cache.layers[0].keys.shape[2] == 30
    assert not any("cache" in note for note in made.attnopt_report.sites[0].notes)
    with pytest.raises(AttnoptError, match="computes with cached keys"):
        attnopt.convert(latent, EvictKeys("h2o", 5), tokens(1, 12))


def test_keys_that_are_changed_later_on_are_seen() -> None:
    """Keys of which some are dropped must arrive as they left the cache: otherwise, NaN."""
    layer = HeadGroupsLayer()
    module: Any = SimpleNamespace(attnopt_pattern=MIXED, num_key_value_groups=1, is_causal=True)
    k = torch.randn(1, 4, 9, 8)
    keys, values = layer.update(k, k)
    attend(module, k, keys, values, None)
    keys, values = layer.update(k[:, :, :1], k[:, :, :1])
    assert keys.shape == values.shape == (1, 4, 10, 8)
    out, _ = attend(module, k[:, :, :1], keys + 0, values, None)
    assert out.isnan().all()


def test_a_captured_graph_fills_such_a_cache() -> None:
    made, ids = model(), tokens(1, 12)
    fast = attnopt.optimize(made, "fuse", (ids,))
    out = fast(ids)
    assert isinstance(out.past_key_values.layers[0], HeadGroupsLayer)
    want, _ = in_pieces(made, ids, [12])
    torch.testing.assert_close(out.logits, want, atol=1e-4, rtol=0)


@pytest.mark.slow  # compiles with inductor
@pytest.mark.filterwarnings("ignore")  # of torch.compile, about what it does not compile
def test_a_compiled_model() -> None:
    made, ids = model(), tokens(1, 16)
    want, _ = in_pieces(made, ids, [16])
    compiled = torch.compile(made, backend="eager")
    got, cache = in_pieces(compiled, ids, [8, 9, 10, 16])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert cache.layers[0].layers[0].keys.shape[2] < 16 + 1


# ------------------------------------------------------------ convert
@pytest.mark.slow  # generates with a whole model several times
def test_a_converted_model_says_what_its_cache_keeps() -> None:
    made = attnopt.convert(tiny_llama(2), LocalWindow(left=5, sinks=2, heads=[2, 3]), tokens(1, 12))
    notes = made.attnopt_report.sites[0].notes
    assert (
        "its cache keeps all tokens of key/value head 0; the first 2 and the last 5 tokens of key/value head 1" in notes
    )
    ids = tokens(1, 70)
    want = by_hand(seen_by({2: (6, 2), 3: (6, 2)}, 70), ids, None, 2)
    got, cache = in_pieces(made, ids, [40, *range(41, 71)])
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    assert stored(cache.layers[0]) == (70 + 8) * HEAD
    made = attnopt.convert(tiny_llama(2), LocalWindow(left=5), tokens(1, 12))
    assert "its cache keeps the last 5 tokens" in made.attnopt_report.sites[0].notes
    made = attnopt.convert(tiny_llama(2), "sparse(Strided(3))", tokens(1, 12))
    assert not any("cache" in note for note in made.attnopt_report.sites[0].notes)
