"""The policy of the demo: a window where it costs least, two heads less elsewhere, chosen on news texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnopt.base.progress import watched

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnopt.base.call_inputs import CallInputs
    from attnopt.cli.demo_data import Array
    from attnopt.ir.site import Site

# Half of the layers get a window, the other half lose their weakest heads; this is fixed.  Which layers and which heads is
# decided by texts that are in none of the demo's test sets.
WINDOW, SINKS = 16, 1
PRUNED_PER_LAYER = 2


@dataclass(frozen=True)
class Chosen:
    """``costs``: of a window on each site alone, the mean of 1 - cosine of the embeddings of ``judged`` texts; ``scored``: texts
    that the heads were scored on."""

    policy: Mapping[str, object]
    costs: Mapping[str, float]
    importance: Mapping[str, tuple[float, ...]]
    scored: int
    judged: int

    def __str__(self) -> str:
        lines = [
            f"  heads scored on {self.scored} news texts; on {self.judged} others 1 - cosine of the embeddings with a window on "
            "this attention alone, and what it gets"
        ]
        for name, cost in self.costs.items():
            heads = getattr(self.policy[name], "heads", None)
            what = f"a window of {WINDOW} to each side and {SINKS} sink" if heads is None else f"without heads {heads}"
            lines.append(f"  {name}   {cost:.4f}   {what}")
        return "\n".join(lines)


def choose(
    model: nn.Module, tokenizer: object, texts: Sequence[str], sites: Sequence[Site], shapes: object, inputs: CallInputs
) -> Chosen:
    """The cheaper half of the sites gets the window, the other half loses its weakest heads."""
    import attnopt
    from attnopt.cli.demo_data import tokens
    from attnopt.passes.local_window import LocalWindow
    from attnopt.passes.prune_heads import PruneHeads

    half = len(texts) // 2
    scored, judged = sorted(texts[:half], key=len), texts[half:]
    batches = [tokens(tokenizer, scored[i : i + 4]) for i in range(0, half, 4)]
    importance = attnopt.head_importance(model, batches, "output-norm")
    weakest = {site.name: _weakest(importance[site.name], site.spec.heads) for site in sites}
    window = LocalWindow(left=WINDOW, right=WINDOW, sinks=SINKS)
    own = _embedded(model, tokenizer, judged)
    costs: dict[str, float] = {}
    for name in watched(list(weakest), "trying a window on each layer"):
        changed = attnopt.optimize(model, {name: window}, *inputs, dynamic_shapes=shapes)
        costs[name] = float((1 - (own * _embedded(changed, tokenizer, judged)).sum(1)).mean())
    windowed = sorted(costs, key=costs.__getitem__)[: len(costs) // 2]
    policy = {name: window if name in windowed else PruneHeads(heads=weakest[name]) for name in weakest}
    return Chosen(policy, costs, dict(importance), len(scored), len(judged))


def _weakest(scores: Sequence[float], heads: Sequence[int]) -> tuple[int, ...]:
    """The heads that add least to the output of their layer."""
    ranked = sorted(zip(scores, heads, strict=True))
    return tuple(sorted(head for _, head in ranked[:PRUNED_PER_LAYER]))


def _embedded(model: nn.Module, tokenizer: object, texts: Sequence[str]) -> Array:
    import torch

    from attnopt.cli.demo_data import embed

    def encode(ids: Tensor, mask: Tensor) -> Array:
        with torch.inference_mode():
            vectors: Array = model(ids, mask).numpy()
            return vectors

    return embed(encode, tokenizer, texts)
