"""The policy of the demo: searched on news texts, within a share of the model's latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnopt.base.call_inputs import CallInputs
    from attnopt.policy_search.result import Search

Batches = list[tuple["Tensor", "Tensor"]]
LATENCIES = (0.85, 0.95)  # shares of the model's: the second where a window saves little on this processor
LENGTH = 512  # tokens of the call whose latency counts
TOKENS, COUNT = 256, 12  # of a sequence to fit to or to judge on, and how many: what a demo has time for
EVALUATIONS = 20


def searched(model: nn.Module, batches: Batches, inputs: CallInputs, shapes: object, latency: float) -> Search:
    """Which attention gets a window of 32 keys to each side and one sink, which loses a quarter of its heads, which both.

    ``batches``: of ``sequences``, of texts that are in none of the demo's test sets; ``latency``: a share of the model's.
    Raises PolicyError where no policy is so fast."""
    import attnopt
    from attnopt.passes.local_window import LocalWindow
    from attnopt.passes.prune_heads import PruneHeads

    near, fewer = LocalWindow(left=32, right=32, sinks=1), PruneHeads(0.25, budget="site")
    return attnopt.search(
        model,
        {"*": attnopt.Choice(None, near, fewer, [fewer, near])},
        *inputs,
        calibration=batches,
        budget=attnopt.Budget(latency=latency, at=(1, LENGTH)),
        dynamic_shapes=shapes,
        evaluations=EVALUATIONS,
    )


def sequences(tokenizer: Any, texts: Sequence[str], count: int = COUNT, tokens: int = TOKENS) -> Batches:
    """At most ``count`` batches of token ids and masks [1, tokens], each of texts one after the other."""
    made: Batches = []
    joined = ""
    for text in texts:
        joined = f"{joined} {text}"
        found = tokenizer(joined, truncation=True, max_length=tokens, return_tensors="pt")
        if found["input_ids"].shape[1] == tokens:
            made.append((found["input_ids"], found["attention_mask"]))
            joined = ""
        if len(made) == count:
            break
    return made
