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
RANDOM = "random words"


@dataclass(frozen=True)
class Method:
    """``home``: the domain of the calibration data, or "random words".  ``widened``: with random tokens beside it."""

    left: str
    name: str
    policy: Any
    home: str = "news"
    widened: bool = True


def methods(model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> Iterator[Method]:
    left = "6 of 12 heads"
    yield Method(left, "weights, none", PruneHeads(0.5, importance="weights", compensate="none", budget="site"), "none")
    yield Method(left, "flap, bias", PruneHeads(0.5, importance="flap", compensate="bias", budget="site"))
    yield from _default(left, PruneHeads(0.5))
    left = "12 -> 6 KV heads"
    yield Method(left, "svd of the weights", policy(attnopt.inspect(model, example).sites, 6), "none")
    yield Method(left, "default without random tokens", GroupedQuery(6), widened=False)
    yield from _default(left, GroupedQuery(6))


def _default(left: str, rewrite: Any) -> Iterator[Method]:
    for home in ("news", "documentation", RANDOM):
        yield Method(left, "default", rewrite, home)


def calibration(about: MiniLM, home: str) -> Batches:
    """Of random words: as many and as long as the news."""
    if home != RANDOM:
        return about.batched(domains.texts("news" if home == "none" else home)[:CALIBRATED])
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
    print(*found.values(), sep="  ", flush=True)
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
    rows += [row(about, m, judged, dense) for m in methods(about.model(), judged["news"][0])]
    publish(
        "travel",
        rows,
        "Fits on other domains: MiniLM against its own dense outputs: mean cosine / 5th percentile / Spearman",
    )


if __name__ == "__main__":
    main()
