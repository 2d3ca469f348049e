"""``--data``: batches of inputs from a file of arrays or of texts, or from a function of the user's."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from attnopt.capture.calibration import Calibration
from attnopt.cli.load_model import returned_batches
from attnopt.cli.texts import encoded
from attnopt.errors import ArchiveError, AttnoptError

if TYPE_CHECKING:
    from attnopt.cli.load_model import Named

SUFFIXES = (".npz", ".safetensors", ".pt", ".pth")
HELP = (
    "inputs: an .npz, .safetensors or .pt file with one array per input, under its name, with sequences along the first axis; "
    "what Calibration.save wrote; a .txt file with one text a line (and --tokenizer); or package.module:function, which "
    "returns batches"
)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_HOW = "save inputs by their names, as in numpy.savez('data.npz', input_ids=ids), or pass package.module:function"


@dataclass(frozen=True)
class Data:
    """``batches``, and the arrays of the file that are options of statistics, ``retrieval.needles``: by statistic and option."""

    batches: Iterable[Any]
    options: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def is_function(name: str) -> bool:
    """``package.module:function``"""
    return _FUNCTION.fullmatch(name) is not None


def add_arguments(parser: argparse.ArgumentParser, size: int, default: str | None) -> None:
    """``size``: sequences in a batch.  ``default``: what there is without ``--data``, if it may be left out."""
    told = f"{HELP} (default: {default})" if default else HELP
    parser.add_argument("--data", metavar="FILE", required=default is None, help=told)
    parser.add_argument("--tokenizer", help="of the texts: a folder, or a name that transformers knows")
    parser.add_argument(
        "--batch", type=least_one, default=size, metavar="N", help=f"sequences in a batch of --data (default: {size})"
    )


def least_one(text: str) -> int:
    n = int(text)
    if n < 1:
        raise argparse.ArgumentTypeError("a number, 1 or more")
    return n


@dataclass(frozen=True)
class Source:
    """``--data``, ``--tokenizer`` and ``--batch``, the sequences in a batch."""

    name: str
    tokenizer: str | None
    size: int


def data_of(source: Source, named: Named | None, inputs: Sequence[str] = (), statistics: Sequence[str] = ()) -> Data:
    """``named``: the model, None for an ONNX file, which takes ``inputs`` by position.  Raises AttnoptError."""
    name, path = source.name, Path(source.name)
    if is_function(name):
        return Data(returned_batches(name))
    if (whole := _saved_calibration(path)) is not None:
        return Data(whole)
    takes = _Takes.of_file(inputs) if named is None else _Takes.of(named)
    if path.suffix == ".txt":
        return Data([takes.of_texts(made, name) for made in encoded(path, source.tokenizer, source.size)])
    arrays = read_arrays(path)
    options: dict[str, dict[str, Tensor]] = {}
    given: dict[str, Tensor] = {}
    for key, array in arrays.items():
        statistic, dot, option = key.partition(".")
        if dot and key not in takes.every and statistic in statistics:
            options.setdefault(statistic, {})[option] = array
        else:
            given[key] = array
    return Data(list(takes.batches(given, name, source.size)), options)


def read_arrays(file: Path) -> dict[str, Tensor]:
    """Raises AttnoptError."""
    if not file.is_file():
        raise AttnoptError(f"there is no file {file}", hint="--data takes a file of arrays, or package.module:function")
    if file.suffix not in SUFFIXES:
        raise AttnoptError(f"{file} is no file of arrays: expected one of {', '.join(SUFFIXES)}", hint=_HOW)
    try:
        found = _READ[file.suffix](file)
    except Exception as e:
        raise AttnoptError(f"{file} cannot be read: {type(e).__name__}: {str(e)[:200]}", hint=_HOW) from e
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()) or not found:
        raise AttnoptError(f"{file} does not hold tensors by name", hint=_HOW)
    return {str(key): x for key, x in found.items()}


def _saved_calibration(file: Path) -> Calibration | None:
    """What ``Calibration.save`` wrote."""
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    try:
        return Calibration.load(file)
    except ArchiveError:
        return None


def _npz(file: Path) -> dict[str, Tensor]:
    with np.load(file, allow_pickle=False) as found:
        return {key: torch.from_numpy(found[key]) for key in found.files}


def _safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _pt(file: Path) -> Any:
    return torch.load(file, weights_only=True, map_location="cpu")


_READ = {".npz": _npz, ".safetensors": _safetensors, ".pt": _pt, ".pth": _pt}


@dataclass(frozen=True)
class _Takes:
    """What a model takes: ``every`` name, and those ``required``; ``example`` inputs by name; ``kept``, what is no tensor.
    ``by_place``: an ONNX file's inputs are passed in their order."""

    every: Sequence[str]
    required: Sequence[str]
    example: Mapping[str, Tensor]
    kept: Mapping[str, Any]
    by_place: bool
    open_ended: bool = False
    precision: torch.dtype | None = None  # of the model's weights

    @classmethod
    def of_file(cls, inputs: Sequence[str]) -> _Takes:
        return cls(inputs, inputs, {}, {}, by_place=True)

    @classmethod
    def of(cls, named: Named) -> _Takes:
        signature = inspect.signature(named.model.forward)
        kinds = {p.name: p for p in signature.parameters.values()}
        plain = [p for p in kinds.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        given: dict[str, Any] = {}
        for key, value in signature.bind_partial(*named.args, **named.kwargs).arguments.items():
            given.update(value if kinds[key].kind is inspect.Parameter.VAR_KEYWORD else {key: value})
        example = {key: x for key, x in given.items() if isinstance(x, Tensor)}
        kept = {key: x for key, x in given.items() if key not in example}
        required = list(example) if given else [p.name for p in plain if p.default is p.empty]
        every = [p.name for p in plain]
        weights = (p.dtype for p in named.model.parameters() if p.is_floating_point())
        open_ended = any(p.kind is p.VAR_KEYWORD for p in kinds.values())
        return cls(every, required, example, kept, False, open_ended, next(weights, None))

    def batches(self, given: Mapping[str, Tensor], source: str, size: int) -> Iterable[Any]:
        """Raises AttnoptError."""
        self._require_names(given, source)
        fitted = {key: self._fitted(key, x, source) for key, x in given.items()}
        counts = {key: len(x) for key, x in fitted.items()}
        if len({*counts.values()}) > 1 or 0 in counts.values():
            told = ", ".join(f"{key} {n}" for key, n in counts.items())
            raise AttnoptError(
                f"{source}: expected as many sequences in every array, found {told}",
                hint="the first axis of each array counts sequences",
            )
        return self._split(fitted, size)

    def of_texts(self, made: Mapping[str, Tensor], source: str) -> Any:
        """What the model takes of what a tokenizer says.  Raises AttnoptError."""
        given = {key: x for key, x in made.items() if key in self.every}
        self._require_names(given, f"{source}, tokenized,")
        (batch,) = self._split(given, len(next(iter(given.values()))))
        return batch

    def _split(self, fitted: Mapping[str, Tensor], size: int) -> Iterable[Any]:
        for start in range(0, len(next(iter(fitted.values()))), size):
            own = {key: x[start : start + size] for key, x in fitted.items()}
            if self.by_place:
                yield tuple(own[key] for key in self.every)
            else:
                yield {**self.kept, **own}

    def _require_names(self, given: Mapping[str, Tensor], source: str) -> None:
        missing = [key for key in self.required if key not in given]
        unknown = [key for key in given if key not in self.every and not self.open_ended]
        if missing or unknown:
            raise AttnoptError(
                f"{source} contains {', '.join(given) or 'no inputs'}, but the model takes {', '.join(self.required)}",
                hint="one array per input, under the name of the input",
            )

    def _fitted(self, key: str, x: Tensor, source: str) -> Tensor:
        """In the precision of the example, or else of the model."""
        like = self.example.get(key)
        if x.dim() == 0:
            raise AttnoptError(f"{source}: {key} is one number", hint="the first axis of each array counts sequences")
        if like is None:
            return x if self.precision is None or not x.is_floating_point() else x.to(self.precision)
        if x.dim() != like.dim():
            raise AttnoptError(
                f"{source}: {key} has the shape {list(x.shape)}, but the example input {list(like.shape)}",
                hint="give arrays with as many axes, the sequences along the first",
            )
        if x.is_floating_point() != like.is_floating_point():
            raise AttnoptError(f"{source}: {key} is {_kind(x)}, but the example input is {_kind(like)}")
        return x.to(like.dtype)


def _kind(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
