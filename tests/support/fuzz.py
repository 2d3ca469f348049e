"""Any number of random cases: ``python tests/support/fuzz.py 10000``.  Prints the figures; failures are shrunk and kept."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

os.environ["ATTNOPT_DEBUG"] = "1"  # a fault of the matcher crashes its case, instead of counting as a miss
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: every process has one core

from fuzzing.chunks import chunk
from fuzzing.figures import Figures
from fuzzing.grammar import Case, to_json
from fuzzing.laws import Outcome, checked
from fuzzing.shrinking import shrunk
from fuzzing.stored import store

CHUNK = 10  # cases that one process takes at a time
LIFE = 25  # chunks after which a process is replaced: tracing keeps memory
MOST_SHRUNK = 5  # of one run's failures; the others are counted alone


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    figures, failures = Figures(), list[Outcome]()
    for outcomes in _run(options.seed, options.first, options.first + options.cases, options.jobs):
        for o in outcomes:
            figures.add(o)
            if o.failure:
                failures.append(o)
                print(f"\n{o.failure}: {json.dumps(to_json(o.case))}\n{o.why}", file=sys.stderr, flush=True)
            for code, s in o.missed:
                print(f"missed [{code}]: {s}", file=sys.stderr)
        print(f"{figures.cases} of {options.cases}, {figures.share:.2%} found", file=sys.stderr, flush=True)
    print(figures)
    for o in failures[:MOST_SHRUNK]:
        print(f"{o.failure}, kept as {store(shrunk(o.case, _fails_like(o)))}")
    return 0 if figures.passed else 1


def _run(seed: int, first: int, last: int, jobs: int) -> Iterator[list[Outcome]]:
    # A new pool for each part: with `max_tasks_per_child`, Python 3.11's can hang (CPython issue 115634).
    part = CHUNK * LIFE * jobs
    for start in range(first, last, part):
        end = min(start + part, last)
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(chunk, seed, n, min(n + CHUNK, end)) for n in range(start, end, CHUNK)]
            for done in as_completed(waiting):
                yield done.result()


def _fails_like(o: Outcome) -> Callable[[Case], bool]:
    def fails(case: Case) -> bool:
        return checked(case).failure == o.failure

    return fails


if __name__ == "__main__":
    sys.exit(main())
