"""Calibration data that ranks share: each has some of the batches, and all get the result of all batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch.distributed.device_mesh import DeviceMesh

from attnopt.capture.calibration import Batch, Calibration
from attnopt.distributed.ranks import Ranks, require_same
from attnopt.errors import DistributedError
from attnopt.ir.peers import Peers

T = TypeVar("T")
_FAILED, _DONE, _DATA = "failed", "done", "data"


class PeerError(DistributedError):
    """Another rank failed, and every rank knows."""


@dataclass(frozen=True, eq=False)
class RankPeers(Peers):
    """Every message says whether its rank is at work, done or has failed, so none waits for one that failed."""

    ranks: Ranks

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self.ranks.rank

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.ranks.size

    def everyone(self, told: T) -> list[T]:
        return self._tell(_DATA, told)

    @contextmanager
    def working(self, given: Mapping[str, object]) -> Iterator[None]:
        try:
            require_same(self.rank, given, self.everyone)
        except DistributedError as e:
            raise PeerError(e.message, hint=e.hint) from None  # on all ranks
        try:
            yield
        except PeerError:
            raise
        except Exception as e:
            self.ranks.everyone((_FAILED, f"{type(e).__name__}: {e}"))
            raise
        self._tell(_DONE, None)

    def _tell(self, state: str, told: Any) -> list[Any]:
        found: list[Any] = self.ranks.everyone((state, told))
        for rank, (of_rank, what) in enumerate(found):
            if of_rank == _FAILED:
                raise PeerError(
                    f"rank {rank} failed: {what}", hint="fix the cause on that rank; nothing was changed on any"
                )
        if any(of_rank != state for of_rank, _ in found):
            raise PeerError("the ranks made different decisions", hint="report the model and the policy")
        return [what for _, what in found]


def peers(mesh: DeviceMesh, *, axis: str | int | None = None) -> Peers:
    """The processes of one axis of ``mesh``, for ``attnopt.search(..., peers=...)``.  Raises DistributedError."""
    return RankPeers(Ranks.of(mesh, axis))


def share_calibration(
    batches: Iterable[Batch] | Calibration, mesh: DeviceMesh, *, axis: str | int | None = None
) -> Calibration:
    """Calibration data of which each rank of one axis of ``mesh`` has its own ``batches``, at least one.

    For ``attnopt.optimize(model, policy, args, calibration=...)``, which every rank then calls with the same model, policy and
    example inputs.  Moments are put together over the ranks in their order, so all of them get one result: that of one rank
    with all batches, but for rounding.  Methods that need the data themselves in one process raise CalibrationError.  If one rank
    fails, all do: with its error there, and with a DistributedError that quotes it elsewhere.  A process that is killed is
    noticed after the timeout of the process group.

    Raises DistributedError, CalibrationError.
    """
    ranks = Ranks.of(mesh, axis)
    with ranks.together("reading the calibration data"):
        own = Calibration.of(batches)
    return replace(own, peers=RankPeers(ranks))
