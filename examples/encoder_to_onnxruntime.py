"""A BERT encoder with a local window, in ONNX Runtime.  Needs transformers; the weights are random."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import attnopt
from attnopt.passes import LocalWindow

try:
    from transformers import BertConfig, BertModel
except ImportError:
    sys.exit("this example needs transformers: pip install transformers")

config = BertConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
model = BertModel(config, add_pooling_layer=False).eval()
inputs = {
    "input_ids": torch.randint(0, config.vocab_size, (2, 96)),
    "attention_mask": torch.ones(2, 96, dtype=torch.long),
}
print(attnopt.inspect(model, kwargs=inputs))

policy = {"*.layer.[01].*": LocalWindow(left=16, right=16, sinks=1)}  # the other layers are left as they are
fast = attnopt.optimize(model, policy, kwargs=inputs, dynamic_shapes="auto")
print(fast.report)

path = Path("build") / "bert.onnx"
path.parent.mkdir(exist_ok=True)
fast.export_onnx(path)

session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
tensors = {given.name: inputs[given.name].numpy() for given in session.get_inputs()}
from_onnx = session.run(None, tensors)[0]
with torch.no_grad():
    from_torch = fast(**inputs).last_hidden_state.numpy()
print(f"{path}: largest difference between torch and ONNX Runtime {np.abs(from_torch - from_onnx).max():.1e}")
