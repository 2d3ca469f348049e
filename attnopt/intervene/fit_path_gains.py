"""Gains of paths by least squares on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import as_called, compiling
from attnopt.base.options import number, whole
from attnopt.base.progress import working
from attnopt.base.quiet import quiet
from attnopt.capture.calibration import Batch, Calibration
from attnopt.compiler.analyze_batches import analyze_batches
from attnopt.compiler.chosen_sites import site_globs
from attnopt.compiler.edited_graph import cleaned
from attnopt.compiler.head_graph import HeadGraph
from attnopt.compiler.head_sweep import HeadSweep
from attnopt.errors import CalibrationError, PolicyError
from attnopt.graph.resume import Part
from attnopt.intervene.metric import require_callable
from attnopt.intervene.path_gain import Gain, chosen_gains, paths_of
from attnopt.intervene.path_sum import add_path_sum
from attnopt.intervene.readout import Readout
from attnopt.report.path_gains import PathGains

HALVINGS = 10  # of one step, until the error falls
SMALL = 1e-7  # relative fall of the error at which the fit ends

Read = Callable[[Any], Tensor]


@compiling()
def fit_path_gains(
    model: nn.Module,
    calibration: Iterable[Batch] | Calibration,
    targets: Iterable[Tensor] | None = None,
    *,
    read: Read | None = None,
    paths: str | Iterable[str] = "*",
    fixed: Mapping[str, Gain] | None = None,
    ridge: float = 1e-3,
    limit: int = 20,
) -> PathGains:
    """The gains for ``path_gain`` with which the model comes closest to ``targets`` on calibration data, by least squares::

        min over gains of  mean |read(output) - target|^2  +  ridge * s * |gains - 1|^2

    where s is the mean curvature of the first term.  The readout is linear in the gains up to its norm; through that and
    ``read`` the fit takes up to ``limit`` Gauss-Newton steps, each of which lowers the error.  The result is a mapping that
    ``path_gain`` takes.

    ``targets``: one tensor for each batch.  ``read``: from the model's output to a tensor of that shape; None for the output, or
    its ``logits``.  For labels, read probabilities: ``lambda logits: logits.softmax(-1)`` and one-hot targets.
    ``targets=None`` are the model's own outputs, which gains of 1 reach exactly: it needs ``fixed``, for example paths that
    are cut (0), which the others then make up for.
    ``paths``: names or globs of the paths to fit.  ``fixed``: gains that are given.  Evaluate on other data.

    Raises CalibrationError for targets that do not fit, and a read tensor that no path changes or that is not finite; other
    errors as of ``path_gain``.
    """
    if read is not None:
        require_callable("fit_path_gains", "read", read)
    strength = number("fit_path_gains", "ridge", ridge)
    if strength < 0:
        raise PolicyError(f"fit_path_gains: invalid value ridge={ridge!r}: expected at least 0")
    steps = whole("fit_path_gains", "limit", limit, least=1)
    if targets is None and not fixed:
        raise PolicyError(
            "fit_path_gains: without targets the model's own outputs are fitted, which gains of 1 already give",
            hint="pass targets, or fixed={...} for paths whose gains are given, such as 0",
        )
    analyzed, batches = analyze_batches(model, Calibration.of(calibration))
    module = analyzed.program.module
    readout = Readout(module.graph, analyzed.findings.found)
    given = chosen_gains(readout, fixed or {})
    free = _free(readout, paths, given)
    held = add_path_sum(module, readout, {**given, **{name: torch.ones((), dtype=torch.float64) for name in free}})
    cleaned(module)
    sweep = HeadSweep(analyzed.program, HeadGraph(module, {}, {}))
    with quiet():  # torch reads its rules of forward derivatives at the first one, with deprecated functions of its own
        torch.func.jvp(torch.sin, (torch.ones(()),), (torch.ones(()),))
    with torch.no_grad(), working("fitting gains of paths") as tick:
        problem = _Problem(sweep, [held[name] for name in free], read or _logits, batches, tick)
        problem.aim([*targets] if targets is not None else None, held, given)
        found = problem.solved(strength, steps)
    gains: dict[str, Gain] = {name: gain.tolist() for name, gain in given.items()}
    gains |= dict(zip(free, found.gains.tolist(), strict=True))
    ordered = {name: gains[name] for name in readout.shares if name in gains}
    return PathGains(ordered, frozenset(given), found.before, found.after, found.steps)


def _free(readout: Readout, paths: object, given: Mapping[str, Tensor]) -> list[str]:
    globs = site_globs("fit_path_gains", paths)
    names = {name for glob in globs for name in paths_of("fit_path_gains", readout, glob)}
    free = [name for name in readout.shares if name in names and name not in given]
    if not free:
        raise PolicyError("fit_path_gains: every path is in fixed, none is left to fit")
    for name in free:
        readout.require_alone(readout.shares[name])
    return free


def _logits(output: Any) -> Any:
    return getattr(output, "logits", output)


@dataclass(frozen=True)
class _Error:
    """Of some gains: half the slope and half the curvature of the squared error, and it itself, over ``count`` numbers."""

    squares: float
    slope: Tensor
    curvature: Tensor
    count: int


@dataclass(frozen=True)
class _Solved:
    gains: Tensor
    before: float
    after: float
    steps: int


class _Problem:
    """The squared error as a function of free gains.  What does not depend on them is computed once for each evaluation of a
    batch; of the batches none is kept."""

    def __init__(
        self,
        sweep: HeadSweep,
        free: Sequence[fx.Node],
        read: Read,
        batches: Sequence[CallInputs],
        tick: Callable[[], None],
    ) -> None:
        self.sweep, self.free, self.read, self.batches, self.tick = sweep, free, read, batches, tick
        self.part = Part(sweep.graph.module.graph, free, sweep.ends)
        self.targets: list[Tensor] = []

    def aim(self, targets: Sequence[Tensor] | None, held: Mapping[str, fx.Node], given: Mapping[str, Tensor]) -> None:
        """Set the targets, or take the model's own outputs before the given gains count.  Raises CalibrationError."""
        module, ones = self.sweep.graph.module, torch.ones(len(self.free), dtype=torch.float64)
        buffers = {name: module.get_buffer(str(held[name].target)) for name in given}
        if targets is None:
            for buffer in buffers.values():
                buffer.fill_(1.0)
            targets = [self._reader(batch)(ones) for batch in self.batches]
        for name, buffer in buffers.items():
            buffer.copy_(given[name])
        if len(targets) != len(self.batches):
            raise CalibrationError(
                f"fit_path_gains: {len(targets)} targets for {len(self.batches)} batches",
                hint="give one for each batch",
            )
        self.targets = [torch.as_tensor(t).detach().double() for t in targets]

    def solved(self, ridge: float, limit: int) -> _Solved:
        """Gauss-Newton steps, halved until the error falls."""
        gains = torch.ones(len(self.free), dtype=torch.float64)
        now = self._error(gains)
        if not bool(now.curvature.diagonal().any()):
            raise CalibrationError(
                "fit_path_gains: no path changes what is read of the output", hint="choose other paths or another read"
            )
        weight = ridge * float(now.curvature.diagonal().mean())

        def total(error: _Error, at: Tensor) -> float:
            return error.squares + weight * float((at - 1).square().sum())

        before, taken, identity = now, 0, torch.eye(len(gains), dtype=torch.float64)
        for _ in range(limit):
            slope = now.slope + weight * (gains - 1)
            step = torch.linalg.lstsq(now.curvature + weight * identity, -slope, driver="gelsd").solution
            size, found = 1.0, None
            for _ in range(HALVINGS):
                trial = gains + size * step
                error = self._error(trial)
                if total(error, trial) < total(now, gains):
                    found = trial, error
                    break
                size /= 2
            if found is None:
                break
            fallen = total(now, gains) - total(found[1], found[0])
            is_small = fallen <= SMALL * total(now, gains)
            gains, now = found
            taken += 1
            if is_small:
                break
        return _Solved(gains, before.squares / before.count, now.squares / now.count, taken)

    def _error(self, gains: Tensor) -> _Error:
        squares, count = 0.0, 0
        slope, curvature = torch.zeros_like(gains), gains.new_zeros(len(gains), len(gains))
        for place, (batch, target) in enumerate(zip(self.batches, self.targets, strict=True)):
            reader = self._reader(batch)
            columns: list[Tensor] = []
            for unit in torch.eye(len(gains), dtype=gains.dtype):
                both: Any = torch.func.jvp(reader, (gains,), (unit,))
                value, column = (x.detach() for x in both)
                columns.append(column.flatten().cpu())
            residual = self._minus(value, target, place)
            jacobian = torch.stack(columns)
            squares += float(residual @ residual)
            slope += jacobian @ residual
            curvature += jacobian @ jacobian.T
            count += residual.numel()
            self.tick()
        return _Error(squares, slope, curvature, count)

    def _reader(self, batch: CallInputs) -> Callable[[Tensor], Tensor]:
        """From gains [P] to what is read of the output, in double precision."""
        around = self.sweep.call(batch).around(self.part)
        buffers = [self.sweep.graph.module.get_buffer(str(n.target)) for n in self.free]

        def reader(gains: Tensor) -> Tensor:
            each = [gains[i].to(b.device, b.dtype) for i, b in enumerate(buffers)]
            output = self.sweep.told(self.part.differentiable(around, each), batch)
            with as_called():
                found = self.read(output)
            if not isinstance(found, Tensor) or not found.is_floating_point():
                told = f"a tensor of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
                raise CalibrationError(
                    f"fit_path_gains: what is read of the output is {told}, expected a tensor of real numbers",
                    hint="pass read=, such as lambda out: out.logits[:, -1]",
                )
            return found.double()

        return reader

    def _minus(self, value: Tensor, target: Tensor, batch: int) -> Tensor:
        """[n].  Raises CalibrationError."""
        if value.shape != target.shape:
            raise CalibrationError(
                f"fit_path_gains: target {batch} has the shape {list(target.shape)}, and what is read {list(value.shape)}",
                hint="give targets of the shape of read(output); of class numbers their one-hot form",
            )
        residual = (value.cpu() - target.cpu()).flatten()
        if not bool(torch.isfinite(residual).all()):
            raise CalibrationError(f"fit_path_gains: batch {batch} or its target has NaN or infinities")
        return residual
