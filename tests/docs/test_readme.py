"""The README's table of rewrites and where each can be deployed holds for a small decoder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

import attnopt
from attnopt.passes import (
    DynamicSparse,
    EvictKeys,
    GroupedQuery,
    LocalWindow,
    MixMap,
    PruneHeads,
    Replace,
    ScaleHeads,
    Sparse,
    Steer,
    Transplant,
)
from attnopt.patterns import Strided, Window

pytest.importorskip("transformers")
LENGTH = 16
EXAMPLES: dict[str, list[Any]] = {
    "exact: `fuse`": ["fuse"],
    "`local-window`": [LocalWindow(left=3)],
    "other patterns: `sparse`": [Sparse(Window(2) | Strided(4))],
    "`prune-heads`, `grouped-query`": [PruneHeads(heads=[1, 2]), GroupedQuery(2, merge="mean")],
    "`scale-heads`, `steer`": [ScaleHeads({1: 0.5}), Steer(torch.full((8,), 0.1))],
    "`evict-keys` by received attention": [EvictKeys("h2o", 12)],
    "blocks, rows or keys chosen by the input; maps, mixers, other runs": [
        DynamicSparse(keep=0.5, block=4),
        MixMap(torch.eye(LENGTH), gate=0.5),
        Replace("conv(kernel=3)"),
        Transplant(q="run"),
    ],
}


def table() -> dict[str, dict[str, bool]]:
    """Rewrite -> where -> whether it can be deployed there, as the README says."""
    text = (ROOT / "README.md").read_text("utf-8")
    (found,) = re.findall(r"^\| rewrite \|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    head, _, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in found.splitlines())
    where = [cell.strip("`") for cell in head[1:]]
    return {row[0]: dict(zip(where, (cell == "yes" for cell in row[1:]), strict=True)) for row in rows}


def decoder() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=50, attention_bias=True, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def inputs(batch: int) -> dict[str, Any]:
    ids = torch.randint(1, 50, (batch, LENGTH))
    positions = torch.arange(LENGTH).expand(batch, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions, "use_cache": False}


def optimized(policy: Any, dynamic: str | None = None) -> attnopt.OptimizedModel:
    data = [inputs(2) for _ in range(8)]
    return attnopt.optimize(decoder(), policy, (), data[0], dynamic_shapes=dynamic, calibration=data, strict=True)


def works(call: Callable[[], object]) -> bool:
    try:
        call()
    except attnopt.AttnoptError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")
@pytest.mark.parametrize("row", EXAMPLES)
def test_the_table_is_true(row: str, tmp_path: Path) -> None:
    said = table()[row]
    for i, policy in enumerate(EXAMPLES[row]):
        folder = tmp_path / str(i)
        folder.mkdir()
        calls = {
            "optimize": lambda p=policy: optimized(p),
            "export_onnx": lambda p=policy, f=folder: optimized(p).export_onnx(f / "m.onnx"),
            "convert": lambda p=policy: attnopt.convert(decoder(), p, inputs(2)["input_ids"], strict=True),
            "export_decoder": lambda p=policy, f=folder: optimized(p, "auto").export_decoder(
                f / "decoder", context_length=32, eos_token_id=0
            ),
        }
        assert {where: works(call) for where, call in calls.items()} == said, policy


def test_every_row_has_an_example() -> None:
    assert set(table()) == set(EXAMPLES)
