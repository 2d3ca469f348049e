"""Inputs for both: the model's example, the same for the file, and variants with padding and with more tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.errors import CaptureError
from attnopt.onnx.load.layout_operators import torch_dtype
from attnopt.onnx.load.source import Source

HIDDEN = 3  # one token in so many is padding, in the variant with padding


@dataclass(frozen=True)
class Given:
    """One call of both.  ``leaves``: of the model, in the order of its pytree; ``feed``: of the file, by name; ``places``: which
    leaf an input of the file is."""

    call: CallInputs
    feed: Mapping[str, Tensor]
    places: Mapping[str, int]

    def with_leaves(self, leaves: Mapping[int, Tensor], feed: Mapping[str, Tensor] | None = None) -> Given:
        """With some leaves of the model replaced, and the file's inputs that are these."""
        flat, form = pytree.tree_flatten(self.call)
        changed = [leaves.get(i, x) for i, x in enumerate(flat)]
        own = {name: leaves[i].to(self.feed[name].dtype) for name, i in self.places.items() if i in leaves}
        return replace(self, call=pytree.tree_unflatten(changed, form), feed={**self.feed, **own, **(feed or {})})


def given_to_both(model: nn.Module, inputs: CallInputs, source: Source, own: Mapping[str, Tensor]) -> Given:
    """``own``: inputs that the file alone has, or has otherwise.  Raises CaptureError."""
    leaves = pytree.tree_leaves(inputs)
    names = _names_of_leaves(model, inputs)
    wanted = {i.name: i for i in source.inputs}
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    places = {n: names.index(n) for n in wanted if n not in own and n in names and names.index(n) in tensors}
    missing = [n for n in wanted if n not in own and n not in places]
    left = [i for i in tensors if i not in places.values()]
    if missing and len(missing) == len(left) and not _is_known(missing):
        places |= dict(zip(missing, left, strict=True))
        missing = []
    feed: dict[str, Tensor] = {n: leaves[i].detach().cpu() for n, i in places.items()} | dict(own)
    for name in missing:
        feed[name] = _without_past(name, wanted[name].type.tensor_type, feed, source)
    made = {n: feed[n].to(_dtype(wanted[n].type.tensor_type.elem_type, feed[n])) for n in wanted}
    return Given(inputs, made, places)


def _names_of_leaves(model: nn.Module, inputs: CallInputs) -> list[str]:
    """The parameter of ``forward`` that each leaf is, empty for parts of one."""
    bound = inspect.signature(model.forward).bind_partial(*inputs.args, **inputs.kwargs).arguments
    known = {id(x): name for name, x in bound.items()}
    known |= {id(x): name for name, x in inputs.kwargs.items()}
    return [known.get(id(x), "") for x in pytree.tree_leaves(inputs)]


def _is_known(names: list[str]) -> bool:
    return all(_kind(n) for n in names)


def _kind(name: str) -> str:
    """What an input of a decoder's file is that its model does not take."""
    lowered = name.lower()
    if lowered.startswith(("past", "cache")):
        return "past"
    return next((kind for kind in ("position_ids", "attention_mask") if kind in lowered), "")


def _without_past(name: str, kind: object, feed: Mapping[str, Tensor], source: Source) -> Tensor:
    """Raises CaptureError."""
    first = next((x for x in feed.values() if x.dim() >= 2), None)
    if first is None or not _kind(name):
        raise CaptureError(
            f"{source.path} takes {name}, which the example inputs of the model do not have",
            hint="pass the file's own inputs: inputs={name: tensor}, or --inputs with one array for each",
        )
    batch, length = first.shape[:2]
    if _kind(name) == "position_ids":
        return torch.arange(length).expand(batch, -1)
    if _kind(name) == "attention_mask":
        return torch.ones(batch, length, dtype=torch.int64)
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]  # type: ignore[attr-defined]
    return torch.zeros([batch if a == 0 else 0 if n is None else n for a, n in enumerate(sizes)])


def _dtype(elem_type: int, x: Tensor) -> torch.dtype:
    import onnx

    return torch_dtype(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))) if elem_type else x.dtype


# ---------------------------------------------------------------- variants
def unpadded(given: Given) -> Given:
    """With every flag of a padding mask set."""
    return given.with_leaves({i: torch.ones_like(x) for i, x in _masks(given)})


def padded(given: Given) -> Given | None:
    """With the last tokens of the first sequence hidden, or as the example hides some; None without a mask of padding."""
    masks = dict(_masks(given))
    if not masks:
        return None
    if any(not bool(x.all()) for x in masks.values()):
        return given
    found = {}
    for i, x in masks.items():
        made = x.clone()
        made[0, -max(1, x.shape[1] // HIDDEN) :] = 0
        found[i] = made
    return given.with_leaves(found)


def _masks(given: Given) -> Iterator[tuple[int, Tensor]]:
    """Flags [B, L] of which each row is one run of ones, beside zeros: those of padding."""
    for i, x in enumerate(pytree.tree_leaves(given.call)):
        if isinstance(x, Tensor) and x.dim() == 2 and not x.is_floating_point() and x.numel():
            steps = x[:, 1:].long() - x[:, :-1].long()
            is_run = bool((steps.abs().sum(1) <= 1).all()) and bool(x.any(1).all())
            if is_run and not bool(((x != 0) & (x != 1)).any()):
                yield i, x


def longer(given: Given, source: Source, length: int, tokens: int) -> Given | None:
    """With ``tokens`` in the place of ``length`` along the free axes of that size; None if the file has none."""
    axes = [(name, axis) for name, axis, _ in source.free if axis > 0 and given.feed[name].shape[axis] == length]
    leaves = pytree.tree_leaves(given.call)
    made: dict[int, Tensor] = {}
    feed: dict[str, Tensor] = {}
    for name, axis in axes:
        if name in given.places:
            i = given.places[name]
            made[i] = _lengthened(made.get(i, leaves[i]), axis, tokens)
        else:
            feed[name] = _lengthened(feed.get(name, given.feed[name]), axis, tokens)
    for i in set(range(len(leaves))) - set(given.places.values()):  # what the file does not take
        x = leaves[i]
        if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == length:
            made[i] = _lengthened(x, 1, tokens)
    return given.with_leaves(made, feed) if axes else None


def _lengthened(x: Tensor, axis: int, tokens: int) -> Tensor:
    """Repeated; what counts goes on counting."""
    old = x.shape[axis]
    if x.dim() <= 2 and not x.is_floating_point() and old > 1:
        step = x.narrow(axis, 1, old - 1) - x.narrow(axis, 0, old - 1)
        if bool((step == 1).all()):
            start = x.narrow(axis, 0, 1)
            return start + torch.arange(tokens, dtype=x.dtype).reshape([-1 if a == axis else 1 for a in range(x.dim())])
    made = x.index_select(axis, torch.arange(tokens) % old)
    if x.is_floating_point():  # no two copies are equal
        fade = 1 - (torch.arange(tokens) // old) / (4.0 * (tokens // old + 1))
        made = made * fade.to(x.dtype).reshape([-1 if a == axis else 1 for a in range(x.dim())])
    return made
