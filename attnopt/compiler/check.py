"""Verification of the whole model: it must compute what its plans specify, at the example sizes and at other dynamic sizes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from attnopt.backends.reference import Reference
from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import ROOM, TOLERANCE, difference, tensors, tolerance
from attnopt.base.double_precision import widened, widened_inputs
from attnopt.base.sizes import hint
from attnopt.capture.capture import check_call
from attnopt.capture.fast_path import leaves_out_padding
from attnopt.capture.flat_call import Form, OtherObjectsError
from attnopt.capture.program import Program
from attnopt.capture.run_unchanged import holds, outputs_of
from attnopt.capture.signature import Signature, check_inputs, is_guard
from attnopt.capture.valid_sizes import other_sizes, sizes_that_fit
from attnopt.errors import CalibrationError, CaptureError, VerificationError
from attnopt.graph.evaluate import Sizes, dynamic_axes, is_heavy, symbols, within
from attnopt.graph.nodes import inputs_of, is_tensor, value, written
from attnopt.ir.blame import is_ours, told
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
            inputs = self.program.inputs
            counted: list[str] = []
            original = self._original(inputs, counted)
            error, warnings = self._compare(module, plain, inputs, original)
            if self.program.own is not None:
                own = self.program.own
                error_of_own, of_own = self._compare(module, plain, own, self._original(own, []))
                error, warnings = max(error, error_of_own), (*warnings, *of_own)
            others = self._at_other_sizes(module, plain)
            zeroed = leaves_out_padding(self.model, self.program.own or inputs, self._state)
        return error, tuple(dict.fromkeys((*_told(counted), *warnings, *others, *zeroed)))

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

    def _at_other_sizes(self, module: fx.GraphModule, plain: fx.GraphModule | None) -> tuple[str, ...]:
        found: list[tuple[str, ...]] = []
        for inputs in resized(self.program.module, self.program.inputs, self.program.fixed_axes):
            if len(found) == RESIZED:
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
        return tuple(chain.from_iterable(found))

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


def inputs_that_run(module: fx.GraphModule, inputs: CallInputs, held: Sequence[str] = ()) -> Iterator[CallInputs]:
    """The example inputs, then ``resized`` ones, those aside for which the graph is not valid."""
    yield inputs
    for other in resized(module, inputs, held):
        try:
            outputs_of(module, other)
        except Exception:
            continue
        yield other


def resized(module: fx.GraphModule, inputs: CallInputs, held: Sequence[str] = ()) -> list[CallInputs]:
    """The example inputs at other sizes of the module's dynamic axes, by repeating them; the module may refuse some.

    First at larger, distinct odd sizes, then at multiples, then at sizes that grow or shrink together, then
    each size alone, within the bounds of the graph and the constraints ``held`` between its sizes (see ``Report.fixed_axes``).
    """
    sizes = symbols(module.graph)
    nodes = inputs_of(module.graph)
    leaves, spec = pytree.tree_flatten(inputs)
    if not sizes or len(leaves) != len(nodes):
        return []
    fits = sizes_that_fit(module.graph, held)
    wanted = [within(module.graph, new) for new in _other_sizes(sizes)]
    wanted += [new for s in sizes if (new := next(filter(fits, other_sizes(sizes, s)), None)) is not None]
    found: list[CallInputs] = []
    for k, new in enumerate(wanted):
        if new == sizes or new in wanted[:k] or not fits(new):
            continue
        fitted = [_fitted(leaf, n, new) for leaf, n in zip(leaves, nodes, strict=True)]
        found.append(pytree.tree_unflatten(fitted, spec))
    return found


def _other_sizes(sizes: Sizes) -> list[Sizes]:
    odd: Sizes = {}
    for symbol, n in sizes.items():
        larger = n + 3 + n % 2
        while larger in odd.values():
            larger += 2
        odd[symbol] = larger
    values = list(sizes.values())
    multiples = {s: n * (2 + values[:k].count(n)) for k, (s, n) in enumerate(sizes.items())}
    alike = [{s: max(2, n + more) for s, n in sizes.items()} for more in (3, 1, -1)]
    return [odd, multiples, {s: 2 * n for s, n in sizes.items()}, *alike]


def _fitted(leaf: object, node: fx.Node, sizes: Sizes) -> object:
    if isinstance(leaf, int) and isinstance(value(node), torch.SymInt):
        return int(value(node).node.expr.subs(sizes))
    if not isinstance(leaf, Tensor) or not is_tensor(node):
        return leaf
    for axis, size in enumerate(value(node).shape):
        if isinstance(size, torch.SymInt):
            places = torch.arange(int(size.node.expr.subs(sizes)), device=leaf.device)
            leaf = leaf.index_select(axis, places % hint(size))
            if leaf.is_floating_point():  # no copies: the order of equal numbers is rounding's to choose
                times = (places // hint(size)).reshape([-1] + [1] * (leaf.dim() - axis - 1))
                leaf = leaf * (1 - times / 16).to(leaf.dtype)
    return leaf
