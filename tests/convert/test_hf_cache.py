"""Patterns through transformers' attention interface, with caches that keep only what can still be seen."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import attnopt
from attnopt.errors import AttnoptError, ConversionError
from attnopt.patterns import Causal, Dilated, Full, Global, Sinks, Strided, Window
from attnopt.patterns.algebra import Pattern
from attnopt.patterns.lookback import Past
from attnopt.patterns.per_head import PerHead

transformers = pytest.importorskip("transformers")

from attnopt.conversion.hf_cache import RollingLayer  # noqa: E402  (it imports transformers)

PATTERN = Causal() & (Window(15, 0) | Sinks(3))


def model(pattern: Pattern | None = PATTERN, kv_heads: int = 2, **options: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        **options,
    )
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(6 if p.dim() == 2 else 1)
    if pattern is not None:
        attnopt.apply_patterns(made, {f"model.layers.{n}.self_attn": pattern for n in (0, 2)})
    return made


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def in_pieces(made: Any, ids: Tensor, stops: list[int], mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Logits when the text is read up to each stop, from the cache that the model makes."""
    cache, start, pieces = transformers.DynamicCache(config=made.config), 0, []
    with torch.no_grad():
        for stop in stops:
            part = None if mask is None else mask[:, :stop]
            pieces.append(made(ids[:, start:stop], attention_mask=part, past_key_values=cache).logits)
            start = stop
    return torch.cat(pieces, 1), cache


@pytest.mark.parametrize(
    ("pattern", "past"),
    [
        (Causal(), None),
        (Window(5, 0), Past(0, 5)),
        (Window(5, 2), Past(0, 5)),
        (Causal() & Window(5, 2), Past(0, 5)),
        (Causal() & (Window(5, 0) | Sinks(4)), Past(4, 5)),
        (Causal() & (Dilated(3, 0, 4) | Sinks(1)), Past(1, 12)),
        (Causal() & PerHead({0: Window(3, 0)}, default=Sinks(2)), Past(2, 3)),
        (Causal() & PerHead({0: Window(3, 0)}), None),
        (Causal() & Strided(4), None),
        (Causal() & (Window(2, 0) | Global((0,))), None),
        (Full(), None),
    ],
)
def test_how_much_of_the_past_a_pattern_sees(pattern: Pattern, past: Past | None) -> None:
    assert pattern.look_back == past


@pytest.mark.parametrize(
    "pattern",
    [
        Causal() & (Window(5, 0) | Sinks(4)),
        Causal() & (Dilated(3, 0, 4) | Sinks(2)),
        Causal() & (Window(5, 0) | Sinks(3)) & (Window(2, 1) | Sinks(1)),
        Causal() & PerHead({0: Window(3, 0), 1: Dilated(2, 0, 3) | Sinks(2)}, default=Sinks(4) | Window(1, 0)),
        Window(3, 0),
        Causal() & Window(6, 0) & Sinks(2),
    ],
)
@pytest.mark.parametrize("new", [1, 4])
def test_a_pattern_means_the_same_on_what_is_left(pattern: Pattern, new: int) -> None:
    past = pattern.look_back
    assert past is not None
    for length in range(new, 60):
        whole = pattern.mask(new, length, num_heads=3)
        earlier = length - new
        kept = [j for j in range(earlier) if j < past.sinks or j >= earlier - past.recent]
        left = pattern.mask(new, len(kept) + new, num_heads=3)
        assert torch.equal(left, whole[..., [*kept, *range(earlier, length)]])
        dropped = [j for j in range(earlier) if j not in kept]
        assert not whole[..., dropped].any()


def test_reading_thousands_of_tokens_in_pieces() -> None:
    made, ids = model(), tokens(1, 2048)
    with torch.no_grad():
        whole = made(ids, use_cache=False).logits
    got, cache = in_pieces(made, ids, [100, 101, 700, *range(701, 1200), 2048])
    assert (got - whole).abs().max() < 1e-4 * whole.abs().max()
    assert torch.equal(got.argmax(-1), whole.argmax(-1))
    assert [type(layer).__name__ for layer in cache.layers] == ["RollingLayer", "DynamicLayer", "RollingLayer"]
    assert [layer.keys.shape[2] for layer in cache.layers] == [18 + 64, 2048, 18 + 64]
    assert cache.layers[0].keys.untyped_storage().nbytes() == 2 * 82 * 8 * 4  # a copy, which keeps nothing else alive
    assert cache.get_seq_length() == 2048


