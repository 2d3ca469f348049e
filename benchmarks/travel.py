"""How far a fit travels: MiniLM, calibrated on news, with half of its heads or of its key/value heads, on five domains.

Calibration has seen none of the texts, and of one domain other texts.  Nothing is timed.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from common import one_thread, publish
from subjects import domains
from subjects.minilm import Batches, MiniLM, Vectors, agreement, embedded
from subjects.weights_svd import policy

import attnopt
from attnopt.ir import activations
from attnopt.passes import GroupedQuery, PruneHeads

TEXTS = 60  # of each domain, to judge on
CALIBRATED = 160
TITLE = "Fits on other domains: MiniLM against its own dense outputs: mean cosine / 5th percentile / Spearman"
RANDOM, NONE = "random words", "nothing"


@dataclass(frozen=True)
class Method:
    """``home``: the domain of the calibration data, "random words" or "nothing".  ``widened``: with random tokens beside it."""

    left: str
    name: str
    policy: Any
    home: str = "news"
    widened: bool = True


def methods(model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> Iterator[Method]:
    pruned, grouped = "6 of 12 heads", "12 -> 6 KV heads"
    yield Method(grouped, "default without random tokens", GroupedQuery(6), widened=False)
    yield Method(grouped, "default", GroupedQuery(6))
    yield Method(pruned, "default", PruneHeads(0.5))
    yield Method(grouped, "svd of the weights", policy(attnopt.inspect(model, example).sites, 6), NONE)
    yield Method(pruned, "weights, none", PruneHeads(0.5, importance="weights", compensate="none", budget="site"), NONE)
    yield Method(pruned, "flap, bias", PruneHeads(0.5, importance="flap", compensate="bias", budget="site"))
    for home in (RANDOM, "documentation"):
        yield Method(pruned, "default", PruneHeads(0.5), home)
        yield Method(grouped, "default", GroupedQuery(6), home)


def calibration(about: MiniLM, home: str) -> Batches:
    """Of random words: as many and as long as the news."""
    if home != RANDOM:
        return about.batched(domains.texts("news" if home == NONE else home)[:CALIBRATED])
    words = [t for t in about.tokenizer.get_vocab() if t.isalpha()]
    drawn = random.Random(0)
    return about.batched([" ".join(drawn.choices(words, k=len(t.split()))) for t in domains.texts("news")[:CALIBRATED]])


def row(about: MiniLM, method: Method, judged: Mapping[str, Batches], dense: Mapping[str, Vectors]) -> dict[str, Any]:
    """By domain: the mean cosine to the dense outputs, its fifth percentile, and Spearman's rho of all similarities."""
    batches = calibration(about, method.home)
    given = {"dynamic_shapes": about.dynamic_shapes(), "calibration": batches}
    with mock.patch.object(activations, "INVENTED", activations.INVENTED if method.widened else 0.0):
        fast = attnopt.optimize(about.model(), method.policy, batches[0], **given)
    found: dict[str, Any] = {"left": method.left, "method": method.name, "calibrated on": method.home}
    for domain, texts in judged.items():
        got = embedded(fast, texts)
        cosine, rho = agreement(got, dense[domain])
        worst = float(np.percentile((got * dense[domain]).sum(1), 5))
        found[domain] = f"{cosine:.3f} / {worst:.3f} / {rho:.3f}"
    return found


def distances(about: MiniLM, home: str, judged: Mapping[str, Batches]) -> dict[str, Any]:
    found: dict[str, Any] = {"left": "all", "method": "distance", "calibrated on": home}
    for domain, texts in judged.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", attnopt.AttnoptWarning)
            by_site = attnopt.calibration_distance(about.model(), calibration(about, home), texts)
        found[domain] = f"{sum(by_site.values()) / len(by_site):.1f}"
    return found


def main() -> None:
    one_thread()
    about = MiniLM()
    judged = {domain: about.batched(domains.texts(domain)[-TEXTS:]) for domain in domains.DOMAINS}
    dense = {domain: embedded(about.model(), texts) for domain, texts in judged.items()}
    rows = [distances(about, "news", judged)]
    for method in methods(about.model(), judged["news"][0]):
        rows.append(row(about, method, judged, dense))
        publish("travel", rows, TITLE)  # an interrupted run leaves what it has


if __name__ == "__main__":
    main()
