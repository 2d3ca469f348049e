"""Language models with a cache in ONNX: onnxruntime-genai has to generate what the model itself would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from tiny_decoder import END, VOCABULARY, Layer, decoder, inputs

import attnopt
from attnopt.onnx.export.deviation import BOUNDS, Deviation
from attnopt.passes import AddValues, LocalWindow, PruneHeads, Steer
from attnopt.patterns import Window


def optimized(policy: Any = "fuse", dynamic: Any = "auto", **options: Any) -> attnopt.OptimizedModel:
    model = decoder(**options)
    x = inputs(torch.randint(0, VOCABULARY, (2, 12)))
    return attnopt.optimize(model, policy, (), x, dynamic_shapes=dynamic, backend="sdpa")


@pytest.fixture(scope="module")
def fast() -> attnopt.OptimizedModel:
    return optimized()


def generated(folder: Path, prompts: list[list[int]], length: int) -> list[list[int]]:
    """Tokens of onnxruntime-genai, greedy."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, do_sample=False, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompts if len(prompts) > 1 else prompts[0])
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(i) for i in generator.get_sequence(row)] for row in range(len(prompts))]


def greedy(model: Any, prompt: list[int], length: int) -> list[int]:
    """The same from whole sequences, without a cache."""
    ids = list(prompt)
    while len(ids) < length:
        with torch.no_grad():
            ids.append(int(model(**inputs(torch.tensor([ids])))[0, -1].argmax()))
    return ids


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    ["fuse", {"*": "fuse", "*1*": LocalWindow(2, 0)}, PruneHeads(heads=(0,))],
    ids=["fuse", "a window in one layer", "pruned unevenly"],
)
def test_a_policy_generates_what_it_means(policy: Any, tmp_path: Path) -> None:
    fast = optimized(policy)
    fast.export_decoder(tmp_path / "m", context_length=32, eos_token_id=END)
    prompts = [[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]]
    wanted = [greedy(fast, prompt, 24) for prompt in prompts]
    assert wanted[0][7:] != wanted[1][7:]
    assert generated(tmp_path / "m", prompts, 24) == wanted
    assert generated(tmp_path / "m", prompts[:1], 24) == wanted[:1]


@pytest.mark.parametrize(("how", "operator"), [("int8", "MatMulInteger"), ("int4", "MatMulNBits")])
def test_weights_are_quantized(fast: attnopt.OptimizedModel, how: Any, operator: str, tmp_path: Path) -> None:
    """The export compares its logits with those of the model, prompt and steps."""
    done = fast.export_decoder(tmp_path / "m", context_length=32, eos_token_id=END, quantize=how)
    assert done is not None
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["genai_config.json", "model.onnx"]
    nodes = [n.op_type for n in onnx.load(tmp_path / "m" / "model.onnx").graph.node]
    assert nodes.count(operator) == done.products == 9
    assert nodes.count("GroupQueryAttention") == 2
    assert done.sizes == 4  # a prompt and three tokens
    assert 0.9 < (done.cosine or 0) < 0.99999


def test_a_quantization_that_loses_too_much(
    fast: attnopt.OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BOUNDS, "int4", Deviation(0.9999, 0.001))
    with pytest.raises(
        attnopt.ExportError, match=r"output 'linear_8' .* cosine of .* for a prompt, so nothing was written"
    ) as caught:
        fast.export_decoder(tmp_path / "m", context_length=32, eos_token_id=END, quantize="int4")
    assert caught.value.hint == 'use quantize="int8", or leave quantize out'
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_token_can_be_steered_and_none_of_them_alone(tmp_path: Path) -> None:
    by = torch.linspace(-2, 2, 8)
    fast = optimized(Steer(by, [1]))
    fast.export_decoder(tmp_path / "m", context_length=32, eos_token_id=END)  # which verifies it token by token
    for policy in (Steer(by, [1], [-1]), Steer(by, [1], [11]), AddValues([0], 0.5)):
        with pytest.raises(attnopt.ExportError, match="depends on the positions of tokens") as caught:
            optimized({"*": "fuse", "*1*": policy}).export_decoder(tmp_path / "n", context_length=32, eos_token_id=END)
        assert caught.value.site == "layers.1"
        assert not (tmp_path / "n").exists()


