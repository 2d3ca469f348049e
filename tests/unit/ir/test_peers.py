"""Work that processes divide, here by threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

from attnopt.errors import VerificationError
from attnopt.ir.peers import Peers, divided

T = TypeVar("T")


@dataclass(eq=False)
class Thread(Peers):
    rank: int
    count: int
    board: dict[int, Any]
    barrier: threading.Barrier

    def everyone(self, told: T) -> list[T]:
        self.board[self.rank] = told
        self.barrier.wait(10)
        found = [self.board[r] for r in range(self.count)]
        self.barrier.wait(10)
        return found

    @contextmanager
    def working(self, given: Mapping[str, object]) -> Iterator[None]:
        yield


def together(count: int, run: Callable[[Peers], T]) -> list[T]:
    board, barrier = dict[int, Any](), threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: run(Thread(rank, count, board, barrier)), range(count)))


@pytest.mark.parametrize("parts", [0, 1, 5, 6])
def test_each_part_is_done_once(parts: int) -> None:
    done: list[int] = []

    def part(i: int) -> int:
        done.append(i)
        return i * i

    found = together(3, lambda peers: divided([lambda i=i: part(i) for i in range(parts)], peers))  # type: ignore[misc]
    assert found == 3 * [[i * i for i in range(parts)]]
    assert sorted(done) == list(range(parts))


def test_what_one_raises_all_raise() -> None:
    def part(i: int) -> int:
        if i >= 2:
            raise VerificationError(f"part {i}", hint="look", site="here")
        return i

    def run(peers: Peers) -> str:
        with pytest.raises(VerificationError) as raised:
            divided([lambda i=i: part(i) for i in range(4)], peers)  # type: ignore[misc]
        assert (raised.value.hint, raised.value.site) == ("look", "here")
        return raised.value.message

    assert together(2, run) == 2 * ["part 2"]
    with pytest.raises(VerificationError, match="part 3"):
        divided([lambda: part(3)], None)
