"""What heads did on data: values by attention and kind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from attnopt.base.atomic_files import atomic_write
from attnopt.base.display import shown
from attnopt.errors import ArchiveError

FORMAT = 1
Value = Tensor | tuple[Tensor, ...]  # reduced over all batches, or one for each batch


@dataclass(frozen=True)
class Taken:
    """One attention, or another branch of a residual stream: its values by kind.

    ``heads``: the number of each head in q, scores, weights, lse, outputs and contribution, and ``kv_heads`` those in k and v;
    empty for other branches.  ``real`` and ``seen``: for each batch bool [B, R] and [B, C], which of the queries and keys that
    were asked for are no padding; empty for reduced values.  ``tokens``: how many queries counted.
    """

    values: Mapping[str, Value]  # by kind
    heads: tuple[int, ...] = ()
    kv_heads: tuple[int, ...] = ()
    real: tuple[Tensor, ...] = ()
    seen: tuple[Tensor, ...] = ()
    tokens: int = 0

    def __getitem__(self, kind: str) -> Value:
        return self.values[kind]


@dataclass(frozen=True)
class Collected(Mapping[str, Taken]):
    """``collected["layers.0"]["weights"]``, or ``collected["layers.0", "weights"]``: a tensor if it is reduced, otherwise a tuple
    with one tensor for each batch.  Prints as a table.

    ``reduce``: how the values were reduced; "" if not, "callable" by the caller's own function.
    """

    sites: Mapping[str, Taken]
    reduce: str = ""
    batches: int = 0

    def __getitem__(self, name: Any) -> Any:
        if isinstance(name, tuple) and len(name) == 2:
            return self.sites[name[0]][name[1]]
        return self.sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        return shown(self, "text")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything atomically to one safetensors file.  Raises ArchiveError."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}

        def stored(x: Tensor) -> str:
            name = f"t{len(tensors)}"
            tensors[name] = x.contiguous()
            return name

        sites = {
            name: {
                "heads": list(taken.heads),
                "kv_heads": list(taken.kv_heads),
                "tokens": taken.tokens,
                "real": [stored(x) for x in taken.real],
                "seen": [stored(x) for x in taken.seen],
                "values": {
                    kind: stored(x) if isinstance(x, Tensor) else [stored(i) for i in x]
                    for kind, x in taken.values.items()
                },
            }
            for name, taken in self.sites.items()
        }
        about = {"format": FORMAT, "reduce": self.reduce, "batches": self.batches, "sites": sites}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"attnopt.collected": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load what ``save`` wrote.  Raises ArchiveError.  Nothing in the file is executed."""
        from safetensors import safe_open

        try:
            with safe_open(Path(path), framework="pt") as file:
                about = json.loads(file.metadata()["attnopt.collected"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r}; this version reads format {FORMAT}")
            return cls(
                {name: _read(taken, tensors) for name, taken in about["sites"].items()},
                str(about["reduce"]),
                int(about["batches"]),
            )
        except Exception as e:
            raise ArchiveError(
                f"{path} is not what a collection saved: {type(e).__name__}: {e}", hint="save it again"
            ) from e


def _read(taken: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Taken:
    return Taken(
        {
            kind: tensors[x] if isinstance(x, str) else tuple(tensors[i] for i in x)
            for kind, x in taken["values"].items()
        },
        tuple(map(int, taken["heads"])),
        tuple(map(int, taken["kv_heads"])),
        tuple(tensors[x] for x in taken["real"]),
        tuple(tensors[x] for x in taken["seen"]),
        int(taken["tokens"]),
    )


def shape_text(x: Value) -> str:
    """ "12 x 64", or "3 of 2 x 12 x 7 x 64" for several of one shape."""
    if isinstance(x, Tensor):
        return " x ".join(map(str, x.shape)) or "1"
    shapes = list(dict.fromkeys(" x ".join(map(str, i.shape)) or "1" for i in x))
    return f"{len(x)} of {shapes[0]}" if len(shapes) == 1 else f"{len(x)} of {shapes[0]} to {shapes[-1]}"


def own(x: Tensor) -> Tensor:
    """On the CPU, with memory of its own."""
    found = x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return found.contiguous()
