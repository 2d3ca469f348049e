"""The processes that share a sequence: one axis of a DeviceMesh, and what they tell each other."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from attnopt.errors import DistributedError, PeerError


@dataclass(frozen=True, eq=False)
class Ranks:
    """``received``: the bytes that this process was sent, by what they were for."""

    group: dist.ProcessGroup
    rank: int
    size: int
    received: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, mesh: object, axis: str | int | None) -> Ranks:
        """Of one axis of ``mesh``; None: of its only one.  Raises DistributedError."""
        if not dist.is_available() or not dist.is_initialized():
            raise DistributedError(
                "torch.distributed is not initialized in this process",
                hint='start the script with torchrun, and call torch.distributed.init_process_group("gloo") or "nccl" first',
            )
        if not isinstance(mesh, DeviceMesh):
            raise DistributedError(
                f"expected a DeviceMesh, found {type(mesh).__name__}",
                hint='make one with torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("sequence",))',
            )
        place = axis_of(mesh, axis)
        if mesh.get_coordinate() is None:
            raise DistributedError(
                f"process {dist.get_rank()} is not part of the mesh", hint="call this only in the processes of the mesh"
            )
        return cls(mesh.get_group(place), mesh.get_local_rank(place), mesh.size(place))

    def exchange(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor], what: str) -> Exchange:
        """Begin to send to, and to fill these tensors from, other ranks.  Every rank of the group calls this in the same
        order."""
        self._require_device(*sent.values(), *received.values())
        leaving = {to: t.contiguous() for to, t in sorted(sent.items())}
        told = [dist.P2POp(dist.isend, t, self._global(to), self.group) for to, t in leaving.items()]
        heard = [dist.P2POp(dist.irecv, t, self._global(source), self.group) for source, t in sorted(received.items())]
        self._count(what, *received.values())
        works = dist.batch_isend_irecv(told + heard) if told + heard else []
        return Exchange(received, works, tuple(leaving.values()))

    def everyone(self, told: object) -> list[object]:
        """What each rank tells, by rank; tensors arrive on the device of this rank.  Raises PeerError."""
        found: list[Any] = [None] * self.size
        own = packed(told)
        try:
            dist.all_gather_object(found, own, self.group)
        except RuntimeError as e:
            why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise PeerError(
                f"another process ended, or did not answer in time: {why}", hint="see what it printed"
            ) from e
        return [pickle.loads(one) for one in found]

    def padded(self, own: Tensor, what: str) -> list[Tensor]:
        """Tensors of one shape, by rank."""
        self._require_device(own)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, self.group)
        self._count(what, *found[1:])
        return found

    def summed(self, x: Tensor, what: str) -> Tensor:
        """The sum over all ranks, in place."""
        self._require_device(x)
        dist.all_reduce(x, group=self.group)
        self._count(what, x)
        return x

    @contextmanager
    def together(self, doing: str) -> Iterator[Told]:
        """If the body raises on one rank, it raises on each: the own error there, one that tells of it elsewhere.

        The body must not wait for other ranks after it may have failed alone."""
        failure: Exception | None = None
        shared = Told()
        try:
            yield shared
        except Exception as e:
            failure = e
        try:
            told: Any = self.everyone((None if failure is None else f"{type(failure).__name__}: {failure}", shared.own))
        except PeerError:
            if failure is not None:
                raise failure from None
            raise
        if failure is not None:
            raise failure
        failed = [(rank, text) for rank, (text, _) in enumerate(told) if text is not None]
        shared.all = [own for _, own in told]
        if failed:
            rank, text = failed[0]
            raise DistributedError(f"rank {rank} failed while {doing}: {text}", hint="fix the cause on that rank")

    def require_same(self, given: Mapping[str, object]) -> None:
        """Raises DistributedError on every rank if something has another value on another rank."""
        require_same(self.rank, given, self.everyone)

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    def _require_device(self, *tensors: Tensor) -> None:
        """Raises DistributedError for tensors that the backend of the group cannot send."""
        if not tensors:  # of a rank alone, which needs no group
            return
        able = dist.get_backend_config(self.group)  # as "cpu:gloo,cuda:nccl"
        known = {one.partition(":")[0] for one in able.split(",")}
        if unable := sorted({t.device.type for t in tensors} - known):
            raise DistributedError(
                f"the process group ({able}) sends no tensors on the device {unable[0]}",
                hint='call torch.distributed.init_process_group("cpu:gloo,cuda:nccl"), or move the model and its inputs',
            )

    def _count(self, what: str, *tensors: Tensor) -> None:
        self.received[what] = self.received.get(what, 0) + sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Told:
    """``own``: what this rank tells when it is done; ``all``: afterwards, what each told, by rank."""

    own: Any = None
    all: list[Any] = field(default_factory=list)


class _Packer(pickle.Pickler):
    """Unpacked as it is, a tensor would go back to the device that it had, which is another rank's."""

    def reducer_override(self, x: object) -> Any:
        if isinstance(x, Tensor) and x.device.type != "cpu":
            return _on_own_device, (x.detach().cpu(), x.device.type)
        return NotImplemented


def _on_own_device(x: Tensor, kind: str) -> Tensor:
    return x.to(torch.device(kind))  # the current one of its kind


def packed(x: object) -> bytes:
    """For ``pickle.loads`` in another process."""
    into = io.BytesIO()
    _Packer(into).dump(x)
    return into.getvalue()


@dataclass(frozen=True, eq=False)
class Exchange:
    """Tensors on their way; ``sent`` keeps those that leave alive."""

    received: Mapping[int, Tensor]
    works: list[dist.Work]
    sent: tuple[Tensor, ...]

    def wait(self) -> Mapping[int, Tensor]:
        for work in self.works:
            work.wait()
        return self.received


def require_same(rank: int, given: Mapping[str, object], everyone: Callable[[dict[str, str]], list[Any]]) -> None:
    """Raises DistributedError on every rank if the ranks have several values under one name."""
    found = everyone({name: fingerprint(x) for name, x in given.items()})
    for name in given:
        values = [told.get(name) for told in found]
        other = next((r for r, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise DistributedError(
                f"{name} on rank {other} differ{'' if name.endswith('s') else 's'} from rank 0's (told on rank {rank})",
                hint="pass the same model, policy, example inputs and options on every rank",
            )


def fingerprint(x: object) -> str:
    """Equal for equal values; of tensors, their sizes and sums are compared."""
    if isinstance(x, Tensor):
        total = x.detach().double().sum().item() if not x.is_meta and not x.is_complex() else None
        return f"{tuple(x.shape)} {x.dtype} {total}"
    text = repr({k: fingerprint(v) for k, v in x.items()}) if isinstance(x, Mapping) else str(x)
    return sha256(text.encode()).hexdigest()


def axis_of(mesh: DeviceMesh, axis: str | int | None) -> int:
    names = mesh.mesh_dim_names or ()
    listed = ", ".join(map(repr, names)) or f"0 to {mesh.ndim - 1}"
    if axis is None:
        if mesh.ndim != 1:
            raise DistributedError(f"the mesh has {mesh.ndim} axes ({listed})", hint="name one of them with axis=")
        return 0
    if isinstance(axis, int) and not isinstance(axis, bool) and 0 <= axis < mesh.ndim:
        return axis
    if axis in names:
        return names.index(str(axis))
    raise DistributedError(f"the mesh has no axis {axis!r}", hint=f"its axes are {listed}")
