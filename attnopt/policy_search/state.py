"""What a search has measured, on disk: a search that was killed goes on from there."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.backends.speed import machine
from attnopt.base.atomic_files import atomic_write
from attnopt.errors import SearchError
from attnopt.ir.peers import Peers
from attnopt.policy_search.judge import Known

FORMAT = 4
EVERY = 1.0  # seconds between two writes
SAMPLED = 64  # numbers of each weight that mark a model


@dataclass
class State:
    """``marks``: digests of all that measurements depend on, by what it is.  ``values``: by picks and piece; ``refitted``: the
    same with output projections fitted once more, picks ending in a number of ``REFITS``; ``times``: milliseconds by name, of
    this machine.  Without a path nothing is written."""

    marks: Mapping[str, str]
    path: Path | None = None
    values: Known = field(default_factory=dict)
    refitted: Known = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    written: float = -math.inf

    def read(self) -> None:
        """What an earlier search wrote.  Raises SearchError for a file of another search, or one that is no such file."""
        if self.path is None or not self.path.exists():
            return
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}")
            marks = dict(data["marks"])
            values, refitted = _known(data["values"]), _known(data["refitted"])
            is_from_here = data["machine"] == mark_of(*machine())
            times = {str(name): float(ms) for name, ms in data["times"].items() if is_from_here}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SearchError(
                f"search: resume={str(self.path)!r} is no state of a search: {type(error).__name__}: {error}",
                hint="give another path, or remove the file",
            ) from error
        if changed := [what for what, mark in self.marks.items() if marks.get(what) != mark]:
            raise SearchError(
                f"search: resume={str(self.path)!r} is the state of another search: other {', '.join(changed)}",
                hint="give another path, or remove the file",
            )
        self.values.update(values)
        self.refitted.update(refitted)
        self.times.update(times)

    def share(self, peers: Peers) -> None:
        """What the first of several processes reads, for all of them; it alone writes.  Raises SearchError there."""
        if peers.rank == 0:
            self.read()
        self.path = None if peers.rank else self.path
        values, refitted, times = peers.everyone((self.values, self.refitted, self.times))[0]
        self.values.update(values)
        self.refitted.update(refitted)
        self.times.update(times)

    def save(self, at_once: bool = False) -> None:
        """Atomically; not again within a second, unless ``at_once``."""
        now = time.monotonic()
        if self.path is None or (now - self.written < EVERY and not at_once):
            return
        known = {"values": _told(self.values), "refitted": _told(self.refitted)}
        marks = {"marks": dict(self.marks), "machine": mark_of(*machine())}
        text = json.dumps({"format": FORMAT, **marks, "times": self.times, **known})
        with atomic_write(self.path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self.written = time.monotonic()


def _told(known: Known) -> list[Any]:
    return [
        [list(picks), {str(piece): [_plain(total), n] for piece, (total, n) in parts.items()}]
        for picks, parts in known.items()
        if parts
    ]


def _known(told: Sequence[Any]) -> Known:
    return {tuple(map(int, picks)): _parts(parts) for picks, parts in told}


def _plain(total: float) -> float | None:
    return total if math.isfinite(total) else None


def _parts(parts: Mapping[str, Sequence[Any]]) -> dict[int, tuple[float, float]]:
    return {int(piece): (math.inf if total is None else float(total), float(n)) for piece, (total, n) in parts.items()}


def mark_of(*texts: object) -> str:
    return hashlib.sha256("\n".join(map(str, texts)).encode()).hexdigest()[:16]


def model_mark(model: nn.Module) -> str:
    """Of the names, sizes and some values of all weights."""
    return mark_of(*((name, _some(t)) for name, t in model.state_dict().items() if isinstance(t, Tensor)))


def data_mark(batches: Iterable[object]) -> str:
    return mark_of(*(_some(x) if isinstance(x, Tensor) else x for x in pytree.tree_leaves(list(batches))))


def _some(x: Tensor) -> str:
    flat = x.detach().reshape(-1)
    places = torch.linspace(0, max(0, len(flat) - 1), min(SAMPLED, len(flat)), dtype=torch.float64).long()
    return f"{tuple(x.shape)} {x.dtype} {flat[places.to(flat.device)].tolist()}"
