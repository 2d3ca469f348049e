"""`attnopt.search` against other ways to choose, on trained models at equal budgets: how far each diverges on other data.

`--subject minilm --budget latency=0.6 --seeds 3`; what has been measured is kept in build/search/, so that an interrupted run
goes on where it stopped.  Needs what `make bench` installs, and scipy.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import one_thread, picture, publish
from quality import subject
from search_baselines import METHODS, found_by

import attnopt
from attnopt.base.call_inputs import CallInputs
from attnopt.capture.calibration import Calibration
from attnopt.policy_search.divergence import Divergence
from attnopt.policy_search.engine import Engine
from attnopt.policy_search.judge import Judge
from attnopt.policy_search.menu import Picks
from attnopt.policy_search.problem import Problem, Task, problem

FOLDER = Path("build") / "search"
BUDGETS = {  # two for each subject; MiniLM and SmolLM2 at the lengths where windows save time
    "minilm": ("latency=0.6", "latency=0.8"),
    "vit": ("flops=0.6", "flops=0.8"),
    "smollm2": ("kv_bytes=0.5", "latency=0.85"),
    "rxnmapper": ("parameters=0.7", "latency=0.8"),
}
AT: dict[str, Any] = {"minilm": (1, 512)}
KINDS = {"minilm": "cosine", "vit": "kl", "smollm2": "kl", "rxnmapper": "kl"}
LENGTH = 512  # tokens of MiniLM's texts
HELD_OUT = 8  # batches that neither fits nor searches have seen


def asked_for(name: str, text: str) -> attnopt.Budget:
    resource, _, share = text.partition("=")
    return attnopt.Budget(**{resource: float(share)}, at=AT.get(name))


def data_of(about: Any, name: str, seed: int) -> tuple[list[Any], list[Any]]:
    """Batches to search on, and others of another domain or part: for MiniLM texts as long as the call that counts."""
    if name != "minilm":
        batches = list(about.calibration(seed))
        count = min(HELD_OUT, len(batches) // 3)
        return batches[:-count], batches[-count:]
    texts = list(about.data.background)
    random.Random(seed).shuffle(texts)
    return long_texts(about, texts, 12), long_texts(about, about.reviews(), HELD_OUT)


def long_texts(about: Any, texts: Sequence[str], count: int) -> list[Any]:
    """Texts one after the other, cut where they reach ``LENGTH`` tokens; one to a batch."""
    found, joined = [], ""
    for text in texts:
        joined = f"{joined} {text}"
        if len(about.tokenizer(joined)["input_ids"]) < LENGTH:
            continue
        ids = about.tokenizer(joined, truncation=True, max_length=LENGTH, return_tensors="pt")
        found.append((ids.input_ids, ids.attention_mask))
        joined = ""
        if len(found) == count:
            break
    return found


def compared(name: str, text: str, seed: int, evaluations: int) -> list[dict[str, Any]]:
    """One row for each method: what it finds with the same choices, measured costs and data."""
    about = subject(name)
    fitted, test = data_of(about, name, seed)
    path = FOLDER / f"{name}-{text}-{seed}.state.json"
    task = Task(
        about.model(), None, CallInputs.of(fitted[0], None), Calibration.of(fitted), asked_for(name, text),
        divergence=KINDS[name], dynamic_shapes=about.dynamic_shapes(), seed=seed,
    )  # fmt: skip
    asked = problem(task, path)
    return [row(asked, method, seed, evaluations, test, KINDS[name]) for method in METHODS]


def row(asked: Problem, method: str, seed: int, evaluations: int, test: Sequence[Any], kind: str) -> dict[str, Any]:
    start = time.monotonic()
    judge = Judge(asked.measure, asked.pieces, asked.state.values, evaluations, saved=asked.state.save)
    engine = Engine(asked.menu, judge, asked.limits, asked.uniform, seed)
    picks = found_by(method, engine)
    asked.state.save(at_once=True)
    if picks is None:
        return {"method": method, "held back": float("nan"), "other data": float("nan")}
    spent = judge.spent
    judge.is_limited = False
    return {
        "method": method,
        "evaluations": spent,
        "held back": judge.value(picks),
        "other data": elsewhere(asked, picks, test, kind),
        **{f"{r}, of the original": asked.menu.cost(r, picks) / asked.menu.original[r] for r in asked.limits},
        **measured(asked, picks),
        "seconds": time.monotonic() - start,
    }


def measured(asked: Problem, picks: Picks) -> dict[str, float]:
    if "latency" not in asked.limits:
        return {}
    return {"measured latency, of the original": asked.check(picks) / asked.menu.original["latency"]}


def elsewhere(asked: Problem, picks: Picks, test: Sequence[Any], kind: str) -> float:
    """The divergence on data of the test."""
    original, model = asked.made.model((0,) * asked.menu.places), asked.made.model(picks)
    apart = Divergence(kind, len(test), 0)
    total = count = 0.0
    with torch.no_grad():
        for i, batch in enumerate(test):
            apart.learn(i, original(*batch))
            part, n = apart.of(i, model(*batch))
            total, count = total + part, count + n
    return total / count


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, and the gain of the search over each other method."""
    found: list[dict[str, Any]] = []
    cases = dict.fromkeys((r["subject"], r["budget"]) for r in rows)
    for case in cases:
        own = [r for r in rows if (r["subject"], r["budget"]) == case]
        means = {
            m: {
                k: statistics.mean(r[k] for r in own if r["method"] == m)
                for k in own[0]
                if isinstance(own[0][k], float)
            }
            for m in METHODS
        }
        best = means["search"]["other data"]
        for m in METHODS:
            gain = 1 - best / means[m]["other data"] if means[m]["other data"] else 0.0
            found.append({"subject": case[0], "budget": case[1], "method": m, **means[m], "less by the search": gain})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", action="append", choices=tuple(BUDGETS), help="repeatable; all by default")
    parser.add_argument("--budget", action="append", help="such as latency=0.6; repeatable")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=120)
    arguments = parser.parse_args()
    one_thread()
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in arguments.subject or BUDGETS:
        for text in arguments.budget or BUDGETS[name]:
            for seed in range(arguments.seeds):
                path = FOLDER / f"{name}-{text}-{seed}-{arguments.evaluations}.json"
                if not path.exists():
                    own = compared(name, text, seed, arguments.evaluations)
                    path.write_text(json.dumps([{"subject": name, "budget": text, **r} for r in own]), encoding="utf-8")
                for r in json.loads(path.read_text(encoding="utf-8")):
                    rows.append(r)
                    print(seed, {k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()}, flush=True)
    found = summary(rows)
    publish("search", found, "Policies within a budget: how far the model diverges on other data", digits=4)
    picture("search", lambda figure, axes: draw(axes, found))


def draw(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    cases = list(dict.fromkeys((r["subject"], r["budget"]) for r in rows))
    for m in METHODS:
        values = [r["other data"] for r in rows if r["method"] == m]
        base = [max(r["other data"] for r in rows if (r["subject"], r["budget"]) == case) for case in cases]
        axes.plot(range(len(cases)), [v / (b or 1.0) for v, b in zip(values, base, strict=True)], "o", label=m)
    axes.set(xticks=range(len(cases)), ylabel="divergence, of the largest")
    axes.set_xticklabels([f"{s}\n{b}" for s, b in cases], fontsize="small")
    axes.legend(fontsize="small")


if __name__ == "__main__":
    main()
