"""What is asked of the compiler."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.program import Program
from attnopt.capture.signature import Signature
from attnopt.compiler import plugins
from attnopt.compiler.check import all_fitting
from attnopt.compiler.policy import Policy
from attnopt.compiler.random_tokens import for_encoders
from attnopt.errors import PolicyError
from attnopt.ir.interfaces import Backend, Pass
from attnopt.ir.peers import Peers
from attnopt.match.find import Found


@dataclass(frozen=True)
class Options:
    """As of ``optimize``.  Raises PolicyError."""

    tolerance: float | None = None
    strict: bool = False
    limit: int | None = None
    seed: int = 0
    decodes: bool = False  # the result keeps the caches of its class, which can evict keys

    def __post_init__(self) -> None:
        limit, tolerance = self.limit, self.tolerance
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise PolicyError(f"limit must be a non-negative integer, not {limit!r}")
        if tolerance is not None and not tolerance >= 0:
            raise PolicyError(f"tolerance must be a number of at least 0, not {tolerance!r}")


@dataclass(frozen=True)
class Job:
    """One model to compile under one policy, with its example inputs and calibration batches."""

    model: nn.Module
    policy: Policy
    inputs: CallInputs
    dynamic_shapes: object
    batches: Sequence[CallInputs]
    backends: tuple[Backend, ...]
    options: Options
    own: CallInputs | None = None  # the user's example if ``inputs`` are larger
    peers: Peers | None = None  # who have other batches

    def signature(self, module: fx.GraphModule) -> Signature:
        """How the model is called; ``module`` stands for an ExportedProgram, which has no ``forward`` of its own."""
        return Signature.of(getattr(self.model, "forward", module.forward), *self.inputs)

    def arranged(self, program: Program) -> list[CallInputs]:
        """The calibration batches in the form in which the graph takes them.  Raises CalibrationError."""
        return all_fitting(program, self.signature(program.module), self.batches)

    def invented(
        self,
        program: Program,
        batches: Sequence[CallInputs],
        found: Sequence[Found],
        passes: Iterable[Sequence[Pass]],
    ) -> list[CallInputs]:
        """Batches of random tokens for the passes that fit to them, too, made of the arranged ones; none if no pass does, or
        the model reads no tokens.  None for decoders either, where it is not known to help, and where others have batches, too,
        each with its own common ids."""
        if self.peers is not None:
            return []
        if not any(p.widens for own in passes for p in own):
            return []
        return for_encoders(program.module, found, batches, self.options.seed)


def backends_of(backend: str | Backend) -> tuple[Backend, ...]:
    """The candidate backends; those of third parties only if named."""
    if isinstance(backend, Backend):
        return (backend,)
    if not isinstance(backend, str):
        raise PolicyError(f"backend must be a name or a Backend, not {type(backend).__name__}")
    if backend != "auto":
        return (plugins.make_backend(backend),)
    ours = [p for p in plugins.backends().values() if p.distribution == plugins.OURS]
    return tuple(plugins.make_backend(p.name) for p in ours)
