from __future__ import annotations

import pytest
from parallel_checks import QUICK, optimized
from parallel_models import Style
from ranks import on_ranks

from attnopt.distributed import context_parallel
from attnopt.errors import DistributedError

pytestmark = pytest.mark.subprocess


def told(failed: dict[str, list[str]]) -> str:
    return "\n".join(
        f"{name}, rank {rank}:\n{text}" for name, by_rank in failed.items() for rank, text in enumerate(by_rank)
    )


def test_two_ranks() -> None:
    failed = on_ranks(2, *QUICK)
    assert not failed, told(failed)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_everything(ranks: int) -> None:
    failed = on_ranks(ranks)
    assert not failed, told(failed)


def test_without_a_process_group() -> None:
    with pytest.raises(DistributedError, match="distributed is not initialized"):
        context_parallel(optimized(Style(layers=1)), None)  # type: ignore[arg-type]
