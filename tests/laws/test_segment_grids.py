"""Segments of one size in a grid of tokens, as in axial attention and Group Pose: sequences of the batch, without a mask."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import oracle
import pytest
import torch
from call_models import HEADS, SIZE, Stack
from torch import Tensor, nn

import attnopt
from attnopt.graph.nodes import calls, opname
from attnopt.graph.sdpa import SDPA, sdpa_arguments
from attnopt.passes import GroupedQuery, LocalWindow, PruneHeads, Sparse
from attnopt.patterns import Segments

GRIDS = {
    "rows": ([n // 5 for n in range(15)], (3, 5, 1)),
    "columns": ([n % 5 for n in range(15)], (1, 3, 5)),
    "the middle of three axes": ([n // 6 * 2 + n % 2 for n in range(12)], (2, 3, 2)),
    "rows by other numbers": ([7, 7, 3, 3, 5, 5], (3, 2, 1)),
    "each token alone": ([0, 1, 2, 3], (4, 1, 1)),
    "all tokens together": ([0] * 6, (1, 6, 1)),
}
MOVES = {"index.Tensor", "index_select.default", "gather.default", "argsort.stable"}


def masks(module: attnopt.OptimizedModel) -> list[bool]:
    """Of each attention of torch in the graph, whether it has one."""
    nodes = [n for n in module.graph_module.graph.nodes if calls(n, [SDPA])]
    return [sdpa_arguments(n).attn_mask is not None for n in nodes]


def moves(module: attnopt.OptimizedModel) -> set[str]:
    return {opname(n) for n in module.graph_module.graph.nodes} & MOVES


@pytest.mark.parametrize("name", list(GRIDS))
def test_law_they_are_the_mask_without_a_mask(name: str, tmp_path: Path) -> None:
    ids, grid = GRIDS[name]
    assert Segments(ids).grid == grid
    model, x = Stack(), torch.randn(2, len(ids), HEADS * SIZE)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    fast = attnopt.optimize(model, Sparse(Segments(ids)), (x,), dynamic_shapes=shapes, backend="sdpa")
    assert masks(fast) == [False, False]
    assert not moves(fast)
    fast.export_onnx(tmp_path / "m.onnx")
    kinds = {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
    assert not kinds & {"Gather", "GatherElements", "GatherND", "Where", "Loop", "Softmax"}
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    seen = torch.tensor(ids)[:, None] == torch.tensor(ids)
    for batch in (2, 3):
        x = torch.randn(batch, len(ids), HEADS * SIZE)
        want = oracle.run_edited(model, (x,), None, {i: oracle.Edit(seen) for i in range(2)})
        oracle.assert_same(oracle.run(fast, (x,)), want)
        oracle.assert_same([torch.from_numpy(o) for o in session.run(None, {"x": x.numpy()})], want)


def test_they_compose_with_heads_that_go_and_share() -> None:
    ids, _ = GRIDS["columns"]
    model, x = Stack(), torch.randn(2, 15, HEADS * SIZE)
    policy = [PruneHeads(heads=[1]), Sparse(Segments(ids)), GroupedQuery(kv_heads=1, merge="first")]
    fast = attnopt.optimize(model, policy, (x,), backend="sdpa")
    want = attnopt.optimize(model, policy, (x,), backend="reference")
    assert masks(fast) == [False, False]
    oracle.assert_same(oracle.run(fast, (x,)), oracle.run(want, (x,)))
    again = attnopt.optimize(fast, PruneHeads(heads=[0]), (x,), backend="sdpa")
    assert [s.num_heads for s in again.sites] == [2, 2]


def test_the_cheapest_form_of_many_short_segments_is_theirs() -> None:
    """Without a note that all pairs were computed."""
    ids = [n // 8 for n in range(512)]
    fast = attnopt.optimize(Stack(), Sparse(Segments(ids)), (torch.randn(1, 512, HEADS * SIZE),))
    for site in fast.report.sites:
        assert site.backend == "sdpa"
        assert not site.notes


@pytest.mark.parametrize(
    "pattern",
    [
        Segments([0, 0, 0, 1, 1, 1], pairs=[(0, 0), (1, 1), (1, 0)]),
        Segments([0, 0, 1, 1, 1, 1]),
        Segments([0, 1, 1, 0, 2, 2]),
        Segments([0, 0, 1, 1, 0, 0]),
        Segments([0, 0, 0, 0, 1, 1]),
    ],
    ids=["some see others", "of two sizes", "in no order", "of two sizes, apart", "the last too short"],
)
def test_other_segments_keep_their_mask(pattern: Segments) -> None:
    model, x = Stack(), torch.randn(2, 6, HEADS * SIZE)
    assert pattern.grid is None
    fast = attnopt.optimize(model, Sparse(pattern), (x,), backend="sdpa")
    assert masks(fast) == [True, True]
    want = oracle.run_edited(model, (x,), None, {i: oracle.Edit(pattern.mask(6, 6)[0]) for i in range(2)})
    oracle.assert_same(oracle.run(fast, (x,)), want)


def test_what_tells_tokens_of_a_segment_apart_keeps_the_mask() -> None:
    """Another pattern, a causal model, a mask of padding."""
    ids, _ = GRIDS["rows"]
    model, x = Stack(), torch.randn(2, 15, HEADS * SIZE)
    fast = attnopt.optimize(model, [LocalWindow(1), Sparse(Segments(ids))], (x,), backend="sdpa")
    assert masks(fast) == [True, True]
    same = Segments(ids, pairs=[(i, i) for i in range(3)])
    assert same.grid == (3, 5, 1)
    assert masks(attnopt.optimize(model, Sparse(same), (x,), backend="sdpa")) == [False, False]
    padding = torch.zeros(2, 15, dtype=torch.bool)
    padding[1, 14] = True
    for padded in (AddedPadding(), HiddenPadding()):
        fast = attnopt.optimize(padded.eval(), Sparse(Segments(ids)), (x, padding), backend="sdpa")
        assert masks(fast) == [True]
        reference = attnopt.optimize(padded, Sparse(Segments(ids)), (x, padding), backend="reference")
        oracle.assert_same(oracle.run(fast, (x, padding)), oracle.run(reference, (x, padding)))


class AddedPadding(nn.Module):
    """As numbers that are added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(HEADS * SIZE, HEADS, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        made: Tensor = self.layer(x, src_key_padding_mask=padding)
        return made


class HiddenPadding(nn.Module):
    """As pairs that are not seen."""

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        q = x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        scores = (q @ q.mT).masked_fill(padding[:, None, None, :], -torch.inf)
        return (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)
