"""Which heads a rank computes of an attention on DTensors."""

from __future__ import annotations

import pytest

from attnopt.distributed.sharded_attention import Share


@pytest.mark.parametrize(
    ("kv_of_head", "kv_heads", "rank", "kv", "reads"),
    [
        ((0, 0, 1, 1), 2, 1, None, (0, 0)),  # its own shard of keys
        ((0, 1, 2, 3), 4, 1, None, (0, 1)),
        ((0, 1, 0, 1), 2, 1, (0, 1), (0, 1)),  # tiled: both ranks read all keys
        ((0, 0, 0, 0), 1, 1, (0,), (0, 0)),
        ((0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2), 3, 0, (0, 1), (0, 0, 0, 0, 1, 1)),
        ((0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2), 3, 1, (1, 2), (0, 0, 1, 1, 1, 1)),
        ((0, 0, 0, 1), 2, 0, (0,), (0, 0)),  # the other rank reads keys of this one
    ],
)
def test_keys_stay_where_only_their_rank_reads_them(
    kv_of_head: tuple, kv_heads: int, rank: int, kv: tuple | None, reads: tuple
) -> None:
    share = Share.of(kv_of_head, kv_heads, rank, 2)
    size = len(kv_of_head) // 2
    assert list(share.heads) == list(range(rank * size, (rank + 1) * size))
    assert (share.kv, share.kv_of_head) == (kv, reads)
