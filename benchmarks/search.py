"""`attnopt.search` against other ways to choose, on trained models at equal budgets: how far each diverges on other data.

`--subject minilm --budget latency=0.6 --seeds 3`; what has been measured is kept in build/search/, so that an interrupted run
goes on where it stopped.  Needs what `make bench` installs, and scipy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import one_thread, picture, publish
from quality import subject
from search_baselines import METHODS, OF_ONE, REPAIRING, found_by, of_one_family
from subjects import domains
from subjects.rxnmapper import UNSEEN

import attnopt
from attnopt.base.call_inputs import CallInputs
from attnopt.capture.calibration import Calibration
from attnopt.cli.demo_policy import sequences
from attnopt.policy_search.divergence import Divergence
from attnopt.policy_search.engine import Engine
from attnopt.policy_search.judge import Judge, Known, Part
from attnopt.policy_search.menu import Menu
from attnopt.policy_search.outputs import Candidate
from attnopt.policy_search.problem import Problem, Task, problem
from attnopt.policy_search.refits import REFITS

FOLDER = Path("build") / "search"
BUDGETS = {  # two for each subject; MiniLM and SmolLM2 at the lengths where windows save time
    "minilm": ("latency=0.85", "latency=0.7"),
    "vit": ("flops=0.6", "flops=0.8"),
    "smollm2": ("kv_bytes=0.5", "latency=0.85"),
    "rxnmapper": ("flops=0.7", "latency=0.8"),
}
AT: dict[str, Any] = {"minilm": (1, 512)}
KINDS = {"minilm": "cosine", "vit": "kl", "smollm2": "kl", "rxnmapper": "kl"}
LENGTH, NEWS = 512, 16  # tokens of MiniLM's texts, and how many texts: of 12, three judge, which tell too little
ELSEWHERE = ("documentation", "glosses", "code")  # beside film reviews, what MiniLM is tested on
COLUMNS = ("evaluations", "held back", "other data", "cost, of the original", "measured", "seconds")
IMAGES = 1200  # to search on and to test on
DRAWS = 4  # of the hidden tokens of each reaction
HELD_OUT = 8  # batches that neither fits nor searches have seen, of each domain


def asked_for(name: str, text: str) -> attnopt.Budget:
    resource, _, share = text.partition("=")
    return attnopt.Budget(**{resource: float(share)}, at=AT.get(name))


def data_of(about: Any, name: str, seed: int) -> tuple[list[Any], list[Any]]:
    """Batches to search on, and others of other domains or parts: for MiniLM texts as long as the call that counts."""
    if name == "rxnmapper":
        drawn = [b for n in range(DRAWS) for b in about.calibration(seed + 1000 * n)]
        return drawn, list(about.calibration(seed, UNSEEN))
    if name != "minilm":
        batches = list(about.calibration(seed, IMAGES) if name == "vit" else about.calibration(seed))
        count = min(HELD_OUT, len(batches) // 3)
        return batches[:-count], batches[-count:]
    texts = list(about.data.background)
    random.Random(seed).shuffle(texts)
    others = [about.reviews(), *map(domains.texts, ELSEWHERE)]
    tested = [text for own in others for text in sequences(about.tokenizer, own, HELD_OUT, LENGTH)]
    return sequences(about.tokenizer, texts, NEWS, LENGTH), tested


@dataclass(frozen=True)
class Test:
    """Data to test on, with the outputs of the original."""

    batches: Sequence[Any]
    apart: Divergence


def asked_of(name: str, text: str, seed: int) -> tuple[Problem, Test]:
    """What is searched, and data to test on."""
    about = subject(name)
    fitted, test = data_of(about, name, seed)
    path = FOLDER / f"{name}-{text.partition('=')[0]}-{seed}.state.json"
    task = Task(
        about.model(), None, CallInputs.of(fitted[0], None), Calibration.of(fitted), asked_for(name, text),
        divergence=KINDS[name], dynamic_shapes=about.dynamic_shapes(), seed=seed,
    )  # fmt: skip
    apart = Divergence(KINDS[name], len(test), 0)
    with torch.no_grad():
        for i, batch in enumerate(test):
            apart.learn(i, about.model()(*batch))
    return problem(task, path), Test(test, apart)


def row(asked: Problem, method: str, seed: int, evaluations: int, test: Test, known: Known) -> dict[str, Any]:
    """What a method finds with the same choices, costs and data as all others.  ``known``: of all that judge alike."""
    start = time.monotonic()
    found: list[tuple[float, Candidate, float]] = []  # of each menu: the value, what is found, and the evaluations
    for menu in menus(asked, method):
        judge = judge_of(asked, method, evaluations, known)
        refits = asked.refit_judge(lambda: False) if method in REPAIRING else None
        engine = Engine(menu, judge, asked.limits, asked.uniform, seed, refits=refits, fits=len(REFITS))
        picks = found_by(method.removesuffix(OF_ONE), engine)
        if picks is not None:
            spent, judge.is_limited = engine.spent, False
            found.append((judge.value(picks), Candidate(picks, engine.refit_of(picks)), spent))
    asked.state.save(at_once=True)
    if not found:
        return {"method": method, **dict.fromkeys(COLUMNS, float("nan"))}
    _, best, spent = min(found, key=lambda x: x[0])
    (resource,) = asked.limits
    home = asked.measure(best.picks, asked.judged.texts, best.refit)
    cost = asked.menu.cost(resource, best.picks)
    whole = (
        asked.check(best) if resource == "latency" else cost
    )  # of interleaved calls: what else runs slows both alike
    original = asked.menu.original[resource]
    values = (spent, mean(home), elsewhere(asked, best, test), cost / original, whole / original)
    return {"method": method, **dict(zip(COLUMNS, (*values, time.monotonic() - start), strict=True))}


def menus(asked: Problem, method: str) -> list[Menu]:
    if not method.endswith(OF_ONE):
        return [asked.menu]
    families = [[{p.name for p in a.passes} - {"fuse"} for a in place.alternatives] for place in asked.made.places]
    return of_one_family(asked.menu, families)


def judge_of(asked: Problem, method: str, evaluations: int, known: Known) -> Judge:
    """Only the search and what fits judge on random tokens, too; each evaluation counts as one."""
    if method.startswith("search") or method in REPAIRING:
        return Judge(asked.measure, asked.pieces, asked.state.values, evaluations, saved=asked.state.save)
    held = asked.judged.texts
    return Judge(
        lambda picks, pieces: asked.measure(picks, [held[piece] for piece in pieces]), len(held), known, evaluations
    )


def mean(parts: Sequence[Part]) -> float:
    return sum(total for total, _ in parts) / sum(n for _, n in parts)


def elsewhere(asked: Problem, found: Candidate, test: Test) -> float:
    """The divergence on data of the test, of the rewritten model itself."""
    model = asked.outputs.model(found)
    with torch.no_grad():
        return mean([test.apart.of(i, model(*batch)) for i, batch in enumerate(test.batches)])


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, and the gain of the search over each other method."""
    found: list[dict[str, Any]] = []
    for name, text in dict.fromkeys((r["subject"], r["budget"]) for r in rows):
        own = [r for r in rows if (r["subject"], r["budget"]) == (name, text)]
        means = {m: {k: statistics.mean(r[k] for r in own if r["method"] == m) for k in COLUMNS} for m in METHODS}
        best, seeds = means["search"], len(own) // len(METHODS)
        for m in METHODS:
            less = {
                f"less by the search, {k}": 1 - best[k] / (means[m][k] or math.nan) for k in ("held back", "other data")
            }
            found.append({"subject": name, "budget": text, "seeds": seeds, "method": m, **means[m], **less})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", action="append", choices=tuple(BUDGETS), help="repeatable; all by default")
    parser.add_argument("--budget", action="append", help="such as latency=0.6; repeatable")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=120)
    arguments = parser.parse_args()
    one_thread()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in arguments.subject or BUDGETS:
        for seed in arguments.seeds:
            searched(name, arguments.budget or BUDGETS[name], seed, arguments.evaluations)
    report()


def searched(name: str, budgets: Sequence[str], seed: int, evaluations: int) -> None:
    """Budgets of one resource share what was fitted and measured."""
    known: dict[str, tuple[Problem, Test, Known]] = {}
    for text in budgets:
        path = FOLDER / f"{name}-{text}-{seed}-{evaluations}.json"
        if path.exists():
            continue
        resource, start = text.partition("=")[0], time.monotonic()
        if resource not in known:
            known = {resource: (*asked_of(name, text, seed), {})}
        asked, test, values = known[resource]
        prepared = time.monotonic() - start
        asked.task = replace(asked.task, budget=asked_for(name, text))
        rows = [{"subject": name, "budget": text, "prepared": prepared} for _ in METHODS]
        for r, method in zip(rows, METHODS, strict=True):
            r |= row(asked, method, seed, evaluations, test, values)
            print(seed, {k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()}, flush=True)
        path.write_text(json.dumps(rows), encoding="utf-8")
        report()


def report() -> None:
    """Of all that was measured: an interrupted run leaves what it has."""
    rows = [r for path in sorted(FOLDER.glob("*-*-*-*.json")) for r in json.loads(path.read_text(encoding="utf-8"))]
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
