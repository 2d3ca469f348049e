"""How much attention do the blocks keep that each kind of block scores chooses?  At equal budgets, on texts that nothing was
fitted to: MiniLM (512 tokens, 32 a block, all layers) and SmolLM2 (1024 tokens, 64 a block, every sixth layer).

"multiplications" counts those that the scores take for a query and a key, divided by those of their product.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import one_thread, publish
from torch import Tensor, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.compiler.layerwise_calibration import Stream
from attnopt.fit.fitted_blocks import fitted
from attnopt.ir.block_scores import Antidiagonal, BlockScores, KMeans, Pooled
from attnopt.ir.dynamic_blocks import DynamicBlocks
from attnopt.ir.low_rank_scores import LowRank
from attnopt.ir.routing_scores import Routing
from attnopt.ir.semantics import selected
from attnopt.match.find import find

KEEPS = (0.1875, 0.25, 0.5)  # of 16 blocks


@dataclass(frozen=True)
class Subject:
    """``batches``: the first ``fitted`` are calibration data, the scores are tested on the others."""

    name: str
    model: nn.Module
    batches: Sequence[Tensor]
    fitted: int
    block: int
    head_dim: int
    every: int = 1  # layer
    is_causal: bool = False


@dataclass(frozen=True)
class Random(BlockScores):
    def score(self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool) -> Tensor:
        g = torch.Generator().manual_seed(0)
        return torch.rand(*q_BHNTD.shape[:3], k_BHMTD.shape[2], generator=g)


@dataclass(frozen=True, eq=False)
class Best(BlockScores):
    """What the blocks truly get: no choice of this size keeps more."""

    mass: Tensor

    def score(self, q_BHNTD: Tensor, k_BHMTD: Tensor, known_NM: Tensor, is_causal: bool) -> Tensor:
        return self.mass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["minilm", "smollm2"], action="append")
    arguments = parser.parse_args()
    one_thread()
    for name in arguments.model or ["minilm", "smollm2"]:
        subject = minilm() if name == "minilm" else smollm2()
        title = (
            f"Attention recall of chosen blocks: {subject.name}, {subject.block} tokens a block, by the fraction kept"
        )
        publish(f"block_recall_{name}", _rows(subject), title, digits=4)


def _rows(subject: Subject) -> list[dict[str, Any]]:
    total: dict[str, dict[float, list[Tensor]]] = {}
    start = time.perf_counter()
    program = capture(subject.model, CallInputs((subject.batches[0],), {}))
    stream = Stream(
        program.module, find(program).found[:: subject.every], [CallInputs((x,), {}) for x in subject.batches]
    )
    for f, now in stream.sites():
        site = replace(f.site, activations=replace(now, batches=now.batches[: subject.fitted], memo={}))
        ways = {label: _made(site, selection) for label, (selection, _) in _ways(subject).items()}
        for o in now.batches[subject.fitted :]:
            mass = _mass(site.spec, o.q, o.k, subject.block)
            best = DynamicBlocks(Best(mass), 1.0, subject.block)
            for label, selection in {**ways, "best choice": best}.items():
                for keep in KEEPS:
                    kept = selected(replace(site.spec, selection=replace(selection, keep=keep)), o.q, o.k)
                    total.setdefault(label, {}).setdefault(keep, []).append((mass * kept).sum() / mass.sum())
        print(f"{site.name} {time.perf_counter() - start:.0f} s", flush=True)
    costs = {label: cost for label, (_, cost) in _ways(subject).items()}
    return [
        {
            "scores": label,
            **{f"keep {keep}": float(torch.stack(found).mean()) for keep, found in by_keep.items()},
            "multiplications": f"1/{1 / cost:.0f}" if (cost := costs.get(label, 0.0)) else "",
        }
        for label, by_keep in total.items()
    ]


def _made(site: Any, selection: DynamicBlocks) -> DynamicBlocks:
    return fitted(site, selection) if selection.scores.needs_calibration else selection


def _ways(subject: Subject) -> dict[str, tuple[DynamicBlocks, float]]:
    """The selections, and the multiplications of their scores."""
    block, D = subject.block, subject.head_dim

    def of(scores: BlockScores, **options: Any) -> DynamicBlocks:
        return DynamicBlocks(scores, 1.0, block, **options)

    def low_rank(rank: int, queries: int, keys: int) -> tuple[DynamicBlocks, float]:
        return of(LowRank(rank, queries, keys)), rank / (D * queries * keys)

    routing = {"routing(balanced=False)": (of(Routing(balanced=False)), 0.0)}
    if not subject.is_causal:
        routing["routing"] = (of(Routing()), 0.0)
    return {
        "random": (of(Random()), 0.0),
        "nearest blocks": (of(Pooled(), local_heads=range(64)), 0.0),
        "kmeans": (of(KMeans()), 0.0),
        "pooled": (of(Pooled()), 1 / block**2),
        "antidiagonal": (of(Antidiagonal()), 1 / 8),
        **{f"low-rank(rank={r})": low_rank(r, 8, 1) for r in (2, 4, 8, 16)},
        **{f"low-rank(rank={r}, keys=8)": low_rank(r, 8, 8) for r in (8, 16)},
        f"low-rank(rank=8, queries={block}, keys={block})": low_rank(8, block, block),
        **routing,
    }


def _mass(spec: Any, q_BHLD: Tensor, k_BGSD: Tensor, block: int) -> Tensor:
    B, H, L, _ = q_BHLD.shape
    s = spec.scale * q_BHLD @ k_BGSD[:, list(spec.kv_of_head)].mT
    if spec.is_causal:
        s = s.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)
    return s.softmax(-1).reshape(B, H, L // block, block, L // block, block).sum((3, 5))


def smollm2() -> Subject:
    from smollm2 import Logits, news, trained

    batches = list(_pieces(news(), 1024))[::3]
    return Subject("SmolLM2-135M", Logits(trained()).eval(), batches[:9], 6, 64, 64, every=6, is_causal=True)


def minilm() -> Subject:
    from attnopt.cli import demo_data

    model, tokenizer = demo_data.load_encoder()
    ids = tokenizer(" ".join(demo_data.load_data().background), return_tensors="pt", verbose=False).input_ids[0]
    return Subject("MiniLM", _Ids(model), list(_pieces(ids, 512))[:30], 20, 32, 32)


class _Ids(nn.Module):
    """The encoder of texts without padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        return self.model(input_ids, torch.ones_like(input_ids))


def _pieces(ids: Tensor, length: int) -> Iterator[Tensor]:
    for start in range(0, len(ids) - length, length):
        yield ids[start : start + length].unsqueeze(0)


if __name__ == "__main__":
    main()
