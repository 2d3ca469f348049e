"""Sparse attention against torch's dense SDPA of the same causality: how much of what a pattern leaves out is saved.

The share is the speed-up over dense attention, divided by the speed-up that the visible pairs alone would allow.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import alone, interleaved, let_transformers_import, memory, one_thread, picture, publish
from torch import Tensor

from attnopt.backends import block_gather
from attnopt.backends.attention_operator import attention
from attnopt.ir.operands import OperandTensors
from attnopt.ir.spec import AttentionSpec
from attnopt.patterns import BlockLayout, Causal, Dilated, Full, Neighborhood, Pattern, Strided, Window

H, D = 12, 64
WINDOW = 256  # keys, the query's own included


@dataclass(frozen=True)
class Form:
    name: str
    pattern: Pattern
    length: int
    is_causal: bool = True
    wanted: str = ""


def forms() -> Iterator[Form]:
    for length in (2048, 4096, 8192):
        yield Form("causal window 256", Window(WINDOW - 1, 0), length, wanted="80 %")
    yield Form("causal window 64", Window(63, 0), 2048, wanted="60 %")
    yield Form("block-sparse 128, 1/8", _random_blocks(32, 4), 4096, is_causal=False, wanted="85 %")
    yield Form("neighbourhood 13 x 13 of 64 x 64", Neighborhood((64, 64), 13), 4096, is_causal=False, wanted="60 %")
    yield Form("dilated window 64, step 8", Dilated(63, 0, 8), 4096)
    yield Form("strided 64", Causal() & Strided(64), 4096)
    yield Form("causal, nothing left out", Causal(), 4096)
    yield Form("all pairs", Full(), 4096, is_causal=False)


def _random_blocks(rows: int, kept: int) -> Pattern:
    order = torch.rand(rows, rows, generator=torch.Generator().manual_seed(0)).argsort(1)
    return BlockLayout((order < kept).int().tolist(), 128)


def operands(length: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, H, length, D).unbind()
    return q, k, v


def kernel(form: Form, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    text, heads = form.pattern.to_json(), list(range(H))
    return lambda: attention(q, k, v, None, None, None, text, heads, D**-0.5, None)


def gathered(form: Form, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    heads = tuple(range(H))
    spec = AttentionSpec(heads, heads, heads, D, D, D**-0.5, form.pattern)
    return lambda: block_gather.attend(spec, OperandTensors(q, k, v))


def flex(form: Form, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """torch's FlexAttention, compiled, as its documentation says: a window as a predicate, blocks as indices."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    if isinstance(form.pattern, Window):
        left = form.pattern.left

        def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (i - j <= left)

        mask = create_block_mask(near, None, None, form.length, form.length, device="cpu", BLOCK_SIZE=64)
    else:
        layout = form.pattern.layout(form.length, form.length, 128, 128)
        counts = torch.from_numpy(layout.row_ptr).diff().int().view(1, 1, -1)
        columns = torch.from_numpy(layout.cols).view(1, 1, layout.num_rows, -1)
        columns = F.pad(columns, (0, layout.num_cols - columns.shape[-1]))
        mask = BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=128)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def rows(rounds: int, with_flex: bool) -> Iterator[dict[str, Any]]:
    for form in forms():
        q, k, v = operands(form.length)
        calls: dict[str, Callable[[], Tensor]] = {
            "SDPA": lambda q=q, k=k, v=v, c=form.is_causal: F.scaled_dot_product_attention(q, k, v, is_causal=c),  # type: ignore[misc]
            "attnopt": kernel(form, q, k, v),
            "torch's operators": gathered(form, q, k, v),
        }
        if with_flex and form.name.startswith(("causal window", "block-sparse")):
            calls["FlexAttention"] = flex(form, q, k, v)
        expected = calls["attnopt"]()
        for name, call in calls.items():
            if name != "SDPA":
                torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)
        times = interleaved(calls, rounds)
        density = form.pattern.density(form.length, form.length)
        ideal = ((form.length + 1) / (2 * form.length) if form.is_causal else 1.0) / density
        row: dict[str, Any] = {
            "form": form.name,
            "S": form.length,
            "SDPA, ms": 1e3 * times.median("SDPA"),
            "ideal": ideal,
        }
        for name in ("attnopt", "torch's operators", "FlexAttention"):
            row[name] = "-" if name not in calls else f"{times.ratio('SDPA', name) / ideal:.0%}"
        row["wanted"] = form.wanted or "-"
        yield row


