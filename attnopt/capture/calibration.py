"""Calibration data: batches of model inputs, checked once, reusable, serializable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.base.atomic_files import atomic_write
from attnopt.base.call_inputs import CallInputs
from attnopt.errors import ArchiveError, CalibrationError
from attnopt.ir.peers import Peers

Batch = Tensor | tuple[object, ...] | list[Any] | Mapping[str, object]


@dataclass(frozen=True)
class Calibration:
    """Batches of model inputs for repeated use: ``attnopt.optimize(..., calibration=c)``,
    ``attnopt.head_importance(model, c)``.

    ``Calibration.of(batches)``: each batch is a tensor, a tuple of args or a dict of kwargs.  Every eighth sequence is
    held out: a fit on the others is only accepted if it holds on these.  Evaluate on different data.
    """

    batches: tuple[CallInputs, ...] = field(repr=False)
    peers: Peers | None = field(default=None, repr=False, compare=False)  # who have other batches

    @classmethod
    def of(cls, batches: Iterable[Batch] | Calibration, *, shared: bool = False) -> Calibration:
        """Raises CalibrationError for no batch, or a malformed one, and for data that processes share, unless ``shared``."""
        if isinstance(batches, Calibration):
            if batches.peers is not None and not shared:
                raise CalibrationError(
                    "several processes share this calibration data, which only attnopt.optimize can use",
                    hint="pass all batches to each process",
                )
            return batches
        try:
            items = list(batches)
        except TypeError:
            raise CalibrationError(
                f"calibration must be an iterable of batches, not {type(batches).__name__}",
                hint="pass a list of inputs",
            ) from None
        if not items:
            raise CalibrationError("calibration is empty", hint="omit it, or pass at least one batch")
        return cls(tuple(as_inputs(batch, f"calibration batch {i}") for i, batch in enumerate(items)))

    def __iter__(self) -> Iterator[CallInputs]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the batches atomically to one safetensors file.

        Raises ArchiveError if a batch contains anything but tensors, numbers, strings and None in plain containers.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}

        def stored(x: object) -> object:
            if isinstance(x, Tensor):
                name = f"t{len(tensors)}"
                tensors[name] = x.detach().clone().contiguous()
                return {"tensor": name}
            if isinstance(x, (tuple, list)):
                return {type(x).__name__: [stored(i) for i in x]}
            if isinstance(x, dict) and all(isinstance(k, str) for k in x):
                return {"dict": {k: stored(v) for k, v in x.items()}}
            if x is None or isinstance(x, (bool, int, float, str)):
                return {"value": x}
            raise ArchiveError(f"a calibration batch holds a {type(x).__name__}, which cannot be saved")

        about = json.dumps([stored(tuple(batch)) for batch in self.batches])
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"attnopt": about})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load what ``save`` wrote.  Raises ArchiveError.  Nothing in the file is executed."""
        from safetensors import safe_open

        try:
            with safe_open(Path(path), framework="pt") as file:
                about = json.loads(file.metadata()["attnopt"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(tuple(CallInputs(*_restored(batch, tensors)) for batch in about))
        except Exception as e:
            raise ArchiveError(f"{path} is not calibration data: {type(e).__name__}: {e}", hint="save it again") from e


def as_inputs(batch: object, name: str = "a batch") -> CallInputs:
    """One batch as args and kwargs."""
    if isinstance(batch, Tensor):
        return CallInputs((batch,), {})
    if isinstance(batch, Mapping):
        return CallInputs((), dict(batch))
    if isinstance(batch, (tuple, list)):
        return CallInputs(tuple(batch), {})
    raise CalibrationError(
        f"{name} is a {type(batch).__name__}, expected a tensor, a tuple of args or a dict of kwargs",
        hint="pass a tensor, a tuple of args or a dict of kwargs",
    )


def shapes_of(inputs: CallInputs) -> tuple[object, ...]:
    """Equal for batches that one graph with static sizes accepts."""
    return tuple(tuple(x.shape) if isinstance(x, Tensor) else None for x in pytree.tree_leaves(inputs))


def _restored(x: Any, tensors: Mapping[str, Tensor]) -> Any:
    (kind, content), *_ = x.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "tuple":
            return tuple(_restored(i, tensors) for i in content)
        case "list":
            return [_restored(i, tensors) for i in content]
        case "dict":
            return {k: _restored(v, tensors) for k, v in content.items()}
        case _:
            return content
