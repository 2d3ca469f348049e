"""One attention in ONNX Runtime, dense and sparse: CPU time against torch's of the same causality."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, one_thread, options, publish
from onnx_sessions import runner

from attnopt.backends import Blocked
from attnopt.capture.signature import Signature
from attnopt.compiler.origin import Origin
from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export.export import export_onnx
from attnopt.patterns import BlockLayout, Causal, Full, Pattern, Sinks, Window
from attnopt.report.report import Report

HEADS, DIM = 12, 64


class Attention(torch.nn.Module):
    """Between the layouts that projections have: [1, S, H * D]."""

    def __init__(self, pattern: Pattern) -> None:
        super().__init__()
        heads = tuple(range(HEADS))
        self.attend = Blocked().lower(AttentionSpec(heads, heads, heads, DIM, DIM, DIM**-0.5, pattern))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = map(by_head, (q, k, v))
        return self.attend(q, k, v, bias=None, mask=None, sinks=None).transpose(1, 2).flatten(2)


def by_head(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def in_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> torch.Tensor:
    o = F.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v), is_causal=is_causal)
    return o.transpose(1, 2).flatten(2)


def exported(pattern: Pattern, args: tuple[torch.Tensor, ...], file: Path) -> str:
    """Writes the file; the form that the attention took."""
    gm = torch.export.export(Attention(pattern), args, strict=False).run_decompositions({}).module()
    origin = Origin(Report(sites=()), (), Signature((), (), ()), args, {})
    export_onnx(gm, origin, file, flavor="onnxruntime", opset=None, external_data="auto", verify=True)
    import onnx

    said = {p.key: p.value for p in onnx.load(file).metadata_props}
    return str(json.loads(said["attnopt.attention"])[0]["form"])


def scattered(length: int, block: int = 128, share: int = 8) -> Pattern:
    """The same number of random blocks in each row of blocks."""
    blocks = length // block
    random = torch.Generator().manual_seed(0)
    table = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in table:
        row[torch.randperm(blocks, generator=random)[: blocks // share]] = True
    return BlockLayout(table.tolist(), block)


ATTENTIONS: list[tuple[str, bool, tuple[int, ...], Callable[[int], Pattern]]] = [
    ("dense", False, (512, 2048, 4096), lambda n: Full()),
    ("dense, causal", True, (512, 2048, 4096), lambda n: Causal()),
    ("causal window 256", True, (2048, 4096, 8192), lambda n: Window(255, 0)),
    ("causal window 64", True, (2048,), lambda n: Window(63, 0)),
    ("causal window 256 and 4 sinks", True, (4096,), lambda n: Causal() & (Window(255, 0) | Sinks(4))),
    ("blocks of 128, 1/8", False, (4096,), scattered),
]


def attentions(rounds: int, only: str) -> Iterator[dict[str, Any]]:
    for name, is_causal, lengths, pattern_at in ATTENTIONS:
        for length in lengths if only in name else ():
            torch.manual_seed(0)
            pattern, args = pattern_at(length), tuple(torch.randn(3, 1, length, HEADS * DIM).unbind())
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                form = exported(pattern, args, Path(folder) / "m.onnx")
                ours = runner(Path(folder) / "m.onnx", list(args))
                calls = {"torch": lambda a=args, c=is_causal: in_torch(*a, is_causal=c), "attnopt": ours}
                times = interleaved(calls, max(5, rounds * 1024 // length))
            ideal = pattern.density(length, length) / (Causal().density(length, length) if is_causal else 1.0)
            ratio = times.ratio("attnopt", "torch")
            yield {
                "attention": name,
                "length": length,
                "form": form,
                "time / torch": ratio,
                "ideal": f"{ideal:.3f}",
                "share of ideal": f"{100 * ideal / ratio:.0f} %",
            }


def main() -> None:
    arguments = options(__doc__, 15, "attentions")
    one_thread()
    if alone := list(attentions(arguments.rounds, arguments.only)):
        publish("onnx_attention", alone, "One attention in ONNX Runtime: CPU time relative to torch's, 12 heads of 64")


if __name__ == "__main__":
    main()
