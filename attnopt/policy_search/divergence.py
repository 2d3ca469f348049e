"""How far a model's outputs are from those of the original: KL divergence of logits, cosine distance of embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.base.closeness import tensors
from attnopt.errors import CalibrationError
from attnopt.policy_search.judge import Part

KINDS = ("auto", "kl", "cosine")
HELD = 1 << 28  # bytes of the original's outputs that are kept, over all pieces of the data
ROWS = 1 << 22  # numbers that are compared at a time
HEADS = ("logits", "lm_head", "classifier", "score")  # what models call their last layer if it gives logits
STATES = ("last_hidden_state", "pooler_output", "hidden_states")


@dataclass(frozen=True)
class Reference:
    """``rows``: which vectors of the output count; ``wanted``: the original's, as they are compared."""

    rows: Tensor
    wanted: Tensor


class Divergence:
    """The mean over tokens, on pieces of data of which the original's outputs are known.

    Of large outputs a part of the tokens is kept, drawn once: the memory is bounded.
    """

    def __init__(self, kind: str, pieces: int, seed: int) -> None:
        self.kind, self.pieces, self.seed = kind, pieces, seed
        self.references: dict[int, Reference] = {}

    def learn(self, piece: int, output: Any, real: Sequence[Tensor] = ()) -> None:
        """The original's output on this piece.  ``real``: masks [B, L] of tokens that are no padding; the first that fits counts.

        Raises CalibrationError."""
        x = self._chosen(output)
        counted = next((m.to(x.device) for m in real if x.dim() > 2 and m.shape == x.shape[:2]), None)
        flat = x.reshape(-1, x.shape[-1])
        if counted is None:
            rows = torch.arange(len(flat), device=x.device)
        else:
            each = counted.reshape(*counted.shape, *[1] * (x.dim() - 3)).expand(x.shape[:-1])
            rows = each.reshape(-1).nonzero().flatten()
        most = max(1, HELD // (self.pieces * 4 * flat.shape[-1]))
        if len(rows) > most:
            generator = torch.Generator().manual_seed(self.seed * 1009 + piece)
            rows = rows[torch.randperm(len(rows), generator=generator)[:most].sort().values.to(rows.device)]
        if not len(rows):
            raise CalibrationError(f"piece {piece} of the calibration data holds nothing but padding", hint="remove it")
        wanted = flat[rows].float()
        if not bool(torch.isfinite(wanted).all()):
            raise CalibrationError(
                f"the model's own output is not finite on piece {piece} of the calibration data",
                hint="remove such batches",
            )
        self.references[piece] = Reference(rows, wanted.clone())

    def of(self, piece: int, output: Any) -> Part:
        """(the sum over tokens, how many they are); infinite if the output is not finite."""
        reference = self.references[piece]
        x = self._chosen(output)
        got = x.reshape(-1, x.shape[-1])[reference.rows].float()
        total = 0.0
        step = max(1, ROWS // got.shape[-1])
        for i in range(0, len(got), step):
            total += self._sum(got[i : i + step].double(), reference.wanted[i : i + step].double())
        return (total if math.isfinite(total) else math.inf), float(len(got))

    def _sum(self, got: Tensor, wanted: Tensor) -> float:
        if self.kind == "kl":
            p, q = wanted.log_softmax(-1), got.log_softmax(-1)
            return float((p.exp() * (p - q)).sum(-1).clamp_min(0.0).sum())
        return float((1.0 - torch.cosine_similarity(got, wanted, dim=-1)).clamp_min(0.0).sum())

    def _chosen(self, output: Any) -> Tensor:
        found = chosen(output)[1]
        if found.dim() < 2:
            found = found.reshape(1, -1)
        return found


def chosen(output: Any) -> tuple[str, Tensor]:
    """The tensor that is compared, and its name, "" if it has none: logits, else hidden states, else the first of floats.

    Raises CalibrationError."""
    members: Mapping[str, Any] = {}
    if not isinstance(output, Tensor):
        members = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}
    for name in ("logits", *STATES):
        found = members.get(name)
        found = found[-1] if isinstance(found, (tuple, list)) and found else found
        if isinstance(found, Tensor) and found.is_floating_point():
            return name, found
    found = next((t for t in tensors(output) if t.is_floating_point() and t.dim() and t.numel()), None)
    if found is None:
        raise CalibrationError(
            "the output of the model holds no tensor of real numbers to compare",
            hint="pass evaluate=, a function of the model",
        )
    return "", found


def kind_of(output: Any, last_module: str) -> str:
    """ "kl" if the output is called logits, or comes from a module that is called like one that gives logits."""
    name, _ = chosen(output)
    last = last_module.rpartition(".")[2]
    return "kl" if name == "logits" or (not name and last in HEADS) else "cosine"
