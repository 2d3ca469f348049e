"""Calibration data that ranks share: each has some of the batches, and all get the result of all batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar

from torch.distributed.device_mesh import DeviceMesh

from attnopt.capture.calibration import Batch, Calibration
from attnopt.distributed.ranks import Ranks, require_same
from attnopt.errors import DistributedError, PeerError
from attnopt.ir.peers import Peers

T = TypeVar("T")
_FAILED, _DONE, _DATA, _NAME = "failed", "done", "data", "name"


@dataclass(frozen=True, eq=False)
class RankPeers(Peers):
    """Every message says whether its rank is at work, done or has failed, so none waits for one that failed.

    ``failures``: of this work, here or on another rank.  After one, nothing more is told, and whoever asks gets it again: code
    that caught it and went on would wait for ranks that have ended."""

    ranks: Ranks
    failures: list[Exception] = field(default_factory=list, repr=False)

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self.ranks.rank

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.ranks.size

    def everyone(self, told: T) -> list[T]:
        return self._tell(_DATA, told)

    def agree(self, told: object) -> None:
        """Raises PeerError on all ranks if one of them tells something else: then they do different things."""
        if any(x != told for x in self._tell(_NAME, told)):
            self._differ()

    def fail(self, error: Exception) -> NoReturn:
        """End the work of all ranks by an error of this one, even if something catches it."""
        with suppress(PeerError):  # the own error says more
            self.ranks.everyone((_FAILED, f"{type(error).__name__}: {error}"))
        self.failures.append(error)
        raise error

    @contextmanager
    def working(self, given: Mapping[str, object]) -> Iterator[None]:
        self.failures.clear()
        try:
            require_same(self.rank, given, self.everyone)
        except DistributedError as e:
            raise PeerError(e.message, hint=e.hint) from None  # on all ranks
        try:
            yield
        except Exception as e:
            if not self.failures:
                self.fail(e)
            if e is self.failures[0]:
                raise
            raise self.failures[0] from e
        self._tell(_DONE, None)

    def _tell(self, state: str, told: Any) -> list[Any]:
        if self.failures:
            raise self.failures[0]
        try:
            found: list[Any] = self.ranks.everyone((state, told))
        except PeerError as e:
            self.failures.append(e)
            raise
        for rank, (of_rank, what) in enumerate(found):
            if of_rank == _FAILED:
                self._end(f"rank {rank} failed: {what}", "fix the cause on that rank; nothing was changed on any")
        if any(of_rank != state for of_rank, _ in found):
            self._differ()
        return [what for _, what in found]

    def _differ(self) -> NoReturn:
        self._end("the ranks made different decisions", "report the model and the policy")

    def _end(self, why: str, hint: str) -> NoReturn:
        self.failures.append(PeerError(why, hint=hint))
        raise self.failures[0]


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
