"""One sequence on several processes of this machine: bytes that each is sent, peak memory and time of a call.

Traffic is counted where it arrives, and does not depend on the machine; processes that share its cores say nothing about the
speed of several machines.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import memory, publish

LAYERS, HEADS, DIM = 4, 8, 64
POLICIES = {"causal": "fuse", "window of 1024, 4 sinks": "local-window(left=1023, right=0, sinks=4)"}
CALLS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--tokens", type=int, nargs="+", default=(4096, 16384))
    parser.add_argument("--rank", type=int, nargs=3, help="used by the benchmark itself", metavar="N")
    parser.add_argument("--policy")
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    if arguments.rank:
        of_rank(arguments.policy, arguments.folder, *arguments.rank)
        return
    rows = [row(name, ranks, tokens) for tokens in arguments.tokens for name in POLICIES for ranks in arguments.ranks]
    publish("distributed", rows, f"{LAYERS} layers of {HEADS} heads of {DIM}, float32, one thread for each process")


def row(policy: str, ranks: int, tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, sys.argv[0], "--policy", policy, "--folder", folder, "--rank"]
        started = [
            subprocess.Popen([*command, *map(str, (rank, ranks, tokens))], stdout=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        found = [json.loads(process.communicate(timeout=3600)[0].splitlines()[-1]) for process in started]
    most = {key: max(one[key] for one in found) for key in found[0]}
    return {"attention": policy, "tokens": tokens, "ranks": ranks, **most}


def of_rank(policy: str, folder: str, rank: int, ranks: int, tokens: int) -> None:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh

    import attnopt
    from attnopt.distributed import context_parallel

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = HEADS * DIM
            self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return x + self.out(o.transpose(1, 2).flatten(2))

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS))).eval()
    example = torch.randn(1, 64, HEADS * DIM)
    fast = attnopt.optimize(model, POLICIES[policy], (example,), dynamic_shapes="auto", backend="blocked")
    parallel = context_parallel(fast, init_device_mesh("cpu", (ranks,)))
    before, x, times = memory("VmRSS"), torch.randn(1, tokens, HEADS * DIM), list[float]()
    with torch.no_grad():
        for _ in range(CALLS):
            parallel.received.clear()
            dist.barrier()
            start = time.perf_counter()
            parallel(x)
            dist.barrier()
            times.append(time.perf_counter() - start)
    plan = parallel.plan(x)
    print(
        json.dumps(
            {
                "method": plan.attentions[0].method,
                "planned MiB": round(sum(a.bytes[rank] for a in plan.attentions) / 2**20, 3),
                "received MiB": round(sum(parallel.received.values()) / 2**20, 3),
                "memory MiB": round((memory("VmHWM") - before) / 2**20, 1),
                "seconds": round(min(times), 3),
            }
        )
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
