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
from attnopt.ir.constant import Constant
from attnopt.ir.extended_keys import ExtendedKeys
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import InputTensor, Site
from attnopt.passes.preconditions import (
    distinct_heads,
    refuse_extended,
    refuse_gained,
    refuse_pooled,
    refuse_unknown_heads,
)

Mask = tuple[bool, ...] | tuple[tuple[bool, ...], ...]


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
    reference: Tensor | Constant | Sequence[Any] | Mapping[str, Any] | Input
    weight: float = 1.0
    heads: Sequence[int] | None = None
    mask: Tensor | Sequence[Any] | Input | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", number(self.name, "weight", self.weight))
        if self.weight < 0:
            raise PolicyError(f"extend-keys: invalid value weight={self.weight!r}: expected a number of at least 0")
        if self.heads is not None:
            object.__setattr__(self, "heads", distinct_heads(self.name, self.heads))
        if not isinstance(self.reference, Input):
            object.__setattr__(self, "reference", _features(self.reference))
        if self.mask is not None and not isinstance(self.mask, Input):
            object.__setattr__(self, "mask", _mask(self.mask))
            self._check_mask()

    def _check_mask(self) -> None:
        """Raises PolicyError if it is known to be for other tokens."""
        if isinstance(self.reference, Input):
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

    @property
    def inputs(self) -> tuple[Input, ...]:
        return tuple(x for x in (self.reference, self.mask) if isinstance(x, Input))

    def check(self, site: Site) -> Refusal | None:
        return (
            refuse_unknown_heads(site, self.heads or ())
            or refuse_extended(site, "give all tokens to one extend-keys")
            or refuse_pooled(site, "use either pool-keys or extend-keys at a site")
            or refuse_gained(
                site, "use either segment-gain or extend-keys at a site; weight= is a gain on the reference"
            )
            or _refuse_unread(site)
            or self._refuse_other_features(site)
            or self._refuse_other_mask(site)
        )

    def rewrite(self, site: Site) -> Rewrite:
        heads = tuple(h for h in site.spec.heads if self.heads is None or h in self.heads)
        reference, mask = self._seen()
        if not heads or self.weight == 0 or reference is None:
            what = "weight 0" if self.weight == 0 else "no token of the reference is seen"
            return Rewrite(site.spec, notes=(f"extend-keys: {what}, which changes nothing",) if heads else ())
        of_call = isinstance(reference, Input)
        tokens = (site.inputs[reference.name] if isinstance(reference, Input) else reference).shape[-2]
        made = ExtendedKeys(reference, tokens, heads, self.weight, mask)
        stored = (
            "extend-keys: the keys and values of the reference are stored, and do not follow later changes of weights"
        )
        return Rewrite(replace(site.spec, extension=made), notes=() if of_call else (stored,))

    def _seen(self) -> tuple[Input | Constant | None, Input | Constant | None]:
        """The reference without tokens that are never seen, None if none is left, and the mask that is left."""
        given, mask = self.reference, self.mask
        assert isinstance(given, (Input, Constant, tuple))
        if isinstance(given, tuple):
            return None, None
        if mask is None or isinstance(mask, Input):
            return given, mask
        seen = torch.tensor(mask)
        if not bool(seen.any()):
            return None, None
        if bool(seen.all()):
            return given, None
        if isinstance(given, Constant) and (seen.dim() == 1 or len(seen) == 1):
            return Constant.of(given.tensor()[..., seen.reshape(-1), :]), None
        return given, Constant.of(seen.float())

    def _refuse_other_features(self, site: Site) -> Refusal | None:
        assert site.features is not None
        width, given = site.features.width, self.reference
        if isinstance(given, Input):
            found = site.inputs.get(given.name)
            if found is None:
                return _refuse_absent(site, given)
            if not found.dtype.is_floating_point:
                kind = str(found.dtype).removeprefix("torch.")
                return site.refuse("not-features", expected="floating-point numbers", found=f"{given.name} of {kind}")
            sizes = found.shape
        elif isinstance(given, Constant):
            sizes = given.shape
        else:
            return None
        if len(sizes) in (2, 3) and sizes[-1] == width and self._fits_batch(site, sizes[:-2]) and sizes[-2] > 0:
            return None
        return site.refuse(
            "other-features",
            expected=f"a reference of tokens x {width}, or of {_batches(site)} x tokens x {width} numbers",
            found=_times(sizes),
            hint="give what the key projection of this site reads, such as the input of the layer after its norm",
        )

    def _fits_batch(self, site: Site, batch: Sequence[int]) -> bool:
        assert site.features is not None
        if not batch or batch[0] == 1:
            return True
        known = site.features.batch
        return batch[0] == (site.batch if known is None and isinstance(self.reference, Input) else known)

    def _refuse_other_mask(self, site: Site) -> Refusal | None:
        given = self.mask
        if given is None or isinstance(self.reference, tuple):
            return None
        if isinstance(given, Input):
            found = site.inputs.get(given.name)
            if found is None:
                return _refuse_absent(site, given)
            if found.dtype != torch.bool:
                kind = str(found.dtype).removeprefix("torch.")
                return site.refuse("not-a-mask", expected="a bool for each token", found=f"{given.name} of {kind}")
        else:
            found = InputTensor(tuple(torch.tensor(given).shape), torch.bool)
        features = site.inputs[self.reference.name] if isinstance(self.reference, Input) else self.reference
        assert isinstance(features, (InputTensor, Constant))
        tokens = features.shape[-2]
        is_fixed = not isinstance(given, Input)
        batches = {1, site.features.batch if is_fixed and site.features is not None else site.batch}
        if (
            len(found.shape) in (1, 2)
            and found.shape[-1] == tokens
            and (len(found.shape) == 1 or found.shape[0] in batches)
        ):
            return None
        expected = f"a mask of {tokens}, or of {_batches(site)} x {tokens} tokens"
        return site.refuse("wrong-length", expected=expected, found=_times(found.shape))


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
        return site.refuse("unknown-features", expected="known features of tokens", found="a site of a saved model")
    if site.features.why is None:
        return None
    code, expected, found, hint = site.features.why
    return site.refuse(code, expected=expected, found=found, hint=hint)


