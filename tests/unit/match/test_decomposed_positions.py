"""Relative positions on a grid as the sum of two tables, of rows and of columns (SAM, MViT)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo
from oracle import assert_same, run
from torch import Tensor, nn
from variants import mostly_slow

import attnopt
from attnopt.passes import PruneHeads, Sparse
from attnopt.patterns import Neighborhood

pytestmark = [pytest.mark.usefixtures("one_capture"), pytest.mark.filterwarnings("ignore::attnopt.AttnoptWarning")]
B, H, D, WIDTH, GRID = 2, 3, 16, 12, (4, 6)


class Decomposed(nn.Module):
    """[B, height, width, WIDTH].  Subclasses compute ``mixed`` of queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * H * D), nn.Linear(H * D, WIDTH)
        self.rows, self.columns = (nn.Parameter(torch.randn(2 * n - 1, D)) for n in GRID)

    @staticmethod
    def looked_up(n: int, table: Tensor) -> Tensor:
        """[n, n, D]"""
        places = torch.arange(n)
        return table[(places[:, None] - places + n - 1).long()]

    def bias(self, q: Tensor) -> Tensor:
        """[*, height, width, height, width], of queries [*, height, width, D]."""
        rows = torch.einsum("...hwc,hkc->...hwk", q, self.looked_up(GRID[0], self.rows))
        columns = torch.einsum("...hwc,wkc->...hwk", q, self.looked_up(GRID[1], self.columns))
        return rows[..., :, None] + columns[..., None, :]

    def forward(self, x: Tensor, gains: Tensor | None = None) -> Tensor:
        tokens = GRID[0] * GRID[1]
        qkv = self.qkv(x).reshape(-1, tokens, 3, H, D).permute(2, 0, 3, 1, 4)
        o = self.mixed(qkv)
        made: Tensor = self.out((o if gains is None else o * gains).transpose(1, 2).reshape(-1, *GRID, H * D))
        return made

    def mixed(self, qkv: Tensor) -> Tensor:
        """[B, H, tokens, D], of [3, B, H, tokens, D]."""
        raise NotImplementedError


class Sam(Decomposed):
    """Batch and heads are one axis before queries, keys and values are cut apart."""

    def mixed(self, qkv: Tensor) -> Tensor:
        n = qkv.shape[3]
        q, k, v = qkv.reshape(3, -1, n, D).unbind(0)
        scores = (q * D**-0.5) @ k.transpose(-2, -1)
        scores = (scores.view(-1, *GRID, *GRID) + self.bias(q.reshape(-1, *GRID, D))).view(-1, n, n)
        return (scores.softmax(-1) @ v).view(-1, H, n, D)


class Mvit(Decomposed):
    def mixed(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(0)
        n = q.shape[2]
        scores = (q * D**-0.5) @ k.transpose(-2, -1)
        scores = scores.view(-1, H, *GRID, *GRID) + self.bias(q.unflatten(2, GRID))
        return scores.view(-1, H, n, n).softmax(-1) @ v


class Fused(Decomposed):
    """The sum is the mask of torch's own attention."""

    def mixed(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(0)
        n = q.shape[2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(q.unflatten(2, GRID)).reshape(-1, H, n, n))


each = pytest.mark.parametrize("kind", mostly_slow((Sam, Mvit, Fused), Sam), ids=lambda kind: kind.__name__)


@each
def test_read_by_heads_at_other_batches(kind: type[Decomposed]) -> None:
    torch.manual_seed(0)
    model, x = zoo.loud(kind()), torch.randn(B, *GRID, WIDTH)
    free = {"x": {0: torch.export.Dim("batch", max=64)}}
    fast = attnopt.optimize(model, "fuse", (x,), dynamic_shapes=free, backend="blocked")
    (site,) = fast.sites
    assert (site.num_heads, site.spec.has_bias, site.is_cross) == (H, True, False)
    for other in (x, torch.randn(5, *GRID, WIDTH), torch.randn(1, *GRID, WIDTH)):
        assert_same(run(fast, (other,)), run(model, (other,)))
    pruned = attnopt.optimize(model, PruneHeads(heads=[1]), (x,), dynamic_shapes=free)
    gains = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    for other in (x, torch.randn(3, *GRID, WIDTH)):
        assert_same(run(pruned, (other,)), [model(other, gains)])
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    everything = attnopt.optimize(model, Sparse(Neighborhood(GRID, (7, 11))), (x,))
    assert_same(run(everything, (x,)), run(model, (x,)))


@each
def test_each_table_meets_queries_alone(kind: type[Decomposed]) -> None:
    """Nothing has features for each pair of tokens."""
    torch.manual_seed(0)
    model, x, tokens = zoo.loud(kind()), torch.randn(B, *GRID, WIDTH), GRID[0] * GRID[1]
    fast = attnopt.optimize(model, "fuse", (x,), backend="blocked")
    sizes = [n.meta["val"].numel() for n in fast.graph_module.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert max(sizes) < tokens * tokens * D
