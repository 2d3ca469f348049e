"""Commands under torchrun: its processes share the work, and the first one writes and prints."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnopt.errors import AttnoptError, AttnoptWarning

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from attnopt.capture.calibration import Calibration
    from attnopt.distributed.ranks import Ranks
    from attnopt.ir.peers import Peers


@dataclass(frozen=True, eq=False)
class Job:
    """The processes that torchrun started for one command."""

    mesh: DeviceMesh
    ranks: Ranks

    def share(self, read: Callable[[], Iterable[Any]], name: str) -> Calibration:
        """This process's run of the batches that each of them reads.  Raises AttnoptError."""
        from attnopt.distributed import share_calibration

        with self.ranks.together("reading the calibration data"):
            batches = list(read())
            if len(batches) < self.ranks.size:
                raise AttnoptError(
                    f"{name}: {len(batches)} batches cannot be shared by {self.ranks.size} processes",
                    hint="make them smaller with --batch, or start fewer processes",
                )
        cuts = [len(batches) * rank // self.ranks.size for rank in range(self.ranks.size + 1)]
        return share_calibration(batches[cuts[self.ranks.rank] : cuts[self.ranks.rank + 1]], self.mesh)

    @property
    def peers(self) -> Peers:
        from attnopt.distributed import peers

        return peers(self.mesh)

    def first_alone(self, run: Callable[[], int]) -> int:
        """The exit code of ``run`` in the first process; if it fails there, all fail."""
        with self.ranks.together("writing the result"):
            return run() if self.ranks.rank == 0 else 0


@contextlib.contextmanager
def launched() -> Iterator[Job | None]:
    """The processes of this command, if torchrun started several."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield None
        return
    from torch.distributed.device_mesh import init_device_mesh

    from attnopt.distributed.ranks import Ranks

    dist.init_process_group("gloo")
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        job = Job(mesh, Ranks.of(mesh, None))
        if job.ranks.rank:
            warnings.simplefilter("ignore", AttnoptWarning)  # the first one tells them
        yield job
    finally:
        dist.destroy_process_group()


def first_alone(job: Job | None, run: Callable[[], int]) -> int:
    return run() if job is None else job.first_alone(run)
