"""Verification of the whole model: it must compute what its plans specify, at the example sizes and at other dynamic sizes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from attnopt.backends.reference import Reference
from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import ROOM, TOLERANCE, difference, tensors, tolerance
from attnopt.base.double_precision import widened, widened_inputs
from attnopt.base.split_weight import has_split
from attnopt.capture.capture import check_call
from attnopt.capture.fast_path import leaves_out_padding
from attnopt.capture.flat_call import Form, OtherObjectsError
from attnopt.capture.program import Program
from attnopt.capture.run_unchanged import holds, outputs_of
from attnopt.capture.signature import Signature, check_inputs, is_guard
from attnopt.compiler.resized_inputs import resized
from attnopt.errors import CalibrationError, CaptureError, VerificationError
from attnopt.graph.evaluate import dynamic_axes, is_heavy
from attnopt.graph.nodes import inputs_of, is_tensor, stored, value, written
from attnopt.ir.blame import is_ours, told
from attnopt.ir.peers import Peers, divided
from attnopt.lower.lower import Plan, lower

RESIZED = 2  # other sizes to compare: one nearby, and one that still differs after a strided layer
VANISHES = 1e-3  # fraction of a difference left in double precision if it is rounding, which shrinks by 1e-9


@dataclass(frozen=True)
class Checker:
    """Compares a lowered module with its meaning (the plain form of the same plans) and with the user's model."""

    model: nn.Module
    program: Program
    plans: Sequence[Plan]
    seed: int
    peers: Peers | None = None  # who compare at other sizes, if they made the same graph

    def check(self, module: fx.GraphModule) -> tuple[float, tuple[str, ...]]:
        """(largest relative difference from the user's model on the example inputs, warnings).

        Raises VerificationError if the module does not compute what its plans specify, CaptureError if it is not valid at
        other, requested sizes.
        """
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            plain = (
                None
                if all(p.changes_nothing for p in self.plans)
                else lower(self.program.module, self.plans, plain=True)
            )
            peers = self._with_the_same(module)
            apart = 1 if peers is None else RESIZED  # then each of the other sizes is compared apart
            parts = [partial(self._at_example_sizes, module, plain)]
            parts += [partial(self._at_other_sizes, module, plain, start, apart) for start in reversed(range(apart))]
            errors, warnings = zip(*divided(parts, peers), strict=True)
            zeroed = leaves_out_padding(self.model, self.program.own or self.program.inputs, self._state)
        return max(errors), tuple(dict.fromkeys((*chain.from_iterable(warnings), *zeroed)))

    def _with_the_same(self, module: fx.GraphModule) -> Peers | None:
        if self.peers is None or has_split(module):
            return None  # weights that are split are gathered by all, at the same time
        sums = [float(x.detach().double().sum()) for x in stored(module).values() if x.is_floating_point()]
        return self.peers if len({*self.peers.everyone((module.code, *sums))}) == 1 else None

    def _at_example_sizes(self, module: fx.GraphModule, plain: fx.GraphModule | None) -> tuple[float, tuple[str, ...]]:
        inputs, own = self.program.inputs, self.program.own
        counted: list[str] = []
        original = self._original(inputs, counted)
        error, warnings = self._compare(module, plain, inputs, original)
        if own is not None:
            error_of_own, of_own = self._compare(module, plain, own, self._original(own, []))
            error, warnings = max(error, error_of_own), (*warnings, *of_own)
        return error, (*_told(counted), *warnings)

    def error_on(self, module: fx.GraphModule, batches: Sequence[CallInputs], signature: Signature) -> float:
        """Largest relative difference from the user's model on these inputs.  Raises CalibrationError."""
        worst = 0.0
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for i, given in enumerate(batches):
                batch = fitting(module, signature, given, i, self.program.form, fixed=self.program.fixed_axes)
                worst = max(worst, difference(self._outputs(module, batch), self._outputs(self.model, batch)))
        return worst

    def _compare(
        self, module: fx.GraphModule, plain: fx.GraphModule | None, inputs: CallInputs, original: list[Tensor]
    ) -> tuple[float, tuple[str, ...]]:
        got = self._outputs(module, inputs)
        meant = original if plain is None else self._outputs(plain, inputs)
        apart = difference(got, meant)
        if apart <= ROOM * tolerance(meant):
            return difference(got, original), ()
        if any(bool(torch.isnan(t).any()) for t in meant):
            return apart, (
                "the model's own output contains NaN on the example inputs, so the outputs could not be compared",
            )
        choosing = [p.found.site.name for p in self.plans if p.spec.chooses]
        exactly = math.inf if choosing else self._apart_in_double(module, plain, inputs, original)
        if exactly <= VANISHES * apart:
            return difference(got, original), (
                f"the model amplifies rounding error: two equivalent computations differ by {apart:.2g}, and by "
                f"{exactly:.2g} in double precision (relative)",
            )
        self._blame(inputs, apart)
        if choosing:
            told = f"{len(choosing)} attentions choose blocks, rows or heads from their inputs; each is correct on its own, but"
            return difference(got, original), (
                f"{told} rounding in one changes the choices of the next ({apart:.2g} relative)",
            )
        raise VerificationError(
            f"the rewritten model differs from the reference computation by {apart:.2g} (relative)",
            hint="bisect with limit=1, 2, ... to find the site",
        )

    def _apart_in_double(
        self, module: fx.GraphModule, plain: fx.GraphModule | None, inputs: CallInputs, original: list[Tensor]
    ) -> float:
        """The difference in double precision; infinite if the model has no such form."""
        wide = widened_inputs(inputs)
        try:
            got, want = (self._outputs(m, wide) for m in self._in_double(module, plain, inputs, original))
        except Exception:
            return math.inf
        return difference(got, want)

    def _in_double(
        self, module: fx.GraphModule, plain: fx.GraphModule | None, inputs: CallInputs, original: list[Tensor]
    ) -> tuple[nn.Module, nn.Module]:
        """The module and its reference: the plain form, or the captured graph if verified to equal the model, in
        which parts in half precision are in double precision too."""
        meant = self.program.module if plain is None else plain
        if plain is None:
            allowed = ROOM * max(tolerance(original), coarsest(meant))
            if not difference(self._outputs(meant, inputs), original) <= allowed:
                return copy.deepcopy(module).double(), copy.deepcopy(self.model).double()
        return widened(module), widened(meant)

    def _at_other_sizes(
        self, module: fx.GraphModule, plain: fx.GraphModule | None, start: int, step: int
    ) -> tuple[float, tuple[str, ...]]:
        """At every ``step``th of the other sizes, from ``start`` on; the differences there do not count."""
        found: list[tuple[str, ...]] = []
        for inputs in resized(self.program.module, self.program.inputs, self.program.fixed_axes)[start::step]:
            if len(found) == RESIZED // step:
                break
            try:
                original = self._outputs(self.model, inputs)
            except OtherObjectsError:
                if self._refuses(module, inputs):
                    continue
                raise
            except Exception:
                continue
            try:
                found.append(self._compare(module, plain, inputs, original)[1])
            except VerificationError:
                raise
            except Exception as e:
                if is_guard(e):
                    continue  # the report lists the constraint
                sizes = ", ".join(str(tuple(t.shape)) for t in tensors(inputs))
                raise CaptureError(
                    f"the captured graph is not valid at other sizes ({sizes}): {type(e).__name__}: {str(e)[:200]}",
                    hint="remove the axes that cannot vary from dynamic_shapes",
                ) from e
        return 0.0, tuple(chain.from_iterable(found))

    def _refuses(self, module: fx.GraphModule, inputs: CallInputs) -> bool:
        try:
            self._outputs(module, inputs)
        except Exception:
            return True
        return False

    def _original(self, inputs: CallInputs, counted: list[str]) -> list[Tensor]:
        try:
            return self._outputs(self.model, inputs, counted)
        except Exception:
            if self.program.form is None:
                check_call(self.model, inputs)
            raise

    def _outputs(self, module: nn.Module, inputs: CallInputs, counted: list[str] | None = None) -> list[Tensor]:
        torch.manual_seed(self.seed)
        return outputs_of(module, inputs, self._state, counted, self.program.form)

    @cached_property
    def _state(self) -> list[str]:
        """What both the graph and the user's model call so."""
        return [name for name in written(self.program.module) if holds(self.model, name)]

    def _blame(self, inputs: CallInputs, error: float) -> None:
        """Name the first site that on its own differs from its spec."""
        for plan in self.plans:
            alone = self._outputs(lower(self.program.module, [plan]), inputs)
            plain = self._outputs(lower(self.program.module, [plan], plain=True), inputs)
            if not difference(alone, plain) <= ROOM * tolerance(plain):
                self._blame_backend(plan, plain, inputs, error)
                raise VerificationError(
                    f"the rewritten model does not compute what {', '.join(plan.passes)} specifies "
                    f"(relative difference {error:.2g})",
                    site=plan.found.site.name,
                    hint="exclude the site from the policy and report the model",
                )

    def _blame_backend(self, plan: Plan, plain: list[Tensor], inputs: CallInputs, error: float) -> None:
        """If the reference backend agrees with the spec, the passes are not at fault."""
        if is_ours(plan.backend):
            return
        by_reference = lower(self.program.module, [replace(plan, backend=Reference())])
        if not difference(self._outputs(by_reference, inputs), plain) <= ROOM * tolerance(plain):
            return
        raise VerificationError(
            f"{told(plan.backend, 'backend')} does not compute what the spec says (relative difference {error:.2g})",
            site=plan.found.site.name,
            hint="choose another backend",
        )


