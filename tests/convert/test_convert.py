"""`convert`: the rewritten model is one of the user's own class that computes what `optimize`'s graph computes."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.errors import AttnoptError, AttnoptWarning, ConversionError
from attnopt.passes import GroupedQuery, LocalWindow, PoolKeys, PruneHeads, ScaleHeads

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def noisy(model: nn.Module) -> Any:
    """Weights large enough for attention to matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.dim() == 2 else 0.1))
    return model.eval()


def llama(kv_heads: int = 4, layers: int = 1) -> Any:
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": layers}, num_key_value_heads=kv_heads)
    return noisy(transformers.LlamaForCausalLM(config))


def gpt2() -> Any:
    return noisy(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=1, n_head=4)
        )
    )


def qwen3() -> Any:
    """Norms of queries and keys, and biases."""
    sizes = {**SIZES, "num_hidden_layers": 1}
    return noisy(
        transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**sizes, num_key_value_heads=4, head_dim=8, attention_bias=True)
        )
    )


def gemma2() -> Any:
    """A softcap; the first layer has its own sliding window."""
    options = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
    return noisy(transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, **options)))


def ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(3))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits  # type: ignore[no-any-return]


def generated(model: Any, tokens: Tensor, count: int, **options: Any) -> Any:
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )


def assert_decodes_as_it_reads(model: Any, count: int = 12) -> None:
    tokens = ids()
    made = generated(model, tokens, count)
    assert torch.equal(logits(model, made)[:, 11:-1].argmax(-1), made[:, 12:])


# ------------------------------------------------------------ heads
@pytest.mark.slow  # a whole model of two stacks
def test_a_table_of_relative_positions_loses_the_heads_too(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
    config = transformers.T5Config(**sizes, relative_attention_num_buckets=8, relative_attention_max_distance=20)
    model = noisy(transformers.T5EncoderModel(config))
    converted = attnopt.convert(model, PruneHeads(heads=[1]), ids())
    table = converted.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    old = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    assert torch.equal(table.weight, old.weight[:, [0, 2, 3]])
    assert table.embedding_dim == converted.config.num_heads == 3
    fast = attnopt.optimize(model, PruneHeads(heads=[1]), ids())
    with torch.no_grad():
        torch.testing.assert_close(converted(ids())[0], fast(ids())[0], atol=1e-5, rtol=0)
    converted.save_pretrained(tmp_path)
    again = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids(1, 30))[0], converted(ids(1, 30))[0])
    with pytest.raises(ConversionError, match="is shared by several attentions, which would need different weights"):
        attnopt.convert(model, {"*block.0*": PruneHeads(heads=[1]), "*block.1*": PruneHeads(heads=[2])}, ids())


