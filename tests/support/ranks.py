"""Checks on several ranks: one process each, which share a file instead of a port."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

SECONDS = 240


def on_ranks(size: int) -> dict[str, list[str]]:
    """For each check of ``parallel_checks`` that failed, what each rank said."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder, str(size)]
        ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(size)]
        try:
            said = [rank.communicate(timeout=SECONDS)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        results = [Path(folder, f"{rank}.json") for rank in range(size)]
        missing = [text for text, result in zip(said, results, strict=True) if not result.exists()]
        assert not missing, "\n".join(missing)
        found = [json.loads(result.read_text()) for result in results]
    return {name: told for name in found[0] if any(told := [by_rank.get(name, "not run") for by_rank in found])}


def _of_one(folder: str, size: int, rank: int) -> None:
    import torch
    import torch.distributed as dist
    from parallel_checks import CHECKS
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("sequence",))
    found: dict[str, str] = {}
    for name, run in CHECKS.items():
        try:
            run(mesh)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _of_one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
