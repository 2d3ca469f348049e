"""Many spellings of attention in one model, exported in both flavors, with fixed and with free sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import oracle
import pytest
from models import LENGTH, Attention, Spelling, inputs
from onnx_core import run
from torch import Tensor, nn
from torch.export import Dim

import attnopt

CAUSAL = ("causal",)
SPELLINGS = [
    Spelling(packing="fused", order="qvk", unpack="slice", value_dim=3, kv_heads=2, mask=("given",), commuted=True),
    Spelling(packing="per-group", heads=6, kv_heads=2, core="grouped", softmax="late"),
    Spelling(op="einsum", core="einsum", scale="temperature", bias_kind="alibi", mask=CAUSAL),
    Spelling(op="conv1d", core="baddbmm", scale="alpha", bias_kind="addend"),
    Spelling(
        core="sdpa", heads=6, kv_heads=2, share="enable_gqa", norm="across", mask=("padding",), apply="masked_fill"
    ),
    Spelling(heads=6, kv_heads=2, share="tiled", rope="half", norm="rms", mask=("causal", "window")),
    Spelling(kv_heads=1, share="broadcast", rope="complex", softmax="lse"),
    Spelling(mask=("left",), apply="old-gpt", softcap=5.0),
    Spelling(bias_kind="table", sinks=True),
    Spelling(cross=True, mask=("padding",), apply="add-min"),
]


class Together(nn.Module):
    """Every spelling on the same inputs, each with an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Attention(s, seed=i) for i, s in enumerate(SPELLINGS))

    def forward(
        self, x: Tensor, memory: Tensor, padding: Tensor, memory_padding: Tensor, given: Tensor
    ) -> list[Tensor]:
        made = []
        for attention in self.attentions:
            cross, mask = attention.s.cross, attention.s.mask
            seen = (memory_padding if cross else padding) if "padding" in mask else None
            made.append(attention(x, memory if cross else None, seen, given if "given" in mask else None))
        return made


def example(batch: int, length: int) -> tuple[Tensor, ...]:
    own = inputs(Spelling(mask=("padding", "given")), length, batch)
    other = inputs(Spelling(cross=True, mask=("padding",)), length, batch)
    return own["x"], other["memory"], own["padding"], other["padding"], own["given"]


def free_sizes() -> tuple[dict[int, Any], ...]:
    batch, length = Dim("batch"), Dim("length", max=31)
    return {0: batch, 1: length}, {0: batch}, {0: batch, 1: length}, {0: batch}, {0: batch, 2: length, 3: length}


@pytest.fixture(scope="module")
def model() -> Together:
    return Together().eval()


@pytest.fixture(scope="module", params=[(2, LENGTH), None], ids=["fixed", "free"])
def fast(request: pytest.FixtureRequest, model: Together) -> tuple[attnopt.OptimizedModel, list[tuple[int, int]]]:
    """The optimized model, and the sizes of batch and sequence for which it is made."""
    shapes = free_sizes() if request.param is None else None
    made = attnopt.optimize(model, "fuse", example(2, LENGTH), dynamic_shapes=shapes)
    assert len(made.report.sites) == len(SPELLINGS)
    return made, [(2, LENGTH)] if request.param else [(2, LENGTH), (3, 11), (1, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("flavor", ["onnxruntime", "standard"])
def test_every_spelling_in_one_file(fast: Any, flavor: Any, model: Together, tmp_path: Path) -> None:
    made, sizes = fast
    path = tmp_path / "m.onnx"
    made.export_onnx(path, flavor=flavor)
    domains = {n.domain for n in onnx.load(path).graph.node}
    assert flavor == "onnxruntime" or domains <= {"", "ai.onnx"}
    for batch, length in sizes:
        x = example(batch, length)
        oracle.assert_same(run(path, x), oracle.run(model, x))
