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
import weakref
from pathlib import Path
from typing import Any

from common import memory, publish

LAYERS, HEADS, DIM = 4, 8, 64
POLICIES = {"full": "fuse", "causal": "fuse", "window of 1024, 4 sinks": "local-window(left=1023, right=0, sinks=4)"}
TOKENS = 40_000  # of the calibration data
SHORT = 2048  # tokens of a sequence with gradients, and of the data of the split model
PRUNED = "prune-heads(fraction=0.25)"
FAR = (8, 64, 1024)  # ranks of a plan alone
SPLIT = {"layers": 12, "width": 768}  # of the model that fully_shard splits
PARTS = ("traffic", "gradients", "plans", "split", "calibration")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--tokens", type=int, nargs="+", default=(4096, 16384))
    parser.add_argument("--repeats", type=int, default=2, help="of the calibration, by one process and by two in turn")
    parser.add_argument(
        "--note", default="", help="for the titles of tables with times, such as of other load on the machine"
    )
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
        publish(
            "distributed_plans", rows, f"Plans for {arguments.far} tokens, 10 us and 25 GB/s: {about}{arguments.note}"
        )
    if "gradients" in arguments.part:
        rows = [
            {"attention": name, "tokens": SHORT, "ranks": ranks, **together("gradients", name, ranks, SHORT)}
            for name in POLICIES
            for ranks in arguments.ranks
        ]
        publish(
            "distributed_gradients", rows, f"Gradients against those of one process, and what travels for them: {about}"
        )
    if "split" in arguments.part:
        rows = [{"ranks": ranks, **together("split", PRUNED, ranks, SHORT)} for ranks in arguments.ranks[:2]]
        publish(
            "distributed_split",
            rows,
            f"Memory of a rank that optimizes a model split by fully_shard: {SPLIT}, {PRUNED}",
        )
    if "calibration" in arguments.part:
        publish(
            "distributed_calibration",
            calibrations(arguments.repeats),
            f"MiniLM, {PRUNED} calibrated by processes of one thread each{arguments.note}",
        )


def calibrations(repeats: int) -> list[dict[str, Any]]:
    """The least of each figure, by one process and by two in turn: other load on the machine only adds to times."""
    runs = [[together("calibration", PRUNED, ranks, TOKENS) for ranks in (1, 2)] for _ in range(repeats)]
    rows = [
        {"processes": ranks, **{key: min(r[key] for r in of_ranks) for key in of_ranks[0]}}
        for ranks, of_ranks in zip((1, 2), zip(*runs, strict=True), strict=True)
    ]
    for row in rows:
        row["speed-up"] = rows[0]["seconds"] / row["seconds"]
        row["speed-up in CPU time"] = rows[0]["CPU seconds of the busiest"] / row["CPU seconds of the busiest"]
    return rows


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
    parts = {"traffic": sequence, "gradients": gradients, "split": split, "calibration": calibration}
    print(json.dumps(parts[part](name, int(tokens))))
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


def gradients(name: str, tokens: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from attnopt.distributed import context_parallel

    fast = optimized(name)
    parallel = context_parallel(fast, init_device_mesh("cpu", (dist.get_world_size(),)))
    x = torch.randn(1, tokens, HEADS * DIM, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(fast(x).square().mean(), list(fast.parameters()))
    made = parallel(x)
    parallel.received.clear()
    (made.square().sum() / x.numel()).backward()
    backward = sum(parallel.received.values())
    parallel.reduce_gradients()
    pairs = [(p.grad, g) for p, g in zip(fast.parameters(), wanted, strict=True) if p.grad is not None]
    return {
        "gradients apart, 1e-6": 1e6 * max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        "received backward MiB": backward / 2**20,
    }


def split(policy: str, tokens: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from attnopt.distributed import optimize, share_calibration, split_model

    width, ranks = SPLIT["width"], dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(width, 12, 4 * width, batch_first=True) for _ in range(SPLIT["layers"])]
    model = nn.Sequential(*layers).eval()
    whole = sum(p.nbytes for p in model.parameters())
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = torch.randn(2, 64, width, generator=torch.Generator().manual_seed(1))
    random = torch.Generator().manual_seed(2 + dist.get_rank())
    data = share_calibration([torch.randn(2, 64, width, generator=random) for _ in range(tokens // 128 // ranks)], mesh)
    held, plain = Held(), split_model._Shared.gather
    split_model._Shared.gather = lambda part: held.noted(plain(part))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (proc(5))
    before = memory("VmRSS")
    optimize(model, policy, (x,), calibration=data)
    return {
        "weights MiB": whole / 2**20,
        "weights of a rank MiB": sum(p.to_local().nbytes for p in model.parameters()) / 2**20,
        "weights of a layer MiB": whole / len(layers) / 2**20,
        "most gathered at a time MiB": held.most / 2**20,
        "memory for it MiB": (memory("VmHWM") - before) / 2**20,
    }


class Held:
    """Bytes of gathered weights that are held at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def noted(self, x: Any) -> Any:
        self.now += x.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(x, self._gone, x.nbytes)
        return x

    def _gone(self, size: int) -> None:
        self.now -= size


def gathered(tokens: int, ranks: int) -> float:
    """What a rank is sent if all collect the keys and values of all, as torch's own context parallelism does."""
    return LAYERS * 2 * HEADS * DIM * 4 * tokens * (ranks - 1) / ranks / 2**20


def far(name: str, tokens: int) -> list[dict[str, Any]]:
    import torch

    from attnopt.distributed import plan

    fast, rows = optimized(name), []
    x = torch.empty(1, tokens, HEADS * DIM, device="meta")
    for ranks in FAR:
        start = time.perf_counter()
        made = plan(fast, ranks, args=(x,))
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
    start_time, start_cpu = time.perf_counter(), time.process_time()
    fast = attnopt.optimize(model, policy, batches[0], dynamic_shapes="auto", calibration=data)
    cpu = time.process_time() - start_cpu
    dist.barrier()
    seconds = time.perf_counter() - start_time
    assert all(site.spec.num_heads < 12 for site in fast.sites[:1])
    kept = torch.tensor([h for site in fast.sites for h in site.spec.heads]).sum()
    return {
        "tokens": count,
        "seconds": seconds,
        "CPU seconds of the busiest": cpu,
        "peak memory MiB": memory("VmHWM") / 2**20,
        "heads kept, as a number": int(kept),
    }


if __name__ == "__main__":
    main()
