"""Let an attention read keys and values of other tokens beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnopt.base.input import Input
from attnopt.base.options import number
from attnopt.errors import PolicyError
from attnopt.ir.call_tensor import BATCH, CallTensor, Source
from attnopt.ir.constant import Constant
from attnopt.ir.extended_keys import ExtendedKeys
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.passes.preconditions import (
    distinct_heads,
    refuse_extended,
    refuse_gained,
    refuse_pooled,
    refuse_rows,
    refuse_unfit_inputs,
    refuse_unknown_heads,
)
from attnopt.passes.tensor_options import TensorOption, tensor_option

Mask = tuple[bool, ...] | tuple[tuple[bool, ...], ...]
_TOKENS = "reference"  # the length that features and mask of a call have in common


@dataclass(frozen=True)
class ExtendKeys(Pass):
    """Queries see M other tokens beside those of the attention: its keys become ``[K; K_ref]``, its values ``[V; V_ref]``.

    This is the self-subject attention of DreamTuner (arXiv:2312.13691).
    ``reference``: the features of these tokens as the key and value projections read them, such as what another run gives to
    the layer: finite numbers, a tensor or nested lists, [M, C] or [B or 1, M, C]; or an ``Input``, which each call brings.  Keys
    and values come from them by the site's own projections, biases and norms, with the weights that other passes leave.
    ``weight``: a token of the reference counts as often as this says: its scores grow by the logarithm.  0: not at all.
    ``mask``: which of the M are seen, bool [M] or [B or 1, M], or an ``Input``.  ``heads``: None for all heads of the trained
    model; those that were already pruned are ignored.
    Masks, biases, patterns and segments of the site apply to its own keys; its softcap and sinks to all.  Refused where keys are
    no function of each token alone: with rotary positions, caches, convolutions.  Raises PolicyError.
    """

    name: ClassVar[str] = "extend-keys"
    exact: ClassVar[bool] = False
    reference: TensorOption | Sequence[Any]
    weight: float = 1.0
    heads: Sequence[int] | None = None
    mask: TensorOption | Sequence[Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", number(self.name, "weight", self.weight))
        if self.weight < 0:
            raise PolicyError(f"extend-keys: invalid value weight={self.weight!r}: expected a number of at least 0")
        if self.heads is not None:
            object.__setattr__(self, "heads", distinct_heads(self.name, self.heads))
        object.__setattr__(self, "reference", _features(self.reference))
        if self.mask is not None:
            object.__setattr__(self, "mask", _mask(self.mask))
            self._check_mask()

    def _check_mask(self) -> None:
        """Raises PolicyError if it is known to be for other tokens."""
        if isinstance(self.reference, Input) or isinstance(self.mask, Input):
            return
        mask = torch.tensor(self.mask)
        of_reference = self.reference.shape[:-1] if isinstance(self.reference, Constant) else (0,)
        batches = {x[0] for x in (mask.shape, of_reference) if len(x) == 2} - {1}
        if mask.shape[-1:] != of_reference[-1:] or len(batches) > 1:
            raise PolicyError(
                f"extend-keys: a mask of {_times(mask.shape)} for a reference of {_times(of_reference)} tokens",
                hint="give one bool for each token of the reference",
            )

    @classmethod
    def typical(cls) -> ExtendKeys:
        return cls(reference=())

    def check(self, site: Site) -> Refusal | None:
        return (
            refuse_unknown_heads(site, self.heads or ())
            or refuse_extended(site, "give all tokens to one extend-keys")
            or refuse_rows(site, "use either query-rows or extend-keys at a site")
            or refuse_pooled(site, "use either pool-keys or extend-keys at a site")
            or refuse_gained(
                site, "use either segment-gain or extend-keys at a site; weight= is a gain on the reference"
            )
            or _refuse_unread(site)
            or self._refuse_other_features(site)
            or refuse_unfit_inputs(site, self._read(site), "give tokens x features, with one mask for the same tokens")
        )

    def rewrite(self, site: Site) -> Rewrite:
        heads = tuple(h for h in site.spec.heads if self.heads is None or h in self.heads)
        read = self._read(site)
        if not heads or self.weight == 0 or not read:
            what = "weight 0" if self.weight == 0 else "no token of the reference is seen"
            return Rewrite(site.spec, notes=(f"extend-keys: {what}, which changes nothing",) if heads else ())
        reference, mask = read[0], read[1] if len(read) > 1 else None
        is_stored = isinstance(reference, Constant)
        tokens = reference.shape[-2] if isinstance(reference, Constant) else site.inputs[str(reference)].shape[-2]
        made = ExtendedKeys(reference, tokens, heads, self.weight, mask)
        stored = (
            "extend-keys: the keys and values of the reference are stored, and do not follow later changes of weights"
        )
        return Rewrite(replace(site.spec, extension=made), notes=(stored,) if is_stored else ())

    def _read(self, site: Site) -> tuple[Source, ...]:
        """The features, without tokens that are never seen, and the mask that is left; nothing if no token is left."""
        features, mask = self.reference, self.mask
        width = 0 if site.features is None else site.features.width
        seen = None if mask is None or isinstance(mask, Input) else torch.tensor(mask)
        if features == () or (seen is not None and not bool(seen.any())):
            return ()
        if seen is not None and bool(seen.all()) and isinstance(features, Constant):
            seen = mask = None
        if seen is not None and isinstance(features, Constant) and (seen.dim() == 1 or len(seen) == 1):
            return (Constant.of(features.tensor()[..., seen.reshape(-1), :]),)
        tokens: int | str = features.shape[-2] if isinstance(features, Constant) else _TOKENS
        tokens = tokens if seen is None else seen.shape[-1]
        read = CallTensor(features, (BATCH, tokens, width)) if isinstance(features, Input) else features
        assert isinstance(read, (CallTensor, Constant))
        if isinstance(mask, Input):
            return read, CallTensor(mask, (BATCH, tokens), is_mask=True)
        return (read,) if seen is None else (read, Constant.of(seen))

    def _refuse_other_features(self, site: Site) -> Refusal | None:
        """Refuse constants of another width, or for other sequences."""
        assert site.features is not None
        width, batch = site.features.width, site.features.batch
        sizes = self.reference.shape if isinstance(self.reference, Constant) else (width,)
        given = site.inputs.get(self.reference.name) if isinstance(self.reference, Input) else None
        if given is not None and 0 in given.shape:
            hint = "give an example with at least one token"
            return site.refuse("other-features", expected="a reference", found=_times(given.shape), hint=hint)
        if sizes[-1] != width or (len(sizes) == 3 and sizes[0] not in (1, batch)):
            return site.refuse(
                "other-features",
                expected=f"a reference of tokens x {width}, or of {_batches(batch)} x tokens x {width} numbers",
                found=_times(sizes),
                hint="give what the key projection of this site reads, such as the input of the layer after its norm",
            )
        of_sequences = isinstance(self.mask, tuple) and isinstance(self.mask[0], tuple) and len(self.mask)
        if of_sequences and of_sequences not in (1, batch):
            plural = "" if _batches(batch) == "1" else "s"
            expected, found = f"a mask for {_batches(batch)} sequence{plural}", f"one for {of_sequences}"
            return site.refuse("other-features", expected=expected, found=found, hint="give one for all sequences")
        return None


def _refuse_unread(site: Site) -> Refusal | None:
    """Refuse keys and values that do not come from the features of tokens, one by one."""
    if site.alignment == "last":
        return site.refuse(
            "cached-keys",
            expected="keys that are all computed in this call",
            found=f"{site.q_len} queries after {site.kv_len - site.q_len} past keys",
            hint="capture the model without its cache",
        )
    if site.features is None:
        return site.refuse(
            "unknown-features",
            expected="known features of tokens",
            found="a site of a saved model",
            hint="optimize the model itself with this pass",
        )
    return None if site.features.why is None else replace(site.features.why, where=site.where)


def _batches(batch: int | None) -> str:
    return "1" if batch in (1, None) else f"1 or {batch}"


def _features(given: Any) -> Constant | Input | tuple[()]:
    """Raises PolicyError.  An empty tuple if there are no tokens."""
    if isinstance(given, Tensor) and given.dim() in (2, 3) and 0 in given.shape[:-1]:
        return ()
    if isinstance(given, (list, tuple)) and not given:
        return ()
    hint = "use finite floating-point numbers, [tokens, features] or [batch, tokens, features]; or an Input"
    return tensor_option("extend-keys", "reference", given, lambda shape: len(shape) in (2, 3), hint)


def _mask(given: Any) -> Mask | Input:
    """Raises PolicyError."""
    try:
        if isinstance(given, Input) or (isinstance(given, Mapping) and "input" in given):
            return given if isinstance(given, Input) else Input(given["input"])
        found = given if isinstance(given, Tensor) else torch.tensor(given)
        assert found.dtype == torch.bool or found.numel() == 0
        assert found.dim() in (1, 2)
        assert found.dim() == 1 or found.shape[0] > 0
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        shown = f"of shape {list(given.shape)}" if isinstance(given, Tensor) else repr(given)[:60]
        hint = "use bools, [tokens] or [batch, tokens]; or an Input"
        raise PolicyError(f"extend-keys: invalid mask {shown}", hint=hint) from error
    listed = found.bool().tolist()
    return tuple(tuple(row) if isinstance(row, list) else row for row in listed)


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
