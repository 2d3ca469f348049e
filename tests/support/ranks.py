"""Checks on several ranks: one process each, which share a file instead of a port."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from importlib import import_module
from pathlib import Path

SECONDS = 900


def on_ranks(size: int, *names: str, checks: str = "parallel_checks", device: str = "cpu") -> dict[str, list[str]]:
    """For each check of the module ``checks``, or of these, that failed, what each rank said."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder, checks, device, str(size)]
        logs = [Path(folder, f"{rank}.log") for rank in range(size)]
        ranks = [_started([*command, str(rank), *names], log) for rank, log in enumerate(logs)]
        try:
            for rank in ranks:
                rank.wait(SECONDS)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        results = [Path(folder, f"{rank}.json") for rank in range(size)]
        missing = [log.read_text() for log, result in zip(logs, results, strict=True) if not result.exists()]
        assert not missing, "\n".join(missing)
        found = [json.loads(result.read_text()) for result in results]
    return {name: told for name in found[0] if any(told := [by_rank.get(name, "not run") for by_rank in found])}


def _started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as errors:
        return subprocess.Popen(command, stderr=errors)


def _of_one(folder: str, checks: str, device: str, size: int, rank: int, names: list[str]) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend, store = {"cpu": "gloo", "cuda": "nccl"}[device], f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=300))
    mesh = init_device_mesh(device, (size,), mesh_dim_names=("sequence",))
    found: dict[str, str] = {}
    for name, run in import_module(checks).CHECKS.items():
        if names and name not in names:
            continue
        try:
            run(mesh)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, checks, device, size, rank, *names = sys.argv[1:]
    _of_one(folder, checks, device, int(size), int(rank), names)
