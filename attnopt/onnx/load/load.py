"""A file as a module that agrees with ONNX Runtime, which executes the nodes that torch computes differently."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from attnopt.base.closeness import ROOM, TOLERANCE, difference, tolerance
from attnopt.base.compile_lock import compiling
from attnopt.errors import CaptureError
from attnopt.onnx.load.error_text import reason
from attnopt.onnx.load.folding import Folded, folded
from attnopt.onnx.load.module import GROUP, OnnxModule, module_of, signature_of
from attnopt.onnx.load.read import read
from attnopt.onnx.load.risks import check_in_a_process, check_trap, risky
from attnopt.onnx.load.source import Source
from attnopt.onnx.load.unread import Runs, as_models, is_half, never_read, rounds
from attnopt.onnx.load.values import Known, Value, tensor

TRIES = 20  # each leaves some nodes more to ONNX Runtime
_INPUTS = "pass inputs of the types and sizes that the file takes"
_FATAL = (OverflowError, ZeroDivisionError, MemoryError)  # ONNX Runtime must not run it either


@compiling()
def opened(
    path: str | os.PathLike[str],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    brought: Collection[str] = (),
    *,
    opens_fused: bool = False,
) -> OnnxModule:
    """The module of an ONNX file.  Raises CaptureError if ONNX Runtime cannot run the file on the example inputs.

    ONNX Runtime executes nodes that are unknown, cannot be traced, or compute something else in torch.
    ``brought``: names among ``kwargs`` that are a policy's where the file does not have them.  ``opens_fused``: see ``Source``.
    """
    source = read(path, opens_fused)
    signature = signature_of(source)
    own = {name: x for name, x in kwargs.items() if name in signature.parameters or name not in brought}
    try:
        bound = signature.bind(*args, **own).arguments
    except TypeError as e:
        raise CaptureError(
            f"{path} takes {', '.join(signature.parameters)}: {e}",
            hint="pass example inputs, by position or by name",
        ) from None
    for name, value in bound.items():
        if not isinstance(value, Tensor):
            raise CaptureError(f"{name} is a {type(value).__name__}, not a tensor", hint="pass a tensor for each input")
    try:
        with torch.no_grad(), np.errstate(all="ignore"):
            return _Opening(source, bound).module()
    except CaptureError:
        raise
    except Exception as e:
        raise CaptureError(f"{path} cannot be run on these inputs: {reason(e)}", hint=_INPUTS) from e


@dataclass
class _Opening:
    source: Source
    bound: Mapping[str, Tensor]

    def module(self) -> OnnxModule:
        self.feed = {
            i.name: x.detach().cpu().numpy() for i, x in zip(self.source.inputs, self.bound.values(), strict=True)
        }
        unread = never_read(self.source)
        self.folded = Folded()
        readable = self._alone(unread)
        unread |= self._failing(readable, readable.given(self.bound))
        if risky(self.source, unread):
            check_in_a_process(self.source, self.feed)
        runs = Runs.of(self.source, self.feed)
        self.least = TOLERANCE[torch.float16] if is_half(self.source) else 0.0
        self.rounds = rounds(self.source)
        self.folded = folded(self.source, self.feed)
        outputs = dict(zip(self.source.outputs, runs.values(self.source.outputs)[0].values(), strict=False))
        is_checked = False
        for _ in range(TRIES):
            groups, unread = as_models(self.source, unread - self.folded.nodes, runs)
            made = module_of(self.source, groups, self.folded.values, self.folded.nodes).eval()
            worse = self._untraceable(made)
            if not worse and (groups or not self._agrees(made, outputs)) and not is_checked:
                worse, is_checked = self._that_differ(made, runs) - {GROUP}, True
            if not worse:
                return self._checked(made, outputs, runs)
            unread = unread | worse
        raise CaptureError(f"{self.source.path} contains too many operators that torch cannot trace")

    def _alone(self, unread: set[int]) -> OnnxModule:
        """The supported nodes only."""
        return module_of(self.source, (), None, unread).eval()

    def _failing(self, module: OnnxModule, values: dict[str, Value]) -> set[int]:
        """The nodes that raise on these values.  Nodes without available inputs are skipped."""
        failing: set[int] = set()
        sizes = module.free_sizes(self.bound)
        for step in module.steps():
            if not all(name in values for name in step.inputs if name):
                continue
            try:
                check_trap(step, values)
                values.update(zip(step.outputs, step.run(values, sizes), strict=False))
            except _FATAL:
                raise
            except Exception:
                failing |= {step.number}
        return failing

    def _untraceable(self, module: OnnxModule) -> set[int]:
        """The nodes that raise if only the sizes are known."""
        env = ShapeEnv()
        with FakeTensorMode(shape_env=env, allow_non_fake_inputs=True) as mode:
            free = module.free
            fake = {
                said: mode.from_tensor(x, symbolic_context=_axes(x, free.get(said, [])))
                for said, x in self.bound.items()
            }
            values, failing = module.given(fake), set[int]()
            sizes = module.free_sizes(fake)
            for step in module.steps():
                if not all(name in values for name in step.inputs if name):
                    continue
                try:
                    values.update(zip(step.outputs, step.run(values, sizes), strict=False))
                except Exception:
                    if step.number < 0:
                        raise
                    failing.add(step.number)
        return failing

    def _that_differ(self, module: OnnxModule, runs: Runs) -> set[int]:
        """The steps that differ from ONNX Runtime, or fail after unsupported nodes: numbers of nodes, or GROUP.

        In a file that ``rounds``, each is given ONNX Runtime's own values: the differences of those before it grow there."""
        steps = module.steps()
        want = runs.example([name for step in steps for name in step.outputs if name])
        values, found = module.given(self.bound), set[int]()
        sizes = module.free_sizes(self.bound)
        for step in steps:
            there = {n: torch.from_numpy(np.asarray(want[n])) for n in step.outputs if n in want}
            if step.number >= 0 or self.rounds:
                try:
                    check_trap(step, values)
                    made = dict(zip(step.outputs, step.run(values, sizes), strict=False))
                except _FATAL:
                    raise
                except Exception:
                    made = {}
                if made and all(_same(made[n], x, self.least) for n, x in there.items() if n in made):
                    values.update({**made, **there} if self.rounds else made)
                    continue
                found.add(step.number)
            values.update(there)
        return found

    def _agrees(self, module: OnnxModule, want: Mapping[str, Known]) -> bool:
        values = module.values(self.bound)
        return all(_same(values[name], torch.from_numpy(np.asarray(x)), self.least) for name, x in want.items())

    def _checked(self, module: OnnxModule, want: Mapping[str, Known], runs: Runs) -> OnnxModule:
        if self._agrees(module, want) or not self._is_steady(want):
            return module
        if self.rounds and not self._that_differ(module, runs):
            return module
        raise CaptureError(
            f"torch and ONNX Runtime disagree on {self.source.path}",
            hint="please report the file, or export the model again",
        )

    def _is_steady(self, want: Mapping[str, Known]) -> bool:
        """ONNX Runtime returns the same result twice: the file draws no random numbers."""
        again = Runs(self.source, (self.feed,)).values(self.source.outputs)[0]
        return all(
            _same(torch.from_numpy(np.asarray(again[n])), torch.from_numpy(np.asarray(x))) for n, x in want.items()
        )


def _axes(x: Tensor, free: list[int]) -> StatelessSymbolicContext[Any, Any]:
    kinds = [DimDynamic.DYNAMIC if axis in free and x.shape[axis] > 1 else DimDynamic.STATIC for axis in range(x.dim())]
    return StatelessSymbolicContext(dynamic_sizes=kinds)


def _same(value: Value, want: Tensor, least: float = 0.0) -> bool:
    """``least``: the difference that rounding in the file explains, for any dtype of this value."""
    got = tensor(value).to(want.dtype)
    return difference([got], [want]) <= ROOM * max(tolerance([want]), least if want.is_floating_point() else 0.0)
