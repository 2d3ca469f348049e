"""What matching found: sites, near misses, and the inspection that lists them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from attnopt.ir.activations import Activations
from attnopt.ir.edited_parameters import edited_parameters
from attnopt.ir.projection import Projected, Projection
from attnopt.ir.refusal import Refusal
from attnopt.ir.site_edit import SiteEdit

Alignment = Literal["first", "last", "none"]


@dataclass(frozen=True)
class InputTensor:
    """One of the example inputs, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class TokenFeatures:
    """What keys and values are computed from, token by token: ``width`` features of each of ``batch`` sequences, or of any
    number of them where it is None; ``why``: what is in the way."""

    width: int = 0
    batch: int | None = None
    why: Refusal | None = None


@dataclass(frozen=True)
class Site(Projected):
    """One attention of the model, in its form after the passes applied so far."""

    where: str = ""  # source line of the user's model
    notes: tuple[str, ...] = ()  # notes: weights returned to the user, shared weights, ...
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    batch: int = 1  # B, L and S at the sizes of the example inputs
    q_len: int = 0
    kv_len: int = 0
    activations: Activations | None = field(default=None, repr=False, compare=False)  # if there is calibration data
    is_dynamic: bool = False  # L or S may vary with the inputs
    bias_hides: bool = False  # the bias may be a mask, such as one of padding
    kv_step: int = 0  # every S is ``kv_len`` and a multiple of this; 0: it is fixed
    inputs: Mapping[str, InputTensor] = field(default_factory=dict, repr=False)  # of the user's example, by name
    own_sizes: Mapping[str, int] = field(
        default_factory=dict, repr=False
    )  # "batch", "queries" and "keys" of that example
    device: str = "cpu"  # the kind of device that the attention runs on
    features: TokenFeatures | None = field(default=None, repr=False)  # None if unknown
    # "first": query i is at key i.  "last": past keys come first, the last query is at the last key.  "none":
    # the lengths vary independently, even if equal in the example.
    alignment: Alignment = "first"

    @property
    def scale(self) -> float:
        return self.spec.scale

    @property
    def is_cross(self) -> bool:
        return self.spec.is_cross

    @property
    def original(self) -> Projected | None:
        """Its form in the original model, if there is calibration data."""
        return None if self.activations is None else self.activations.site

    def refuse(self, code: str, *, expected: str = "", found: object = "", hint: str = "") -> Refusal:
        """A refusal that refers to this site."""
        return Refusal(code, expected, str(found), self.where, hint)

    def edited(self, made: SiteEdit) -> Site:
        """As it is with this edit: the next pass sees this one."""
        unknown = bool(made.spec.inputs or made.spec.before) or made.spec.extension is not None
        now = (
            None if unknown else self.activations
        )  # which know neither what a call brings, another run nor other tokens
        return replace(
            self,
            spec=made.spec,
            parameters={**self.parameters, **edited_parameters(self, made.edits, made.out_bias)},
            activations=None if now is None else now.edited(made.edits),
        )

    def stored_as(self, live: Mapping[str, Tensor]) -> Site:
        """As its weights are in a rewritten graph, ``live``: the rows of those that it split, joined or cut are unknown."""

        def now(p: Projection) -> Projection:
            named = [name for name in (p.weight, p.bias) if name is not None]
            if p.rows is None or all(n in live and live[n].shape == self.parameters[n].shape for n in named):
                return p
            why = "the rewrite changed these weights; attnopt.inspect of the result reads them"
            return replace(p, weight=None, bias=None, rows=None, why=why)

        return replace(self, projections={role: now(p) for role, p in self.projections.items()}, parameters=live)

    def without_activations(self) -> Site:
        return replace(self, activations=None)


@dataclass(frozen=True)
class NearMiss:
    """A rejected candidate: it resembles an attention and is none, or is one that attnopt cannot represent."""

    name: str
    refusal: Refusal
    where: str = ""
