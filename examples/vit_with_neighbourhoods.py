"""A ViT whose patches see neighbouring patches and the class token.  The weights are random."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import ViTConfig, ViTModel

import attnopt
from attnopt.passes import Sparse
from attnopt.patterns import Neighborhood, Prefix

torch.manual_seed(0)
config = ViTConfig(
    image_size=96, patch_size=8, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128
)
model = ViTModel(config, add_pooling_layer=False).eval()
images = torch.randn(2, 3, 96, 96)
print(attnopt.inspect(model, images))

side = config.image_size // config.patch_size
near = Prefix(1, Neighborhood((side, side), kernel=5))  # 5 x 5 patches, and the class token
print(f"{near} keeps {near.density(1 + side**2, 1 + side**2):.0%} of the pairs")
policy = {"*": "fuse", "*[13]*": Sparse(near)}  # every other layer sees the whole image
fast = attnopt.optimize(model, policy, images, dynamic_shapes={"pixel_values": {0: torch.export.Dim.AUTO}})
print(fast.report)

path = Path("build") / "vit.onnx"
path.parent.mkdir(exist_ok=True)
fast.export_onnx(path)
session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
others = torch.randn(3, 3, 96, 96)  # the number of images is dynamic
from_onnx = session.run(None, {session.get_inputs()[0].name: others.numpy()})[0]
with torch.no_grad():
    from_torch = fast(others).last_hidden_state.numpy()
print(f"{path}: largest difference between torch and ONNX Runtime {np.abs(from_torch - from_onnx).max():.1e}")
