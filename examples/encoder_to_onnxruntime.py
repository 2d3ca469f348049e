"""A hand-written encoder in ONNX Runtime, with a local window on half of its layers.  The weights are random."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import attnopt
from attnopt.passes import LocalWindow


class Layer(nn.Module):
    """Self-attention and a feed-forward network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        B, L, E = x.shape
        q, k, v = self.qkv(self.norm(x)).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhld,bhsd->bhls", q, k) / (E // self.heads) ** 0.5
        weights = scores.masked_fill(padding[:, None, None, :], float("-inf")).softmax(-1)
        x = x + self.out(torch.einsum("bhls,bhsd->blhd", weights, v).reshape(B, L, E))
        return x + self.mlp(x)


class Encoder(nn.Module):
    def __init__(self, width: int = 128, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, ids == 0)
        return x


torch.manual_seed(0)
model = Encoder().eval()
ids = torch.randint(1, 1000, (2, 96))
print(attnopt.inspect(model, ids))

policy = {"layers.[01]": LocalWindow(left=16, right=16, sinks=1)}  # the other layers stay unchanged
fast = attnopt.optimize(model, policy, ids, dynamic_shapes="auto")
print(fast.report)

path = Path("build") / "encoder.onnx"
path.parent.mkdir(exist_ok=True)
fast.export_onnx(path)

session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
longer = torch.randint(1, 1000, (3, 150))  # batch and length are dynamic
from_onnx = session.run(None, {session.get_inputs()[0].name: longer.numpy()})[0]
with torch.no_grad():
    from_torch = fast(longer).numpy()
print(f"{path}: largest difference between torch and ONNX Runtime {np.abs(from_torch - from_onnx).max():.1e}")
