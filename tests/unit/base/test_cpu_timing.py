"""Interleaved measurements: every call equally often, in turn, ratios by round."""

import pytest
import torch

from attnopt.base.cpu_timing import Times, interleaved, one_thread


@pytest.mark.slow
def test_calls_take_turns_and_warm_up_is_not_counted() -> None:
    made: list[str] = []
    times = interleaved({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, rounds=3, warm_up=1)
    assert "".join(made) == "abbaabba"
    assert {name: len(seconds) for name, seconds in times.of.items()} == {"a": 3, "b": 3}


def test_ratios_are_by_round() -> None:
    times = Times({"a": (1.0, 2.0, 4.0), "b": (2.0, 4.0, 20.0)})
    assert times.median("b") == 4
    assert times.ratio("b", "a") == 2
    assert times.spread("b", "a") == (2, 5)


@pytest.mark.slow
def test_the_rounds_can_be_watched() -> None:
    seen: list[range] = []

    def watch(rounds: range) -> range:
        seen.append(rounds)
        return rounds

    interleaved({"a": int}, 2, 1, watch)
    assert seen == [range(3)]


def test_the_threads_come_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
