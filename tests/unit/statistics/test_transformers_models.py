"""Statistics of transformers' models against the attentions that they return themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnopt
from attnopt import head_importance
from attnopt.statistics import Counterfactual, Distance, KeyNorm, SegmentMass, Ships, SinkMass, needle_task

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
L = 9


def llama(implementation: str) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
    }  # fmt: skip
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, attn_implementation=implementation)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module", params=["left", "right"])
def text(request: pytest.FixtureRequest) -> Any:
    ids = torch.randint(0, 50, (3, L), generator=torch.Generator().manual_seed(1))
    seen = torch.arange(L) < torch.tensor([9, 6, 4])[:, None]
    seen = (seen.flip(1) if request.param == "left" else seen).long()
    model = llama("eager")
    output = model(input_ids=ids, attention_mask=seen, output_attentions=True, use_cache=False)
    return {"input_ids": ids, "attention_mask": seen, "use_cache": False}, output, llama("sdpa")


def test_a_padded_language_model_of_shared_heads(text: Any) -> None:
    batch, output, model = text
    seen = batch["attention_mask"].bool()
    sink, reach = (head_importance(model, [batch], m) for m in (SinkMass(2), Distance()))
    spans = head_importance(model, [batch], SegmentMass((4, 6), (3, 5)))
    for layer, p_BHLS in enumerate(output.attentions):
        p = p_BHLS.double()
        first, moment, queries, between = torch.zeros(4), torch.zeros(4), 0, []
        for b in range(3):
            places = seen[b].nonzero().flatten()
            own = p[b][:, places][:, :, places]
            first = first + own[:, :, :2].sum((1, 2))
            moment = moment + (own * (places[:, None] - places).abs()).sum((1, 2))
            queries += len(places)
            if seen[b, 3:5].any():
                between += [p[b, :, i][:, [j for j in (3, 4) if seen[b, j]]].sum(-1) for i in (4, 5) if seen[b, i]]
        name = f"model.layers.{layer}.self_attn"
        assert sink[name] == pytest.approx((first / queries).tolist(), rel=1e-3)
        assert reach[name] == pytest.approx((moment / queries).tolist(), rel=1e-3)
        assert spans[name] == pytest.approx(torch.stack(between).mean(0).tolist(), rel=1e-3, abs=1e-6)


def test_keys_that_heads_share_have_one_norm(text: Any) -> None:
    batch, _, model = text
    for norms in head_importance(model, [batch], KeyNorm()).values():
        assert norms[0] == norms[1]
        assert norms[2] == norms[3]
        assert norms[0] != norms[2]


def test_ships_reads_the_logits_of_the_last_token(text: Any) -> None:
    batch, output, model = text
    seen = batch["attention_mask"].bool()
    last = L - 1 - seen.flip(1).long().argmax(1)
    want = output.logits[range(3), last].double().log_softmax(-1)
    scores = head_importance(model, [batch], Ships("zero"))["model.layers.1.self_attn"]
    eager = llama("eager")
    for h in range(4):

        def silence(_: Any, args: tuple[Tensor, ...], h: int = h) -> tuple[Tensor]:
            z = args[0].clone()
            z[..., h * 8 : h * 8 + 8] = 0.0
            return (z,)

        handle = eager.model.layers[1].self_attn.o_proj.register_forward_pre_hook(silence)
        got = eager(**batch).logits[range(3), last].double().log_softmax(-1)
        handle.remove()
        assert scores[h] == pytest.approx(float((want.exp() * (want - got)).sum(-1).mean()), rel=1e-3)


def test_a_retrieval_task_for_a_language_model() -> None:
    """Answers that the model gives anyway: a task always has some that succeed."""
    model, prompts = llama("sdpa"), torch.randint(0, 50, (6, L), generator=torch.Generator().manual_seed(3))
    answers = [model(input_ids=p[None]).logits[0, -1].argmax().reshape(1) for p in prompts]
    held = prompts.clone()
    for p, a in zip(held, answers, strict=True):
        p[2] = a
    answers = [model(input_ids=p[None]).logits[0, -1].argmax().reshape(1) for p in held]
    inside = [int(a) in p[1:4].tolist() for p, a in zip(held, answers, strict=True)]
    data, method = needle_task(list(held), [(1, 4)] * 6, answers)
    eager, hits = llama("eager"), torch.zeros(2, 4)
    for p, a, counts in zip(held, answers, inside, strict=True):
        for layer, weights in enumerate(eager(input_ids=p[None], output_attentions=True).attentions):
            top = weights[0, :, -1].argmax(-1)
            hits[layer] += counts * ((top >= 1) & (top < 4) & (p[top] == a))
    assert any(inside)
    scores = head_importance(model, [{"input_ids": x, "use_cache": False} for x in data], method)
    assert list(scores.values()) == [pytest.approx((row / sum(inside)).tolist()) for row in hits]


def test_patches_of_a_vision_transformer() -> None:
    def vit(implementation: str) -> Any:
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=12, patch_size=4,
            attn_implementation=implementation,
        )  # fmt: skip
        model = transformers.ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)
        for p in model.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
        return model

    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    scores = head_importance(vit("sdpa"), [x], "distance(grid=(3, 3), prefix=1)")
    places = torch.stack([torch.arange(9) // 3, torch.arange(9) % 3], 1).double()
    apart = (places[:, None] - places).square().sum(-1).sqrt()
    for got, p in zip(scores.values(), vit("eager")(x, output_attentions=True).attentions, strict=True):
        own = p.double()[:, :, 1:, 1:]
        assert got == pytest.approx(((own * apart).sum((0, 2, 3)) / own.sum((0, 2, 3))).tolist(), rel=1e-3)
    changed = x.clone()
    changed[:, :, :4] = 0.0
    assert min(head_importance(vit("sdpa"), [x], Counterfactual([changed], at="all"))[next(iter(scores))]) > 0


def test_the_two_sides_of_a_translator() -> None:
    """Each side has its own ids; a distance or an induction score between them is an error that names the site."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4, vocab_size=7
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    g = torch.Generator().manual_seed(0)
    ids, made = (torch.randint(0, 7, (2, n), generator=g) for n in (L, 6))
    batch = {"input_ids": ids, "decoder_input_ids": made, "use_cache": False}
    sites = {s.name: s for s in attnopt.inspect(model, (), batch).sites}
    inside = [s for s in sites.values() if not s.is_cross]
    assert len(inside) == 2
    for method in ("induction", "distance"):
        with pytest.raises(attnopt.CalibrationError) as caught:
            head_importance(model, [batch], method)
        assert caught.value.site == "decoder.block.0.layer.1.EncDecAttention"
    scores = head_importance(model, [batch], "induction", sites=inside)
    maps = eager(model)(**batch, output_attentions=True)
    for got, p, own in zip(
        scores.values(), (maps.encoder_attentions[0], maps.decoder_attentions[0]), (ids, made), strict=True
    ):
        each = []
        for b, text in enumerate(own.tolist()):
            for i in range(len(text)):
                follows = [j for j in range(1, i + 1) if text[j - 1] == text[i]]
                each += [p[b, :, i, follows].double().sum(-1)] if follows else []
        assert got == pytest.approx(torch.stack(each).mean(0).tolist(), rel=1e-3)


def test_the_last_token_is_that_of_the_decoder() -> None:
    """Beside an encoder with as many tokens, of which some are padding."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4, vocab_size=7
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(0, 7, (2, 6), generator=torch.Generator().manual_seed(0))
    seen = (torch.arange(6) < torch.tensor([6, 3])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": seen, "decoder_input_ids": ids.flip(1), "use_cache": False}
    assert dict(head_importance(model, [batch], "ships")) == dict(
        head_importance(model, [batch], "ships", behaviour=lambda output: output.logits[:, -1])
    )


def eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model
