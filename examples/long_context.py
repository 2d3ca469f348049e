"""One sequence on several processes: each computes its own tokens, and windows exchange only their edges.

torchrun --nproc-per-node 2 examples/long_context.py                                    # one machine
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/long_context.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import attnopt
from attnopt.distributed import context_parallel
from attnopt.passes import LocalWindow


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(64, 192), nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(o.transpose(1, 2).flatten(2))


device = "cpu"
if "RANK" not in os.environ:  # without torchrun: one process
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
elif not torch.cuda.is_available():
    dist.init_process_group("gloo")
else:
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
mesh = init_device_mesh(device.partition(":")[0], (dist.get_world_size(),), mesh_dim_names=("sequence",))

torch.manual_seed(0)
model = nn.Sequential(*(Block() for _ in range(4))).eval().to(device)
x, tokens = torch.randn(1, 64, 64).to(device), torch.randn(1, 1001, 64).to(device)
window = LocalWindow(left=31, right=0, sinks=4)
fast = attnopt.optimize(model, window, (x,), dynamic_shapes="auto", backend="blocked")
parallel = context_parallel(fast, mesh)

own = parallel(tokens)  # the whole input on every rank, of any length; this rank's tokens of the output
same = torch.allclose(own, parallel.own(fast(tokens)), atol=1e-5)
if dist.get_rank() == 0:
    print("as on one process:", same)
    print(parallel.plan(tokens))
dist.destroy_process_group()
