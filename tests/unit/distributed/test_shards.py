from __future__ import annotations

import pytest

from attnopt.distributed.shards import Shards, TooShortError
from attnopt.distributed.token_rules import Tokens, moved


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize(("length", "ranks"), [(13, 4), (8, 4), (5, 4), (4, 4), (2, 1)])
def test_each_token_is_on_one_rank(length: int, ranks: int, zigzag: bool) -> None:
    shards = Shards.of(length, ranks, zigzag)
    held = [n for runs in shards.positions for start, stop in runs for n in range(start, stop)]
    assert sorted(held) == list(range(length))
    counts = [shards.count(rank) for rank in range(ranks)]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 2


def test_fewer_tokens_than_ranks() -> None:
    with pytest.raises(TooShortError, match="3 tokens cannot be shared by 4 ranks"):
        Shards.of(3, 4)


@pytest.mark.parametrize(
    ("at", "sizes", "others", "wanted"),
    [
        (Tokens(1), (2, 12, 8), (24, 8), Tokens(0, 2, 1)),
        (Tokens(0, 2, 1), (24, 8), (2, 12, 2, 4), Tokens(1)),
        (Tokens(2), (2, 3, 12, 4), (6, 12, 4), Tokens(1)),
        (Tokens(1), (2, 12, 8), (2, 96), Tokens(1, 1, 8)),
        (Tokens(1), (2, 12, 8), (2, 6, 2, 8), None),
        (Tokens(1), (1, 12, 1), (12,), Tokens(0)),
    ],
)
def test_tokens_after_a_reshape(at: Tokens, sizes: tuple, others: tuple, wanted: Tokens | None) -> None:
    assert moved(at, sizes, others, 12) == wanted
