from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from attnopt.ir.peers import Peers
from attnopt.policy_search.state import State


@dataclass
class Two(Peers):
    """Both processes, one after the other: what the first told is kept for the second."""

    rank: int
    told: list[Any]
    count: int = 2

    def everyone(self, told: Any) -> list[Any]:
        self.told.append(told)
        return [self.told[0], told]

    def working(self, given: Any) -> Any:
        return nullcontext()


def test_processes_go_on_from_what_the_first_one_read(tmp_path: Path) -> None:
    """The others may have no such file, as on another machine, or a newer one."""
    marks, told = {"the model": "abc"}, list[Any]()
    written = State(marks, tmp_path / "0.json", {(0, 1): {0: (0.5, 2.0)}}, {(1, 1): {0: (0.25, 1.0)}}, {"graph": 3.0})
    written.save(at_once=True)
    State(marks, tmp_path / "1.json", {(1, 0): {0: (0.75, 2.0)}}).save(at_once=True)
    newer = (tmp_path / "1.json").read_text()
    states = [State(marks, tmp_path / f"{rank}.json") for rank in range(2)]
    for rank, state in enumerate(states):
        state.share(Two(rank, told))
    for state in states:
        assert (state.values, state.refitted, state.times) == (written.values, written.refitted, written.times)
    states[1].save(at_once=True)
    assert (tmp_path / "1.json").read_text() == newer


@pytest.mark.parametrize("machine", ["this", "another"])
def test_latencies_are_of_one_machine(tmp_path: Path, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> State:
        return State({"model": "a"}, tmp_path / "state.json")

    own = state()
    own.values[1, 0] = {0: (0.5, 2.0)}
    own.times["graph"] = 3.0
    own.save(at_once=True)
    if machine == "another":
        monkeypatch.setattr("attnopt.backends.speed.processor", lambda: "another")
    there = state()
    there.read()
    assert there.values == own.values
    assert there.times == ({} if machine == "another" else own.times)