def _refuse_absent(site: Site, given: Input) -> Refusal:
    listed = ", ".join(site.inputs) or "none"
    return site.refuse(
        "unknown-input", expected="a tensor among the inputs of the model", found=f"{given} beside {listed}"
    )


def _batches(site: Site) -> str:
    return "1" if site.batch == 1 else f"1 or {site.batch}"


def _features(given: Any) -> Constant | tuple[()]:
    """Raises PolicyError.  An empty tuple if there are no tokens."""
    try:
        found = Constant.from_json(given) if isinstance(given, Mapping) else given
        found = torch.tensor(found, dtype=torch.float64) if isinstance(found, (list, tuple)) else found
        if isinstance(found, Tensor) and 0 in (found.numel(), *found.shape[-2:-1]):
            return ()
        found = Constant.of(found) if isinstance(found, Tensor) else found
        assert isinstance(found, Constant)
        assert len(found.shape) in (2, 3)
        assert bool(found.tensor().isfinite().all())
    except (ValueError, KeyError, TypeError, OverflowError, RuntimeError, AssertionError) as error:
        shown = f"of shape {list(given.shape)}" if isinstance(given, (Tensor, Constant)) else repr(given)[:60]
        raise PolicyError(
            f"extend-keys: invalid reference {shown}",
            hint="use finite floating-point numbers, [tokens, features] or [batch, tokens, features]; or an Input",
        ) from error
    return found


def _mask(given: Any) -> Mask:
    """Raises PolicyError."""
    try:
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
    return " x ".join(map(str, sizes)) or "a single number"
