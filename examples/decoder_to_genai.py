"""A language model in onnxruntime-genai, with a window on one of its layers.  The weights are random."""

from pathlib import Path

import onnxruntime_genai
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnopt
from attnopt.passes import LocalWindow

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=0,
)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(1, 256, (2, 16))
inputs = {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "position_ids": torch.arange(16).expand(2, -1),
    "use_cache": False,  # the exported model has its own cache
}
policy = {"*": "fuse", "*layers.1.*": LocalWindow(left=31, right=0)}  # a token sees itself and 31 before it
fast = attnopt.optimize(model, policy, (), inputs, dynamic_shapes="auto")
print(fast.report)

folder = Path("build") / "decoder"
folder.parent.mkdir(exist_ok=True)
fast.export_decoder(folder, context_length=128, eos_token_id=0)  # tokenizer=... would save its files there, too

runtime = onnxruntime_genai.Model(str(folder))
parameters = onnxruntime_genai.GeneratorParams(runtime)
parameters.set_search_options(max_length=32, do_sample=False)
generator = onnxruntime_genai.Generator(runtime, parameters)
generator.append_tokens(ids[0].tolist())
while not generator.is_done():
    generator.generate_next_token()
print("generated", [int(token) for token in generator.get_sequence(0)][16:])
