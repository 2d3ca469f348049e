"""Ranks that work together, here threads, and one of them fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist

from attnopt.distributed.calibration import RankPeers
from attnopt.distributed.ranks import Ranks
from attnopt.errors import PeerError


@dataclass(eq=False)
class Thread:
    """In the place of ``Ranks``."""

    rank: int
    size: int
    board: dict[int, Any]
    barrier: threading.Barrier

    def everyone(self, told: object) -> list[object]:
        self.board[self.rank] = told
        self.barrier.wait(10)
        found = [self.board[r] for r in range(self.size)]
        self.barrier.wait(10)
        return found


def raised(*runs: Callable[[RankPeers], object]) -> list[str]:
    """What each rank raises, which ``runs`` this while they work; no rank waits in vain."""
    board, barrier = dict[int, Any](), threading.Barrier(len(runs))

    def work(rank: int) -> str:
        peers = RankPeers(Thread(rank, len(runs), board, barrier))  # type: ignore[arg-type]
        try:
            with peers.working({"the policy": "fuse"}):
                runs[rank](peers)
        except Exception as e:
            return f"{type(e).__name__}: {e}"
        return ""

    with ThreadPoolExecutor(len(runs)) as pool:
        return list(pool.map(work, range(len(runs))))


def fails(peers: RankPeers) -> None:
    peers.everyone(1)
    raise MemoryError("no memory")


def hides(peers: RankPeers) -> None:
    peers.everyone(1)
    with suppress(MemoryError):
        peers.fail(MemoryError("no memory"))
    swallows(peers)


def swallows(peers: RankPeers) -> None:
    for _ in range(3):
        with suppress(Exception):
            peers.everyone(1)


def replaces(peers: RankPeers) -> None:
    try:
        swallows(peers)
        peers.everyone(2)
    except PeerError:
        raise ValueError("the model fails") from None


def goes_on(peers: RankPeers) -> None:
    peers.everyone(1)
    peers.agree("b")


@pytest.mark.parametrize("failing", [fails, hides])
@pytest.mark.parametrize("other", [swallows, replaces, goes_on])
def test_a_failure_reaches_ranks_that_swallow_it(failing: Callable[..., object], other: Callable[..., object]) -> None:
    own, theirs = raised(failing, other)
    assert own == "MemoryError: no memory"
    assert theirs.startswith("PeerError: rank 0 failed: MemoryError: no memory\n  hint: fix the cause on that rank")


def test_ranks_that_do_different_things_end_together() -> None:
    def swallowing(peers: RankPeers) -> None:
        with suppress(Exception):
            peers.agree("a")

    found = raised(swallowing, lambda peers: peers.agree("b"), swallows)
    assert all(one.startswith("PeerError: the ranks made different decisions") for one in found), found
    found = raised(lambda peers: None, swallows)  # one is done, and one asks
    assert all(one.startswith("PeerError: the ranks made different decisions") for one in found), found


def test_work_after_a_failure_begins_anew() -> None:
    def twice(peers: RankPeers) -> list[int]:
        with suppress(Exception), peers.working({}):
            (swallows if peers.rank else fails)(peers)
        with peers.working({}):
            return peers.everyone(peers.rank)

    board, barrier = dict[int, Any](), threading.Barrier(2)
    ranks = [RankPeers(Thread(rank, 2, board, barrier)) for rank in range(2)]  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(twice, ranks)) == [[0, 1], [0, 1]]


def test_a_process_that_ended_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise RuntimeError("[pair.cc:534] Connection closed by peer\nand more")

    monkeypatch.setattr(dist, "all_gather_object", gone)
    peers = RankPeers(Ranks(None, 0, 2))  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(PeerError, match=r"another process ended, .*: \[pair.cc:534\] Connection closed by peer\n"):
            peers.everyone(1)
        monkeypatch.setattr(dist, "all_gather_object", lambda found, own, group: None)
