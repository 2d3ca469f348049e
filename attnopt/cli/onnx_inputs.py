"""An ONNX file on the command line: inputs for it, and the file in ONNX Runtime."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from attnopt.base.ort_session import cpu_session
from attnopt.base.user_warning import warn
from attnopt.compiler.policy import Policy
from attnopt.errors import AttnoptError
from attnopt.onnx.load.error_text import quoted

if TYPE_CHECKING:
    import onnx

BATCH, LENGTH = 2, 16  # default sizes of free axes: the first one of an input, and any other


@dataclass(frozen=True)
class Given:
    """``--inputs``: a file of arrays.  ``--size``: free axes by name.  ``needs_sizes``: the result depends on them.
    ``brought``: inputs that the policy reads, which the arrays may hold beside those of the file."""

    inputs: Path | None
    sizes: Mapping[str, int]
    needs_sizes: bool
    brought: frozenset[str] = frozenset()

    @classmethod
    def of(cls, arguments: argparse.Namespace, needs_sizes: bool) -> Given:
        inputs = None if arguments.inputs is None else Path(arguments.inputs)
        policy = getattr(arguments, "policy", None)
        brought = () if policy is None else Policy.of(policy).inputs
        return cls(inputs, dict(arguments.size), needs_sizes, frozenset(i.name for i in brought))

    def __bool__(self) -> bool:
        return self.inputs is not None or bool(self.sizes)

    def arrays(self) -> dict[str, Tensor]:
        """Those of ``--inputs``, by name; empty without it."""
        return {} if self.inputs is None else _read(self.inputs)


def require_onnx(given: Given, *names: str) -> None:
    """Raises AttnoptError if ``--inputs`` or ``--size`` is given without an ONNX file."""
    if given and not any(map(is_onnx, names)):
        raise AttnoptError(
            "--inputs and --size only apply to ONNX files",
            hint="a factory returns its own example inputs",
        )


def example_inputs(file: Path, given: Given) -> dict[str, Tensor]:
    """Tensors by input name of the file: those of ``--inputs``, otherwise synthetic ones, with a warning.

    Raises AttnoptError for missing inputs, or missing sizes of free axes on which the result would depend.
    """
    taken = _taken(file)
    if given.inputs is not None:
        names = [i.name for i in taken]
        made = _read(given.inputs)
        if set(made) - (given.brought - set(names)) != set(names):
            raise AttnoptError(
                f"{given.inputs} contains {', '.join(made) or 'nothing'}, but {file} takes {', '.join(names)}",
                hint=_WANTED,
            )
        return {name: made[name] for name in names}
    shapes = _sizes(file, taken, given)
    generator = np.random.default_rng(0)
    made = {i.name: _made_up(i, shapes[i.name], file, generator) for i in taken}
    told = ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in made.items())
    warn(f"using synthetic inputs for {file}: {told}")
    return made


def further_inputs(own: Mapping[str, Tensor], given: Given) -> dict[str, Tensor]:
    """What ``--inputs`` has beside the file's ``own``, for the policy."""
    return {} if given.inputs is None else {n: x for n, x in _read(given.inputs).items() if n not in own}


def input_names(file: Path) -> list[str]:
    """In their order."""
    return [i.name for i in _taken(file)]


def _taken(file: Path) -> list[onnx.ValueInfoProto]:
    from attnopt.onnx.load.read import structure

    graph = structure(file).graph
    stored = {i.name for i in graph.initializer}
    return [i for i in graph.input if i.name not in stored]


def _read(arrays: Path) -> dict[str, Tensor]:
    try:
        with np.load(arrays, allow_pickle=False) as found:
            return {name: torch.from_numpy(found[name]) for name in found.files}
    except Exception as e:
        raise AttnoptError(
            f"{arrays} cannot be read: {type(e).__name__}: {str(e)[:200]}",
            hint=f"write the file with numpy.savez, {_WANTED}",
        ) from e


_WANTED = "one array per input, under the name of the input"


def _axes(taken: onnx.ValueInfoProto) -> Iterator[tuple[str, int | None]]:
    """Name and size of each axis, None where it is free."""
    for axis, d in enumerate(taken.type.tensor_type.shape.dim):
        yield d.dim_param or f"{taken.name}.{axis}", d.dim_value if d.HasField("dim_value") else None


def _sizes(file: Path, taken: list[onnx.ValueInfoProto], given: Given) -> dict[str, list[int]]:
    axes = {i.name: list(_axes(i)) for i in taken}
    free = {name: LENGTH for found in axes.values() for name, size in found if size is None}
    free |= {found[0][0]: BATCH for found in axes.values() if found and found[0][1] is None}
    if unknown := [name for name in given.sizes if name not in free]:
        raise AttnoptError(
            f"{file} has no free axis {', '.join(unknown)}",
            hint=f"its free axes are {', '.join(free) or '(none)'}",
        )
    missing = [name for name in free if name not in given.sizes]
    if missing and given.needs_sizes:
        raise AttnoptError(
            f"{file} does not fix the size of {', '.join(missing)}",
            hint=f"set it, as in --size {missing[0]}=128, pass inputs with --inputs, or keep the axes dynamic with --dynamic",
        )
    free |= given.sizes
    return {name: [free[n] if size is None else size for n, size in found] for name, found in axes.items()}


def _made_up(taken: onnx.ValueInfoProto, shape: list[int], file: Path, generator: np.random.Generator) -> Tensor:
    """Noise, or zeros and ones, which are valid indices of any table.  Rows begin with 1, so no mask hides everything."""
    import onnx

    kind = taken.type.tensor_type.elem_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)) if kind else np.dtype(object)
    if dtype.kind == "f":
        return torch.from_numpy(np.asarray(generator.standard_normal(shape), dtype))
    if dtype.kind not in "iub":
        raise AttnoptError(
            f"{file}: no synthetic input can be generated for {taken.name}", hint="pass it with --inputs"
        )
    values = torch.from_numpy(np.asarray(generator.integers(0, 2, shape), dtype))
    values.reshape(-1, shape[-1] if shape else 1)[:, :1] = 1
    return values


class InRuntime(nn.Module):
    """A file in ONNX Runtime on one thread.  Called with inputs by position or name, returns outputs in order.

    Raises AttnoptError if ONNX Runtime cannot load the file.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        try:
            self.session = cpu_session(file, threads=1)
        except Exception as e:
            raise AttnoptError(f"ONNX Runtime cannot load {file}: {quoted(str(e))}") from e

    @property
    def names(self) -> list[str]:
        """Of the inputs, in their order."""
        return [i.name for i in self.session.get_inputs()]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> list[Tensor]:
        by_place = zip(self.names, args, strict=False)
        feed = {name: value.numpy() for name, value in (*by_place, *kwargs.items())}
        return [torch.from_numpy(array) for array in self.session.run(None, feed)]


def is_onnx(name: str) -> bool:
    return name.endswith(".onnx") and not Path(name).is_dir()