@pytest.mark.slow  # converts several whole models
@pytest.mark.subprocess
def test_repeated_heads_are_folded_back_into_an_ordinary_checkpoint(tmp_path: Path) -> None:
    grouped = llama(kv_heads=2)
    repeated = llama(kv_heads=4)
    with torch.no_grad():
        for name, p in repeated.named_parameters():
            old = grouped.get_parameter(name)
            p.copy_(old if p.shape == old.shape else old.view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32))
    before = {name: p.clone() for name, p in repeated.named_parameters()}
    converted = attnopt.convert(repeated, GroupedQuery(2, merge="mean"), ids())

    assert type(converted) is type(repeated)
    assert converted.config.num_key_value_heads == 2
    assert repeated.config.num_key_value_heads == 4
    assert all(torch.equal(p, before[name]) for name, p in repeated.named_parameters())
    torch.testing.assert_close(logits(converted, ids()), logits(repeated, ids()), atol=1e-5, rtol=0)
    cache = generated(converted, ids(), 3, return_dict_in_generate=True).past_key_values
    assert cache.layers[0].keys.shape == (2, 2, 14, 8)
    assert converted.attnopt_report.count("rewritten") == 1

    converted.save_pretrained(tmp_path)
    torch.save({"ids": ids(), "logits": logits(converted, ids())}, tmp_path / "wanted.pt")
    code = f"""
import sys, torch
try:
    import torchvision
except RuntimeError:  # a CUDA build beside CPU torch
    for name in ("nms", "qnms"):
        torch.library.define("torchvision::" + name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
wanted = torch.load({str(tmp_path / "wanted.pt")!r})
assert "attnopt" not in sys.modules
assert torch.equal(model(wanted["ids"], use_cache=False).logits, wanted["logits"])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("make", "policy", "counts"),
    [
        (llama, PruneHeads(heads=[1, 2]), (2, 2)),
        (qwen3, GroupedQuery(2, merge="mean"), (4, 2)),
        (qwen3, [PruneHeads(heads=[0, 3]), ScaleHeads([0.5, 2.0])], (2, 2)),
    ],
)
def test_heads_that_the_configuration_can_tell(
    make: Callable[[], Any], policy: Any, counts: tuple[int, int], tmp_path: Path
) -> None:
    converted = attnopt.convert(make(), policy, ids())
    assert (converted.config.num_attention_heads, converted.config.num_key_value_heads) == counts
    assert_decodes_as_it_reads(converted)
    converted.save_pretrained(tmp_path)
    loaded = type(converted).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, ids()), logits(converted, ids()))


def test_query_heads_move_beside_those_that_read_the_same_keys() -> None:
    model = llama()
    policy = GroupedQuery(2, merge="mean", grouping=[0, 1, 0, 1])
    graph = attnopt.optimize(model, policy, (ids(),), {"use_cache": False})
    converted = attnopt.convert(model, policy, ids())
    torch.testing.assert_close(logits(converted, ids()), graph(ids(), use_cache=False).logits, atol=1e-4, rtol=0)


def test_fused_projections_and_counts_that_only_modules_hold() -> None:
    with pytest.warns(AttnoptWarning, match=r"from_pretrained cannot load what it saves; attnopt\.load_pretrained can"):
        converted = attnopt.convert(gpt2(), PruneHeads(heads=[2]), ids())
    attention = converted.transformer.h[0].attn
    assert attention.c_attn.weight.shape == (32, 3 * 24)
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf, attention.c_proj.nx) == (3, 24, 72, 24)
    assert_decodes_as_it_reads(converted)


def test_one_layer_of_several() -> None:
    model = llama(layers=2)
    policy = {"*layers.1.*": GroupedQuery(2, merge="mean"), "*layers.0.*": []}
    with pytest.warns(AttnoptWarning, match=r"from_pretrained cannot load what it saves; attnopt\.load_pretrained can"):
        converted = attnopt.convert(model, policy, ids())
    assert [layer.self_attn.num_key_value_groups for layer in converted.model.layers] == [1, 2]
    assert [layer.self_attn.layer_idx for layer in converted.model.layers] == [0, 1]
    cache = generated(converted, ids(), 3, return_dict_in_generate=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [4, 2]
    assert_decodes_as_it_reads(converted)


class Plain(nn.Module):
    """An attention that nobody's library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.width, self.depth = 4, 32, 4
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, L, _ = x.shape
        q, k, v = (f(x).view(B, L, self.n_head, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        o = (q @ k.mT * 8**-0.5).softmax(-1) @ v
        return self.o(o.transpose(1, 2).reshape(B, L, self.width)) / self.depth


def test_a_module_of_the_users_own() -> None:
    model, x = noisy(Plain()), torch.randn(2, 6, 32)
    converted = attnopt.convert(model, PruneHeads(heads=[1]), x)
    assert (converted.n_head, converted.width, converted.depth) == (3, 24, 4)
    assert converted.q.out_features == converted.o.in_features == 24
    graph = attnopt.optimize(model, PruneHeads(heads=[1]), x)
    torch.testing.assert_close(converted(x), graph(x), atol=1e-5, rtol=0)


# ------------------------------------------------------------ patterns
@pytest.mark.slow
def test_generation_is_that_of_the_graph_token_for_token(tmp_path: Path) -> None:
    model = llama(kv_heads=2, layers=2)
    policy = {"*": LocalWindow(left=5, sinks=2), "*layers.1.*": LocalWindow(left=3)}
    prompt = ids(batch=1)
    graph = attnopt.optimize(model, policy, (prompt,), {"use_cache": False}, dynamic_shapes="auto")
    converted = attnopt.convert(model, policy, prompt)
    tokens = prompt
    with torch.no_grad():
        for _ in range(30):
            tokens = torch.cat([tokens, graph(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    made = generated(converted, prompt, 30, return_dict_in_generate=True)
    assert torch.equal(made.sequences, tokens)
    assert [layer.keys.shape for layer in made.past_key_values.layers] == [(1, 2, 8, 8), (1, 2, 4, 8)]

    converted.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    attnopt.apply_patterns(loaded)
    assert torch.equal(logits(loaded, tokens), logits(converted, tokens))
    cache = generated(loaded, prompt, 30, return_dict_in_generate=True).past_key_values
    assert cache.layers[0].keys.shape == (1, 2, 8, 8)


@pytest.mark.slow
def test_a_converted_model_is_converted_again() -> None:
    """Its own attentions are read as they were written."""
    windowed = attnopt.convert(llama(), LocalWindow(left=4, sinks=1), ids())
    converted = attnopt.convert(windowed, GroupedQuery(2, merge="mean"), ids())
    assert converted.config.num_key_value_heads == 2
    assert converted.config.attnopt_patterns == windowed.config.attnopt_patterns
    assert_decodes_as_it_reads(converted)


def test_padding_where_masks_are_added() -> None:
    """Eager attention leaves an average to a query that sees nothing but padding."""
    model = llama()
    model.set_attn_implementation("eager")
    mask = torch.ones_like(ids())
    mask[0, :3] = 0
    given = {"input_ids": ids(), "attention_mask": mask}
    converted = attnopt.convert(model, LocalWindow(left=3, sinks=1), kwargs=given)
    assert converted.config._attn_implementation == "attnopt-eager"


def test_an_encoder_sees_both_sides() -> None:
    sizes = {**SIZES, "num_hidden_layers": 1}
    model = noisy(transformers.BertModel(transformers.BertConfig(**sizes)))
    mask = torch.ones_like(ids())
    mask[0, 9:] = 0
    converted = attnopt.convert(model, LocalWindow(2, sinks=1), (ids(), mask))
    graph = attnopt.optimize(model, LocalWindow(2, sinks=1), (ids(), mask))
    with torch.no_grad():
        got, want = converted(ids(), mask).last_hidden_state, graph(ids(), mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_softcaps_and_windows_of_the_class_itself() -> None:
    """The model decodes from layers of both kinds."""
    model = gemma2()
    converted = attnopt.convert(model, LocalWindow(2), ids())
    cache = generated(converted, ids(), 20, return_dict_in_generate=True).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [15, 3]  # the first keeps the class's own window
    assert_decodes_as_it_reads(converted, 20)
    with pytest.raises(AttnoptError, match="its own sliding window"):
        attnopt.convert(model, LocalWindow(2, sinks=1), ids())


# ------------------------------------------------------------ models that no exporter takes whole
def branching(model: Any) -> Any:
    """A branch on values in each layer, which goes one way."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Branching(LlamaMLP):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y if float(y.abs().sum()) >= 0 else y / 2

    for layer in model.model.layers:
        layer.mlp.__class__ = Branching
    return model


@pytest.mark.slow  # a whole model in parts
def test_a_model_that_no_exporter_takes_whole() -> None:
    whole = llama()
    model = branching(copy.deepcopy(whole))
    policy = [GroupedQuery(2), LocalWindow(left=3, sinks=1)]
    with pytest.raises(attnopt.CaptureError):
        attnopt.optimize(model, policy, (ids(),), {"use_cache": False})
    with pytest.warns(AttnoptWarning, match="1 of its modules were"):
        converted = attnopt.convert(model, policy, ids(), calibration=[ids(), ids() % 30 + 1])
    assert [site.name for site in converted.attnopt_report.sites] == ["model.layers.0.self_attn"]
    assert converted.config.num_key_value_heads == 2
    assert_decodes_as_it_reads(converted)
    plain = attnopt.convert(whole, policy, ids(), calibration=[ids(), ids() % 30 + 1])
    got, want = (m.model.layers[0].self_attn.k_proj.weight for m in (converted, plain))
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)  # it learns from the same calibration data


def test_a_policy_for_regions_names_one() -> None:
    with pytest.raises(attnopt.PolicyError, match="no attention is named 'decoder'"):
        attnopt.convert(branching(llama()), {"decoder": LocalWindow(2)}, ids())


@pytest.mark.slow
def test_conditions_choose_among_all_attentions_of_a_model() -> None:
    policy: Any = {attnopt.where(causal=True, layers=-1): attnopt.FirstOf(GroupedQuery(3), LocalWindow(2))}
    with pytest.raises(
        attnopt.PolicyError,
        match=r"where\(causal=True, layers=-1\) chooses among all attentions .* captured as a whole",
    ):
        attnopt.convert(branching(llama()), policy, ids())
    with pytest.warns(AttnoptWarning, match="1 of its modules were"):
        converted = attnopt.convert(branching(llama()), attnopt.FirstOf(GroupedQuery(3), LocalWindow(2)), ids())
    assert converted.attnopt_report.sites[0].passes == ("local-window",)


def test_a_cache_never_comes_into_a_captured_region() -> None:
    class Caching(nn.Module):
        """Hands its attention a cache whatever it is told, and cannot be captured whole."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = branching(llama())

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(tokens, use_cache=True).logits  # type: ignore[no-any-return]

    with pytest.raises(attnopt.CaptureError):
        attnopt.convert(Caching().eval(), GroupedQuery(2, merge="mean"), ids())


# ------------------------------------------------------------ refusals
def test_what_a_class_cannot_hold() -> None:
    model = llama(kv_heads=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ConversionError, match="1 and 2 query heads"):
        attnopt.convert(model, PruneHeads(heads=[1]), ids())
    with pytest.raises(ConversionError, match="too few to see"):
        attnopt.convert(model, LocalWindow(2), ids(length=3))
    assert not hasattr(model.config, "attnopt_patterns")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_class_without_grouped_heads() -> None:
    with pytest.raises(ConversionError, match=r"(?s)no head counts.*attnopt\.optimize"):
        attnopt.convert(gpt2(), GroupedQuery(2, merge="mean"), ids())


@pytest.mark.slow
def test_pooled_keys_are_no_ones_class() -> None:
    from zoo import deit

    model, args, _ = deit()
    with pytest.raises(ConversionError, match="pooled keys and values cannot be represented in this model class"):
        attnopt.convert(model, PoolKeys(2, (4, 4), prefix=2), args)


def test_a_pattern_needs_an_attention_interface() -> None:
    with pytest.raises(ConversionError, match="not a transformers model"):
        attnopt.convert(noisy(Plain()), LocalWindow(2), torch.randn(2, 6, 32))


def test_inputs_are_asked_for() -> None:
    with pytest.raises(attnopt.PolicyError, match="example inputs"):
        attnopt.convert(Plain(), PruneHeads(heads=[1]))
    with pytest.raises(ConversionError, match=r"expected an nn\.Module"):
        attnopt.convert("model", PruneHeads(heads=[1]), ids())  # type: ignore[type-var]