def _told(counted: Sequence[str]) -> tuple[str, ...]:
    if not counted:
        return ()
    listed = ", ".join(counted[:3]) + (", ..." if len(counted) > 3 else "")
    return (f"each call of the model changes its attribute {listed}: the graph uses its value at capture",)


def coarsest(gm: fx.GraphModule) -> float:
    """The tolerance for the least precise products in the graph, some of which may be in half precision."""
    found = {value(n).dtype for n in gm.graph.nodes if is_heavy(n) and is_tensor(n)}
    return max((TOLERANCE[d] for d in found if d in TOLERANCE), default=0.0)


def fitting(
    module: fx.GraphModule,
    signature: Signature,
    batch: CallInputs,
    number: int,
    form: Form | None = None,
    fixed: Sequence[str] = (),
) -> CallInputs:
    """The calibration batch in the form that the graph takes, on its device.  Raises CalibrationError.

    ``fixed``: the report's lines about requested axes that stayed static."""
    try:
        arranged = signature.arrange(*batch)
        if form is not None:
            arranged = form.take(*arranged).inputs
        check_inputs(module, *arranged)
        arranged = _moved(module, arranged)
    except (CaptureError, TypeError) as e:
        raise CalibrationError(
            f"calibration batch {number} does not fit the example inputs: {str(e).splitlines()[0]}",
            hint="pass batches of the same structure and size"
            + ("" if fixed or dynamic_axes(module.graph) else ', or optimize with dynamic_shapes="auto"'),
        ) from e
    return arranged


def all_fitting(program: Program, signature: Signature, batches: Iterable[CallInputs]) -> list[CallInputs]:
    """The calibration batches in the form that the graph of ``program`` takes.  Raises CalibrationError."""
    form, fixed = program.form, program.fixed_axes
    return [fitting(program.module, signature, batch, i, form, fixed) for i, batch in enumerate(batches)]


def _moved(module: fx.GraphModule, inputs: CallInputs) -> CallInputs:
    wanted = map(value, inputs_of(module.graph))
    moved: CallInputs = pytree.tree_map(
        lambda x: x.to(to.device) if isinstance(to := next(wanted), Tensor) and isinstance(x, Tensor) else x, inputs
    )
    return moved