@pytest.mark.slow
def test_a_model_of_transformers_with_its_tokenizer(tmp_path: Path) -> None:
    """Text to tokens and on to new tokens, as ``generate`` does it."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<unk>", "<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(["the sea, the sea, and the wind over the sea"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=290,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 3
    ids = tokenizer("the wind over the sea", return_tensors="pt").input_ids
    x: dict[str, Any] = inputs(ids.expand(2, -1))
    fast = attnopt.optimize(model, "fuse", (), x | {"use_cache": False}, dynamic_shapes="auto")
    fast.export_decoder(tmp_path / "m", context_length=64, eos_token_id=1, tokenizer=tokenizer)
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")
    encoded = genai.Tokenizer(genai.Model(str(tmp_path / "m"))).encode("the wind over the sea")
    assert [int(i) for i in encoded] == ids[0].tolist()
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=40, do_sample=False, pad_token_id=1)
    assert len(wanted[0]) > ids.shape[1] + 5
    (made,) = generated(tmp_path / "m", [ids[0].tolist()], 40)
    assert made == wanted[0, : len(made)].tolist()
    assert wanted[0, len(made) :].tolist() in ([], [1])  # one of them writes down the end, the other does not


@pytest.mark.slow
def test_the_models_own_cache_is_no_output(tmp_path: Path) -> None:
    """A model as its owner calls it returns keys and values of all heads: the file has its own cache, of the heads that stay."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    x: dict[str, Any] = inputs(torch.randint(0, 50, (2, 9)))
    fast = attnopt.optimize(LlamaForCausalLM(config).eval(), PruneHeads(heads=(1,)), (), x, dynamic_shapes="auto")
    fast.export_decoder(tmp_path / "m", context_length=32, eos_token_id=1)
    graph = onnx.load(tmp_path / "m" / "model.onnx").graph
    assert [o.name for o in graph.output] == ["logits", "present.0.key", "present.0.value"]
    sizes = [tuple(i.dims) for i in graph.initializer]
    assert (sizes.count((32, 24)), sizes.count((24, 32)), sizes.count((32, 32))) == (3, 1, 0)  # q, k, v; out


# ---------------------------------------------------------------- refusals
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "looks ahead": ({"pattern": None}, r"the pattern is Full\(\)"),
    "sinks": ({"policy": LocalWindow(3, 0, sinks=1)}, "which GroupQueryAttention does not mask"),
    "counts positions itself": ({"absolute": True}, "for a token after its prompt"),
    "mixes tokens elsewhere": ({"mixes": True}, "for a token after its prompt"),
    "fixed sizes": ({"dynamic": None}, "expected .batch, length. with both axes dynamic"),
    "left alone": ({"policy": {"*1*": "fuse"}}, "left unchanged"),
}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no end": ({"eos_token_id": "x"}, "eos_token_id='x'"),
    "no such end": ({"eos_token_id": [1, VOCABULARY]}, "outside the vocabulary of 50"),
    "no length": ({"context_length": 0}, "context_length=0"),
    "no such quantization": ({"quantize": "int2"}, "quantize='int2'"),
    "no tokenizer": ({"tokenizer": "gpt2"}, "a str is not a tokenizer"),
}


@pytest.mark.parametrize(("model", "said"), MODELS.values(), ids=MODELS)
def test_a_model_without_a_cache_is_refused(model: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(attnopt.ExportError, match=said):
        optimized(**model).export_decoder(tmp_path / "m", context_length=32, eos_token_id=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("options", "said"), OPTIONS.values(), ids=OPTIONS)
def test_wrong_options(fast: attnopt.OptimizedModel, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(attnopt.ExportError, match=said):
        fast.export_decoder(tmp_path / "m", **{"context_length": 32, "eos_token_id": 1} | options)
    assert not list(tmp_path.iterdir())


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    fast = attnopt.optimize(
        Layer(False), "fuse", (torch.randn(2, 5, 32), (torch.ones(5, 8),) * 2, torch.ones(5, 5) > 0)
    )
    with pytest.raises(attnopt.ExportError, match="a decoder takes input_ids"):
        fast.export_decoder(tmp_path / "m", context_length=32, eos_token_id=1)


def test_a_window_that_is_off_by_one_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = optimized(LocalWindow(3, 0))
    monkeypatch.setattr(Window, "bands", property(lambda self: (attnopt.Band(-self.left - 1, self.right),)))
    with pytest.raises(attnopt.ExportError, match="logits of the decoder and the model differ for a prompt"):
        fast.export_decoder(tmp_path / "m", context_length=32, eos_token_id=1)


def test_the_folder_says_what_it_is(fast: attnopt.OptimizedModel, tmp_path: Path) -> None:
    for length in (32, 48):  # the second takes the first one's place
        fast.export_decoder(tmp_path / "m", context_length=length, eos_token_id=[1, 2])
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["genai_config.json", "model.onnx"]
    said = json.loads((tmp_path / "m" / "genai_config.json").read_text("utf-8"))
    assert said["search"] == {"max_length": 48, "past_present_share_buffer": True}
    assert said["model"]["eos_token_id"] == [1, 2]
    assert said["model"]["decoder"]["num_key_value_heads"] == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(attnopt.AttnoptError, match="it was not overwritten"):
        fast.export_decoder(other, context_length=32, eos_token_id=1)
