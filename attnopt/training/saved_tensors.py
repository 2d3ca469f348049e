"""What the backward pass needs of attention, kept as small integers (Mesa, arXiv:2111.11124)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from attnopt.base.call_inputs import CallInputs
from attnopt.base.compile_lock import compiling
from attnopt.compiler.analyze import analyze
from attnopt.errors import PolicyError
from attnopt.model import OptimizedModel
from attnopt.training.head_ranges import BITS, HeadSizes, Packed, pack

Place = tuple[int, ...]


@dataclass(frozen=True)
class SavedReport:
    """Of one backward pass: ``bytes_before`` and ``bytes_after``: what is kept of all attentions, parameters aside; ``cosine``
    between the gradients of all parameters with integers and without; ``same_loss``: bit for bit."""

    bytes_before: int
    bytes_after: int
    cosine: float
    same_loss: bool

    def __str__(self) -> str:
        share = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        return (
            f"kept of attention: {self.bytes_before:,} -> {self.bytes_after:,} bytes ({share:.0%}), "
            f"cosine of the gradients {self.cosine:.6f}"
        )


@dataclass(eq=False)
class QuantizedSaved:
    """Hooks in the attentions of a model, until ``remove`` is called or the ``with`` block of this object ends."""

    model: nn.Module = field(repr=False)
    sites: tuple[str, ...]
    bits: int
    is_on: bool = True
    _handles: list[RemovableHandle] = field(default_factory=list, repr=False)
    _count: _Count | None = field(default=None, repr=False)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def report(self, loss: Callable[[], Tensor]) -> SavedReport:
        """What it saves and costs: ``loss()`` computes a number from the model, and is called twice with the same random numbers.
        The gradients of the parameters are left alone."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        runs = [self._gradients(loss, parameters, is_on) for is_on in (False, True)]
        (exact, before), (got, after) = runs
        a, b = (torch.cat([g.double().flatten() for g in run[1:]]) for run in (exact, got))
        cosine = float(a @ b / (a.norm() * b.norm()).clamp(min=torch.finfo(torch.float64).tiny))
        return SavedReport(before.before, after.after, cosine, torch.equal(exact[0], got[0]))

    def _gradients(
        self, loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], is_on: bool
    ) -> tuple[list[Tensor], _Count]:
        was, self.is_on, self._count = self.is_on, is_on, _Count()
        try:
            with torch.random.fork_rng(), torch.enable_grad():
                found = loss()
                grads = torch.autograd.grad(found, parameters, allow_unused=True, materialize_grads=True)
            return [found.detach(), *grads], self._count
        finally:
            self.is_on, self._count = was, None


@compiling()
def quantize_saved(
    model: nn.Module, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None, *, bits: int = 8
) -> QuantizedSaved:
    """From now on keep what autograd saves in the attentions of ``model`` (queries, keys, values, weights, outputs) as integers
    of ``bits`` bits, 8 or 4, with a range for each head of each sequence, until the backward pass reads it.

    The forward pass stays as it is, bit for bit; gradients are rounded: see ``QuantizedSaved.report``.
    ``args``, ``kwargs``: example inputs, with which attentions are found; an optimized model knows its own.  What is saved
    without an axis of heads, such as the inputs of projections, is kept as it is.  A softmax that is written out with ``exp``
    loses more than others: exponentials have a wider range than weights.

    Raises PolicyError if there is no attention, CaptureError if the model cannot be captured.
    """
    if bits not in BITS:
        raise PolicyError(f"quantize_saved: invalid value bits={bits!r}: expected one of {', '.join(map(str, BITS))}")
    if isinstance(model, OptimizedModel):
        sites = [(site.name, "", HeadSizes.of(site.spec)) for site in model.origin.sites]
    else:
        found = analyze(model, CallInputs.of(args, kwargs), None).findings.found
        sites = [(f.site.name, f.site.name.partition("#")[0], HeadSizes.of(f.site.spec)) for f in found]
    if not sites:
        raise PolicyError("quantize_saved: no attention was found", hint="attnopt.inspect lists what resembles one")
    made = QuantizedSaved(model, tuple(name for name, _, _ in sites), bits)
    owners: dict[str, list[HeadSizes]] = {}
    for _, owner, sizes in sites:
        owners.setdefault(owner, []).append(sizes)
    for owner, of_owner in owners.items():
        made._handles += _hooked(model.get_submodule(owner), made, of_owner)
    return made


def _hooked(owner: nn.Module, made: QuantizedSaved, sizes: Sequence[HeadSizes]) -> list[RemovableHandle]:
    """Hooks around the forward of ``owner``, which may call itself.  What traces it sees nothing of them."""
    inside: list[Any] = []

    def before(*_: object) -> None:
        inside.append(nullcontext() if torch.compiler.is_compiling() else _saving(made, sizes))
        inside[-1].__enter__()

    def after(*_: object) -> None:
        inside.pop().__exit__(None, None, None)

    return [owner.register_forward_pre_hook(before), owner.register_forward_hook(after, always_call=True)]


@contextmanager
def _saving(made: QuantizedSaved, sizes: Sequence[HeadSizes]) -> Iterator[None]:
    """Inside, tensors of heads are saved as integers: one that is saved twice, or as another view, once."""
    known: dict[Place, tuple[StorageWeakRef, Packed]] = {}
    parameters = {p.untyped_storage().data_ptr() for p in made.model.parameters()}

    def packed(t: Tensor) -> Tensor | tuple[Packed, torch.Size]:
        if t.untyped_storage().data_ptr() in parameters or t.device.type == "meta":
            return t
        ref = StorageWeakRef(t.untyped_storage())  # type: ignore[no-untyped-call]
        place = _place(ref, t)
        if made._count is not None:
            made._count.keep(place, ref, t.nbytes)
        if not made.is_on:
            return t
        if place in known and not known[place][0].expired():  # type: ignore[no-untyped-call]
            return known[place][1], t.shape
        found = next((p for s in sizes if (p := pack(t, s, made.bits)) is not None), None)
        if found is None:
            return t
        if made._count is not None:
            made._count.saved += t.nbytes - found.nbytes
        known[place] = ref, found
        return found, t.shape

    def unpacked(saved: Tensor | tuple[Packed, torch.Size]) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved[0].tensor().reshape(saved[1])

    with saved_tensors_hooks(packed, unpacked):
        yield


def _place(ref: StorageWeakRef, t: Tensor) -> Place:
    """Equal for the same numbers in the same memory, in another shape too where they lie in a row."""
    layout = () if t.is_contiguous() else (*t.shape, *t.stride())
    return (ref.cdata, t._version, t.storage_offset(), t.numel(), *layout)


class _Count:
    """Bytes that are kept, of each tensor once."""

    def __init__(self) -> None:
        self._kept: dict[
            Place, tuple[StorageWeakRef, int]
        ] = {}  # the reference keeps the address from being used again
        self.saved = 0

    @property
    def before(self) -> int:
        return sum(size for _, size in self._kept.values())

    @property
    def after(self) -> int:
        return self.before - self.saved

    def keep(self, place: Place, ref: StorageWeakRef, size: int) -> None:
        self._kept.setdefault(place, (ref, size))
