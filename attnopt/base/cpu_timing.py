"""CPU time of interleaved calls, so background load affects every candidate equally."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of CPU time of each round, by the name of the call."""

    of: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        return statistics.median(self.of[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over rounds of the time ratio of two calls within a round."""
        return statistics.median(self._ratios(name, base))

    def spread(self, name: str, base: str) -> tuple[float, float]:
        """Quartiles of the same ratios; of two rounds at least."""
        low, _, high = statistics.quantiles(self._ratios(name, base), n=4)
        return low, high

    def _ratios(self, name: str, base: str) -> list[float]:
        return [a / b for a, b in zip(self.of[name], self.of[base], strict=True)]


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    watched: Callable[[range], Iterable[int]] = iter,
    clock: Callable[[], float] = time.process_time,
) -> Times:
    """Every round runs each call once, in rotating order.

    Garbage of one call is not charged to the next.  ``watched`` receives the rounds,
    and may show progress.  ``clock``: another one, for calls that a CPU only waits for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with _no_collection():
        for i in watched(range(rounds + warm_up)):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                gc.collect(1)  # only what is young: all objects of a large process would take longer than the calls
                start = clock()
                calls[name]()
                if i >= warm_up:
                    seconds[name].append(clock() - start)
    return Times({name: tuple(found) for name, found in seconds.items()})


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected inside but what the body asks for."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """With several threads, CPU time would count waiting as work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
