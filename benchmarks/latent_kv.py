"""SmolLM2-135M whose keys and values are linear maps of fewer numbers, without training: perplexity on news, bytes of a cache."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import one_thread, publish
from onnx_decode import Whole
from subjects.smollm2 import TESTED, SmolLM2
from torch import Tensor, nn

import attnopt
from attnopt.base.closeness import difference
from attnopt.passes import LatentKv

FEW, PARTS = 24, (13, 1, 1, 9)  # tokens that are also given some at a time


class Logits(nn.Module):
    """Of token ids alone."""

    def __init__(self, fast: nn.Module) -> None:
        super().__init__()
        self.fast = fast

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.fast(**inputs(ids))
        return made


def inputs(ids: Tensor) -> dict[str, Tensor]:
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}


def measured(about: SmolLM2, model: Any, width: int, sequences: int) -> dict[str, Any]:
    batches = [inputs(ids) for (ids,) in about.calibration(0)[:sequences]]
    example, start = inputs(about.pieces[TESTED][:, :64].reshape(2, 32)), time.process_time()
    fast = attnopt.optimize(
        Whole(model), LatentKv(width), (), example, dynamic_shapes="auto", calibration=batches, strict=True
    )
    seconds, steps, few = time.process_time() - start, fast.latent_decoder(), about.pieces[0][:, :FEW]
    return {
        "a token keeps": width,
        "bytes of a token": steps.bytes_per_token,
        **about.figures(Logits(fast)),
        "seconds": seconds,
        "token by token": difference([in_parts(steps, few)], [Logits(fast)(few)]),
    }


def in_parts(steps: Any, ids: Tensor) -> Tensor:
    logits, past, end = [], None, 0
    for piece in ids.split(PARTS, 1):
        end += piece.shape[1]
        made, past = steps(piece, torch.ones_like(ids[:, :end]), past)
        logits.append(made)
    return torch.cat(logits, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[128], help="numbers of a token and layer; 384 now")
    parser.add_argument("--sequences", type=int, default=20, help="of 512 tokens, for calibration")
    options = parser.parse_args()
    one_thread()
    torch.set_grad_enabled(False)
    about = SmolLM2()
    model: Any = about.model()
    layers = model.model.config.num_hidden_layers
    rows: list[dict[str, Any]] = [
        {"a token keeps": 384, "bytes of a token": 384 * 4 * layers, **about.figures(model), "seconds": 0.0,
         "token by token": 0.0}
    ]  # fmt: skip
    for width in options.widths:
        rows.append(measured(about, model.model, width, options.sequences))
        print(rows[-1], flush=True)
    publish(
        "latent_kv",
        rows,
        f"SmolLM2-135M with latent keys and values, calibrated on {options.sequences} x 512 tokens",
        digits=6,
    )


if __name__ == "__main__":
    main()