def growth(length: int) -> None:
    """In a process of its own: seconds and peak memory of one window attention, printed."""
    one_thread()
    q, k, v = operands(length)
    call = kernel(Form("", Window(WINDOW - 1, 0), length), q, k, v)
    with torch.no_grad():
        call()
        start = time.process_time()
        for _ in range(3):
            call()
        seconds = (time.process_time() - start) / 3
    print(json.dumps({"seconds": seconds, "peak": memory("VmHWM")}))


def growths() -> Iterator[dict[str, Any]]:
    for length in (2048, 4096, 8192, 16384, 32768, 65536):
        (one,) = alone("--growth", length)
        operands_mib = 4 * length * H * D * 4 / 2**20
        yield {
            "S": length,
            "ms": 1e3 * one["seconds"],
            "us a token": 1e6 * one["seconds"] / length,
            "peak MiB": one["peak"] / 2**20,
            "q, k, v, o MiB": operands_mib,
        }


def transformers_peers(rounds: int) -> Iterator[dict[str, Any]]:
    """Encoders that transformers ships with sparse attention, against a BERT of the same size with the same pattern."""
    from transformers import BertConfig, BertModel, BigBirdConfig, BigBirdModel, LongformerConfig, LongformerModel

    import attnopt
    from attnopt import recipes
    from attnopt.passes import Sparse

    length = 4096
    size = {"num_hidden_layers": 2, "vocab_size": 1000, "max_position_embeddings": length + 8}
    ids = torch.randint(5, 1000, (1, length), generator=torch.Generator().manual_seed(0))
    dense = BertModel(BertConfig(**size), add_pooling_layer=False).eval()
    longformer = LongformerModel(LongformerConfig(**size, attention_window=512), add_pooling_layer=False).eval()
    bigbird = BigBirdModel(BigBirdConfig(**size, block_size=64, num_random_blocks=3), add_pooling_layer=False).eval()
    patterns = {
        "Longformer, window 512, 1 global": (longformer, recipes.longformer(512, global_tokens=(0,))),
        "BigBird, 64-token blocks, 3 random": (bigbird, recipes.bigbird(64, blocks=length // 64)),
    }
    for name, (peer, pattern) in patterns.items():
        fast = attnopt.optimize(dense, Sparse(pattern), (ids,))
        calls = {
            "dense": lambda: dense(ids),
            "peer": lambda peer=peer: peer(ids),
            "attnopt": lambda fast=fast: fast(ids),
        }
        times = interleaved(calls, rounds)
        yield {
            "model": name,
            "dense BERT, ms": 1e3 * times.median("dense"),
            "transformers / dense": times.ratio("peer", "dense"),
            "attnopt / dense": times.ratio("attnopt", "dense"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which compiles for a while")
    parser.add_argument("--growth", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.growth:
        growth(options.growth)
        return
    one_thread()
    let_transformers_import()
    torch.manual_seed(0)
    with torch.no_grad():
        shares = list(rows(options.rounds, not options.no_flex))
        publish("sparse_speed", shares, "Share of the speed-up that the visible pairs allow, over torch SDPA")
        publish("sparse_models", list(transformers_peers(options.rounds)), "Sparse encoders of two layers, 4096 tokens")
    grown = list(growths())
    publish("sparse_growth", grown, "Causal window of 256 keys: time and memory by length")
    picture("sparse_growth", lambda figure, axes: _draw(axes, grown), panels=2)


def _draw(axes: Any, grown: list[dict[str, Any]]) -> None:
    lengths = [row["S"] for row in grown]
    axes[0].loglog(lengths, [row["ms"] for row in grown], "o-", label="measured")
    axes[0].loglog(lengths, [grown[0]["ms"] * s / lengths[0] for s in lengths], ":", label="linear")
    axes[0].set(xlabel="tokens", ylabel="ms, one thread")
    axes[0].legend()
    axes[1].plot(lengths, [row["peak MiB"] for row in grown], "o-", label="peak of the process")
    axes[1].plot(lengths, [row["q, k, v, o MiB"] for row in grown], ":", label="q, k, v and output alone")
    axes[1].set(xlabel="tokens", ylabel="MiB")
    axes[1].legend()


if __name__ == "__main__":
    main()