def test_it_is_a_full_cache_with_the_pattern_as_a_mask() -> None:
    """Against the plain model and a mask made by hand."""
    made, plain, ids = model(), model(None), tokens(2, 60)
    mask = torch.zeros(1, 1, 60, 60).masked_fill(~PATTERN.mask(60, 60), float("-inf"))
    causal = torch.zeros(1, 1, 60, 60).masked_fill(~Causal().mask(60, 60), float("-inf"))
    for n, layer in enumerate(plain.model.layers):
        own = causal if n == 1 else mask

        def restricted(module: Any, args: Any, kwargs: Any, own: Tensor = own) -> tuple[Any, Any]:
            return args, {**kwargs, "attention_mask": own}

        layer.self_attn.register_forward_pre_hook(restricted, with_kwargs=True)
    with torch.no_grad():
        want = plain(ids, use_cache=False).logits
    got, _ = in_pieces(made, ids, [7, 30, *range(31, 61)])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_padding_on_either_side() -> None:
    made, ids = model(), tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        whole = made(ids, attention_mask=mask, use_cache=False).logits
    got, _ = in_pieces(made, ids, [25, *range(26, 51)], mask)
    torch.testing.assert_close(got[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=0)


def test_beams_follow_their_tokens() -> None:
    made, ids = model(), tokens(2, 30)
    options = {"max_new_tokens": 40, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    assert torch.equal(
        made.generate(ids, attention_mask=mask, **options),
        made.generate(ids, attention_mask=mask, use_cache=False, **options),
    )


def test_an_assistant_may_have_no_patterns() -> None:
    made, helper, ids = model(), model(None), tokens(1, 30)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    alone = made.generate(ids, attention_mask=mask, **options)
    assert torch.equal(made.generate(ids, attention_mask=mask, assistant_model=helper, **options), alone)
    drafts = made.generation_config
    drafts.num_assistant_tokens, drafts.num_assistant_tokens_schedule, drafts.assistant_confidence_threshold = (
        90,
        "constant",
        0,
    )
    with pytest.raises(RuntimeError, match="cannot be one"):
        helper.generate(tokens(1, 120), assistant_model=made, **{**options, "max_new_tokens": 100})


def test_tokens_are_taken_back_only_where_they_are_known() -> None:
    layer, new = RollingLayer(Past(1, 3)), torch.randn(1, 2, 100, 4)
    layer.update(new, new)
    layer.crop(-64)
    assert torch.equal(layer.keys, new[:, :, [0, 33, 34, 35]])
    with pytest.raises(RuntimeError, match="cannot be removed"):
        layer.crop(-1)
    layer.update(new[:, :, :1], new[:, :, :1])
    layer.crop(-1)
    assert torch.equal(layer.values, new[:, :, [0, 33, 34, 35]])
    layer.activate_past_recording()
    for start in (0, 5):
        layer.update(new[:, :, start : start + 5], new[:, :, start : start + 5])
    layer.crop(-7)
    assert layer.get_seq_length() == 39
    assert torch.equal(layer.keys, new[:, :, [0, 0, 1, 2]])
    layer.reset()
    assert layer.get_seq_length() == 0


def test_training_sees_the_pattern() -> None:
    made, ids = model(attention_dropout=0.1), tokens(2, 40)
    loss = made(ids, labels=ids).loss
    loss.backward()
    plain = copy.deepcopy(made)
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)
    made.train()(ids, labels=ids).loss.backward()  # with dropout
    plain.zero_grad()
    embedded = plain.model.embed_tokens(ids).detach().requires_grad_()
    plain.train().model.layers[0].self_attn.attention_dropout = 0.0
    plain.eval()(inputs_embeds=embedded).logits[:, -1].sum().backward()
    assert embedded.grad is not None
    assert (embedded.grad != 0).any(-1).all()  # layer 1 still sees everything


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is none of the test dependencies")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what peft calls in transformers
def test_peft_goes_on_working() -> None:
    import peft

    made, ids = model(), tokens(1, 30)
    tuned = peft.get_peft_model(made, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    tuned(ids, labels=ids).loss.backward()
    out = tuned.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, return_dict_in_generate=True,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert out.past_key_values.layers[0].keys.shape[2] == 18 + 1


def test_copies_keep_their_patterns() -> None:
    made, ids = model(), tokens(1, 60)
    want, _ = in_pieces(made, ids, [58, 59, 60])
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        got, cache = in_pieces(other, ids, [58, 59, 60])
        assert torch.equal(got, want)
        assert cache.layers[0].keys.shape[2] == 18 + 1


def test_a_second_pattern_replaces_the_first() -> None:
    made = model()
    attnopt.apply_patterns(made, {"model.layers.0.self_attn": "Causal() & Window(left=4, right=0)"})
    assert made.config.attnopt_patterns == {
        "model.layers.0.self_attn": "Causal() & Window(left=4, right=0)",
        "model.layers.2.self_attn": PATTERN.to_json(),
    }
    _, cache = in_pieces(made, tokens(1, 40), [38, 39, 40])
    assert cache.layers[0].keys.shape[2] == 4 + 1


def test_patterns_that_need_the_whole_past_keep_it() -> None:
    made, ids = model(Causal() & (Strided(4) | Window(2, 0))), tokens(1, 40)
    with torch.no_grad():
        whole = made(ids, use_cache=False).logits
    got, cache = in_pieces(made, ids, [20, *range(21, 41)])
    torch.testing.assert_close(got, whole, atol=1e-4, rtol=0)
    assert cache.layers[0].keys.shape[2] == 40


def test_a_static_cache_is_refused() -> None:
    made, ids = model(), tokens(1, 10)
    with pytest.raises(AttnoptError, match="StaticLayer"):
        made(ids, past_key_values=transformers.StaticCache(config=made.config, max_cache_len=32))


def test_what_has_no_place_for_patterns() -> None:
    with pytest.raises(ConversionError, match="no patterns"):
        attnopt.apply_patterns(model(None))
    with pytest.raises(ConversionError, match="no module 'nowhere'"):
        attnopt.apply_patterns(model(None), {"nowhere": Causal()})
    with pytest.raises(ConversionError, match="not a transformers model"):
        attnopt.apply_patterns(torch.nn.Linear(2, 2), {"": Causal()})
