"""Processes that share calibration data: each has some of the batches, and they put together what they measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeVar

from attnopt.errors import AttnoptError, CalibrationError

T = TypeVar("T")


class Peers(ABC):
    """Batches of all processes stand in the order of ``rank``, which is below ``count``.  All of them ask the same things in the
    same order."""

    rank: int
    count: int

    @abstractmethod
    def everyone(self, told: T) -> list[T]:
        """What each process tells, by rank.  Raises PeerError where one of them failed."""

    @abstractmethod
    def working(self, given: Mapping[str, object]) -> AbstractContextManager[None]:
        """While they work together: if one raises, all do.  ``given`` has to be the same for all of them."""

    def divided(self, parts: Sequence[Callable[[], T]]) -> list[T]:
        """What these give, in their order: each process calls some of them, and what one of them raises, all raise."""
        own: dict[int, T | AttnoptError] = {}
        for place in range(self.rank, len(parts), self.count):
            try:
                own[place] = parts[place]()
            except AttnoptError as e:
                own[place] = e
        told = {place: x for of_rank in self.everyone(own) for place, x in of_rank.items()}
        found: list[T] = []
        for place in range(len(parts)):
            x = told[place]
            if isinstance(x, AttnoptError):
                raise x
            found.append(x)
        return found

    def places(self, count: int) -> tuple[int, int]:
        """Of ``count`` things here, the number of those before them, and of all."""
        counts = self.everyone(count)
        return sum(counts[: self.rank]), sum(counts)


class Withheld(tuple[Any, ...]):
    """In the place of batches of which other processes have the rest: reading them would be wrong without notice."""

    site: str

    @classmethod
    def of(cls, site: str) -> Withheld:
        made = cls()
        made.site = site
        return made

    def refuse(self, *_: object) -> NoReturn:
        raise CalibrationError(
            "this method needs all calibration data in one process, and several processes share it",
            site=self.site,
            hint="pass all batches to each process as plain calibration, or choose a method that is fitted from second moments, "
            'such as PruneHeads with compensate="least-squares"',
        )

    def __iter__(self) -> Iterator[Any]:
        self.refuse()

    def __len__(self) -> int:
        self.refuse()

    def __getitem__(self, _: object) -> Any:
        self.refuse()

    def __bool__(self) -> bool:
        self.refuse()


def divided(parts: Sequence[Callable[[], T]], peers: Peers | None) -> list[T]:
    """What these give, in their order, from this process or, if there are some, from its peers together."""
    return [part() for part in parts] if peers is None else peers.divided(parts)
