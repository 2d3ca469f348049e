"""The policy of the demo: a window in the layers that look nearest, a head less in the others, chosen on news texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from attnopt.base.progress import working

if TYPE_CHECKING:
    from torch import nn

    from attnopt.ir.site import Site

# Half of the layers get a window, the other half lose their weakest head; this is fixed.  Which layers and which heads is
# decided by texts that are in none of the demo's test sets.
WINDOW, SINKS = 16, 1
PRUNED_PER_LAYER = 1


@dataclass(frozen=True)
class Chosen:
    """``distance``: how many tokens the heads of a site look away on average; ``importance`` of its heads; both on ``texts``
    texts."""

    policy: Mapping[str, object]
    distance: Mapping[str, float]
    importance: Mapping[str, tuple[float, ...]]
    texts: int

    def __str__(self) -> str:
        lines = [f"  How far heads look on average, in {self.texts} news texts, and what the attention gets:"]
        for name, distance in self.distance.items():
            heads = getattr(self.policy[name], "heads", None)
            what = f"a window of {WINDOW} to each side and {SINKS} sink" if heads is None else f"without heads {heads}"
            lines.append(f"  {name}   {distance:.0f} tokens   {what}")
        return "\n".join(lines)


def choose(model: nn.Module, tokenizer: object, texts: Sequence[str], sites: Sequence[Site]) -> Chosen:
    """The half of the sites that looks nearest gets the window, the other half loses its weakest head."""
    import attnopt
    from attnopt.cli.demo_data import tokens
    from attnopt.passes.local_window import LocalWindow
    from attnopt.passes.prune_heads import PruneHeads

    ordered = sorted(texts, key=len)
    batches = [tokens(tokenizer, ordered[i : i + 4]) for i in range(0, len(ordered), 4)]
    with working("measuring heads"):
        importance = attnopt.head_importance(model, batches, "output-norm")
        far = attnopt.head_importance(model, batches, "distance")
    distance = {site.name: fmean(far[site.name]) for site in sites}
    windowed = sorted(distance, key=distance.__getitem__)[: len(distance) // 2]
    window = LocalWindow(left=WINDOW, right=WINDOW, sinks=SINKS)
    weakest = {site.name: _weakest(importance[site.name], site.spec.heads) for site in sites}
    policy = {name: window if name in windowed else PruneHeads(heads=weakest[name]) for name in weakest}
    return Chosen(policy, distance, dict(importance), len(texts))


def _weakest(scores: Sequence[float], heads: Sequence[int]) -> tuple[int, ...]:
    """The heads that add least to the output of their layer."""
    ranked = sorted(zip(scores, heads, strict=True))
    return tuple(sorted(head for _, head in ranked[:PRUNED_PER_LAYER]))
