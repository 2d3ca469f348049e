"""What fewer heads cost on trained models, without training: every method beside the defaults of attnopt.

Calibration and test data are disjoint.  What has been measured is kept in build/, so that an interrupted run goes on where
it stopped; `--fresh` starts again.  Needs what `make bench` installs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from common import one_thread, picture, publish
from subjects import Rewrite, Subject

import attnopt

KEPT = Path("build") / "quality.jsonl"
SUBJECTS = ("minilm", "vit", "rxnmapper", "smollm2-repeated", "smollm2")


def subject(name: str) -> Subject:
    if name == "minilm":
        from subjects.minilm import MiniLM

        return MiniLM()
    if name == "vit":
        from subjects.vit import ViT

        return ViT()
    if name == "rxnmapper":
        from subjects.rxnmapper import RXNMapper

        return RXNMapper()
    from subjects.smollm2 import Repeated, SmolLM2

    return SmolLM2() if name == "smollm2" else Repeated()


def measured(about: Subject, rewrite: Rewrite, seed: int) -> dict[str, float]:
    """The figures of one rewritten model; ``seconds``: CPU time of calibrating and converting it."""
    batches = about.calibration(seed)
    start = time.process_time()
    fast = attnopt.optimize(
        about.model(), rewrite.of(seed), batches[0], dynamic_shapes=about.dynamic_shapes(), calibration=batches
    )
    seconds = time.process_time() - start
    return {**about.figures(fast), "seconds": seconds}


class Kept:
    """What has been measured before, by the subject, what is left, the method and the seed."""

    def __init__(self, fresh: bool) -> None:
        KEPT.parent.mkdir(exist_ok=True)
        if fresh:
            KEPT.unlink(missing_ok=True)
        lines = KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else []
        self.found: dict[tuple[Any, ...], dict[str, float]] = {tuple(k): v for k, v in map(json.loads, lines)}

    def get(self, key: tuple[Any, ...], measure: Any) -> dict[str, float]:
        if key not in self.found:
            self.found[key] = measure()
            with KEPT.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.found[key]]) + "\n")
            print(*key, {k: round(v, 4) for k, v in self.found[key].items()}, flush=True)
        return self.found[key]


def row(left: str, method: str, figures: Sequence[Mapping[str, float]], drawn: str) -> dict[str, Any]:
    """Means over the seeds, and how far the seeds are apart."""
    of = [f[drawn] for f in figures]
    means = {name: statistics.mean(f[name] for f in figures) for name in figures[0]}
    return {"left": left, "method": method, **means, "seeds": len(figures), "apart": max(of) - min(of)}


def draw(name: str, rows: Sequence[Mapping[str, Any]], drawn: str) -> None:
    def paint(_: Any, axes: Any) -> None:
        shown = [r for r in rows if r["left"] != "all"]
        axes.barh([f"{r['left']}: {r['method']}" for r in shown], [r[drawn] for r in shown])
        axes.axvline(rows[0][drawn], color="black", linewidth=0.8, label="original")
        axes.tick_params(axis="y", labelsize=4)
        axes.set(xlabel=drawn)
        axes.legend()
        axes.invert_yaxis()

    picture(f"quality_{name}", paint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", choices=SUBJECTS, action="append", help="all of them unless given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--defaults", action="store_true", help="only the default of each pass")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    arguments = parser.parse_args()
    one_thread()
    kept = Kept(arguments.fresh)
    for name in arguments.subject or SUBJECTS:
        about = subject(name)
        whole = kept.get((name, "all", "original", 0), lambda: {**about.figures(about.model()), "seconds": 0.0})  # noqa: B023
        rows = [row("all", "original", [whole], about.drawn)]
        for rewrite in about.rewrites():
            if arguments.defaults and not rewrite.method.startswith("default"):
                continue
            found = [
                kept.get((name, rewrite.left, rewrite.method, seed), lambda: measured(about, rewrite, seed))  # noqa: B023
                for seed in range(arguments.seeds if rewrite.varies else 1)
            ]
            rows.append(row(rewrite.left, rewrite.method, found, about.drawn))
        publish(f"quality_{name}", rows, about.title, digits=3)
        draw(name, rows, about.drawn)


if __name__ == "__main__":
    main()
