"""Several processes of this machine: what each is sent and holds for one sequence, counted beside the plan; plans for many more;
and the speed of calibration on data that they share.

Traffic and memory are counted, and do not depend on the machine.  Times of calls of processes that share its cores say nothing
about several machines; calibration is measured with one thread for each process, so with a core for each.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import memory, publish

LAYERS, HEADS, DIM = 4, 8, 64
POLICIES = {"full": "fuse", "causal": "fuse", "window of 1024, 4 sinks": "local-window(left=1023, right=0, sinks=4)"}
TOKENS = 40_000  # of the calibration data
PRUNED = "prune-heads(fraction=0.25)"
FAR = (8, 64, 1024)  # ranks of a plan alone
PARTS = ("traffic", "plans", "calibration")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--tokens", type=int, nargs="+", default=(4096, 16384))
    parser.add_argument("--far", type=int, default=1 << 20, help="tokens of the plans for many ranks")
    parser.add_argument("--rank", nargs=5, help="used by the benchmark itself")
    arguments = parser.parse_args()
    if arguments.rank:
        of_rank(*arguments.rank)
        return
    about = f"{LAYERS} layers of {HEADS} heads of {DIM}, float32"
    if "traffic" in arguments.part:
        rows = [
            {"attention": name, "tokens": tokens, "ranks": ranks, **together("traffic", name, ranks, tokens)}
            for tokens in arguments.tokens
            for name in POLICIES
            for ranks in arguments.ranks
        ]
        publish("distributed", rows, f"Sent to a rank and held by it in one call: {about}")
    if "plans" in arguments.part:
        rows = [row for name in POLICIES for row in far(name, arguments.far)]
        publish("distributed_plans", rows, f"Plans for {arguments.far} tokens, 10 us and 25 GB/s: {about}")
    if "calibration" in arguments.part:
        rows = [{"processes": ranks, **together("calibration", PRUNED, ranks, TOKENS)} for ranks in (1, 2)]
        for row in rows:
            row["speed-up"] = rows[0]["seconds"] / row["seconds"]
        publish("distributed_calibration", rows, f"MiniLM, {PRUNED} calibrated on {TOKENS} tokens")


def together(part: str, name: str, ranks: int, tokens: int) -> dict[str, Any]:
    """The largest figure of any rank."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, sys.argv[0], "--rank", part, name, f"{folder}/store"]
        started = [
            subprocess.Popen([*command, f"{rank}/{ranks}", str(tokens)], stdout=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        try:
            found = [json.loads(process.communicate(timeout=3600)[0].splitlines()[-1]) for process in started]
        finally:
            for process in started:
                process.kill()
    return {key: max(one[key] for one in found) for key in found[0]}


def of_rank(part: str, name: str, store: str, place: str, tokens: str) -> None:
    import torch
    import torch.distributed as dist

    rank, ranks = map(int, place.split("/"))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    print(json.dumps({"traffic": sequence, "calibration": calibration}[part](name, int(tokens))))
    dist.barrier()
    dist.destroy_process_group()


def optimized(name: str) -> Any:
    import torch
    from torch import nn

    import attnopt

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = HEADS * DIM
            self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
            o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=name != "full")
            return x + self.out(o.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(LAYERS))).eval()
    example = torch.randn(1, 64, HEADS * DIM)
    return attnopt.optimize(model, POLICIES[name], (example,), dynamic_shapes="auto", backend="blocked")


def sequence(name: str, tokens: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from attnopt.distributed import context_parallel

    fast = optimized(name)
    parallel = context_parallel(fast, init_device_mesh("cpu", (dist.get_world_size(),)))
    x = torch.randn(1, tokens, HEADS * DIM)
    with torch.no_grad():
        parallel(x[:, :64])
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (proc(5))
        before = memory("VmRSS") - x.numel() * x.element_size()
        parallel.received.clear()
        parallel(x)
    plan = parallel.plan(x)
    return {
        "method": plan.attentions[0].method,
        "planned MiB": plan.bytes(dist.get_rank()) / 2**20,
        "received MiB": sum(parallel.received.values()) / 2**20,
        "gathered MiB": gathered(tokens, dist.get_world_size()),
        "planned memory MiB": plan.memory / 2**20,
        "memory MiB": (memory("VmHWM") - before) / 2**20,
    }


def gathered(tokens: int, ranks: int) -> float:
    """What a rank is sent if all collect the keys and values of all, as torch's own context parallelism does."""
    return LAYERS * 2 * HEADS * DIM * 4 * tokens * (ranks - 1) / ranks / 2**20


def far(name: str, tokens: int) -> list[dict[str, Any]]:
    from attnopt.distributed import plan

    fast, rows = optimized(name), []
    for ranks in FAR:
        start = time.perf_counter()
        made = plan(fast, ranks, tokens)
        rows.append(
            {
                "attention": name,
                "ranks": ranks,
                "method": made.attentions[0].method,
                "MiB to a rank": max(map(made.bytes, range(ranks))) / 2**20,
                "gathered MiB": gathered(tokens, ranks),
                "memory MiB": made.memory / 2**20,
                "transfers, ms": 1e3 * made.seconds,
                "planning, s": time.perf_counter() - start,
            }
        )
    return rows


def calibration(policy: str, tokens: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import attnopt
    from attnopt.cli import demo_data
    from attnopt.distributed import share_calibration

    model, tokenizer = demo_data.load_encoder()
    texts = list(demo_data.load_data().background)
    random.Random(0).shuffle(texts)
    batches, count = [], 0
    for start in range(0, len(texts), 8):
        made = tokenizer(
            texts[start : start + 8], padding="max_length", truncation=True, max_length=128, return_tensors="pt"
        )
        batches.append((made["input_ids"], made["attention_mask"]))
        count += made["input_ids"].numel()
        if count >= tokens:
            break
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = batches[len(batches) * rank // ranks : len(batches) * (rank + 1) // ranks]
    data = own if ranks == 1 else share_calibration(own, init_device_mesh("cpu", (ranks,)))
    dist.barrier()
    start_time = time.perf_counter()
    fast = attnopt.optimize(model, policy, batches[0], dynamic_shapes="auto", calibration=data)
    dist.barrier()
    seconds = time.perf_counter() - start_time
    assert all(site.spec.num_heads < 12 for site in fast.sites[:1])
    kept = torch.tensor([h for site in fast.sites for h in site.spec.heads]).sum()
    return {"tokens": count, "seconds": seconds, "heads kept, as a number": int(kept)}


if __name__ == "__main__":
    main()
