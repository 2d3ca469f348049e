"""Queries, keys or attention maps of heads from another run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from attnopt.base.input import Input
from attnopt.base.options import positions
from attnopt.errors import PolicyError
from attnopt.ir.call_tensor import BATCH, KEYS, QUERIES, CallTensor, Source, of_heads
from attnopt.ir.constant import Constant
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.mixed_maps import Mixed
from attnopt.ir.refusal import Refusal
from attnopt.ir.semantics import heads_of
from attnopt.ir.site import Site
from attnopt.ir.spec import AttentionSpec
from attnopt.ir.transplants import Transplanted
from attnopt.passes.preconditions import (
    distinct_heads,
    note_absent_tokens,
    refuse_no_single_run,
    refuse_unfit_inputs,
    refuse_unknown_heads,
    refuse_unknown_tokens,
)
from attnopt.passes.tensor_options import Shape, TensorOption, tensor_option

ROLES = ("q", "k", "map")
_SIZES = {"q": "queries, D", "k": "keys, D", "map": "queries, keys"}


@dataclass(frozen=True)
class Transplant(Pass):
    """The queries, the keys, or the attention map of ``heads`` are those of another run.

    This is the editing of MotionCLR (arXiv:2410.18977): queries of a second motion give its timing (style), its map gives what
    happens when (replacement).
    ``q``, ``k``: [B or 1, heads, L, D] and [B or 1, heads, S, D]: what scores read, with norms, rotary positions and the factors
    that the model puts on queries, on keys, or on the scores of a head; ``site.scale`` is what multiplies their product.  Of each
    query head its own, also where heads share keys.  ``map``: [B or 1, heads, L, S], what multiplies
    the values; no mask or pattern hides anything in it.  Each is an ``Input``, which every call brings; or a floating-point
    tensor for sequences of exactly this length; or "run": what the site computes in the first calibration batch.  A batch of 1
    may be left out.  ``map`` takes the place of all that queries and keys do, so it stands alone.
    ``heads``: those of the tensors, in their order; None for all heads of the trained model.  Those that were already pruned
    are ignored.
    ``tokens``: only these tokens take anything over, as integers or a ``range``, negative from the end; None for all.  With
    ``q`` and ``map``, they are queries, with ``k`` keys; tensors have all positions all the same.  With a cache, positions
    count the earlier tokens, too.  A position that a sequence does not have is ignored there.

    Masks and patterns go on hiding keys, whoever computed them, but what another run has read it brings along, later tokens of a
    causal model among it.  A router, values that are added, and other edits read the model's own queries and values.
    Apply it after passes that use calibration data or change weights.  Raises PolicyError.
    """

    name: ClassVar[str] = "transplant"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    q: str | TensorOption | None = None
    k: str | TensorOption | None = None
    map: str | TensorOption | None = None
    heads: Sequence[int] | None = None
    tokens: Iterable[int] | None = None

    def __post_init__(self) -> None:
        if self.heads is not None:
            object.__setattr__(self, "heads", distinct_heads(self.name, self.heads))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", positions(self.name, "tokens", self.tokens))
        for role in ROLES:
            object.__setattr__(self, role, self._read(role, getattr(self, role)))
        given = [role for role in ROLES if getattr(self, role) is not None]
        if not given or (self.map is not None and len(given) > 1):
            raise PolicyError(
                f"{self.name}: invalid values of {', '.join(given) or 'q, k and map'}: expected q, k or both, or a map",
                hint="give what comes from another run, as in transplant(q=Input('q'), heads=[0, 1])",
            )

    def _read(self, role: str, given: Any) -> str | Constant | Input | None:
        if given is None or (isinstance(given, str) and given == "run"):
            return given
        n = "heads" if self.heads is None else len(self.heads)
        hint = f"use 'run', an Input, or finite floating-point numbers [batch, {n}, {_SIZES[role]}]"
        return tensor_option(self.name, role, given, self._fits, hint)

    def _fits(self, shape: Shape) -> bool:
        return len(shape) in (3, 4) and (self.heads is None or shape[-3] == len(self.heads))

    @classmethod
    def typical(cls) -> None:
        return None

    def check(self, site: Site) -> Refusal | None:
        brought = [self._brought(site, role) for role in self._given if isinstance(getattr(self, role), Input)]
        return (
            refuse_unknown_heads(site, self.heads or ())
            or (refuse_no_single_run(site) if self._asks_for_run else None)
            or refuse_unfit_inputs(site, brought)
            or next((r for role in self._given if (r := self._refuse_sizes(site, role)) is not None), None)
            or next((r for role in self._given if (r := self._refuse_tokens(site, role)) is not None), None)
        )

    def rewrite(self, site: Site) -> Rewrite:
        heads = tuple(h for h in site.spec.heads if h in self._heads(site))
        spec = site.spec
        if heads and self._tokens != ():
            for role in self._given:
                spec = self._with(site, spec, role, heads)
        return Rewrite(spec, notes=(*note_absent_tokens(self.name, site, self._tokens), *self._leaks(site)))

    def _with(self, site: Site, spec: AttentionSpec, role: str, heads: tuple[int, ...]) -> AttentionSpec:
        after_past = self._tokens is not None and site.alignment == "last" and role != "k"
        values = self._values(site, role, heads)
        if role == "map":
            return spec.followed_by(Mixed(heads, (1.0,) * len(heads), values, self._tokens, after_past))
        return replace(spec, before=(*spec.before, Transplanted(role, heads, values, self._tokens, after_past)))

    @property
    def _given(self) -> list[str]:
        return [role for role in ROLES if getattr(self, role) is not None]

    @property
    def _tokens(self) -> tuple[int, ...] | None:
        return None if self.tokens is None else tuple(self.tokens)

    @property
    def _asks_for_run(self) -> bool:
        return any(getattr(self, role) == "run" for role in ROLES)

    def _heads(self, site: Site) -> Sequence[int]:
        return range(site.trained_heads) if self.heads is None else self.heads

    def _brought(self, site: Site, role: str) -> CallTensor:
        return CallTensor(getattr(self, role), (BATCH, len(self._heads(site)), *self._axes(site, role)))

    def _axes(self, site: Site, role: str) -> tuple[str, int | str]:
        axes: dict[str, tuple[str, int | str]] = {
            "q": (QUERIES, site.spec.head_dim), "k": (KEYS, site.spec.head_dim), "map": (QUERIES, KEYS),
        }  # fmt: skip
        return axes[role]

    def _values(self, site: Site, role: str, heads: Sequence[int]) -> Source:
        """[B or 1, heads, ...]"""
        given: str | Constant | Input = getattr(self, role)
        if given == "run":
            places = [site.spec.heads.index(h) for h in heads]
            return Constant.of(_run(site, role)[:, places])
        places = [list(self._heads(site)).index(h) for h in heads]
        if isinstance(given, Input):
            return self._brought(site, role).keeping(places)
        assert isinstance(given, Constant)
        return of_heads(given if len(given.shape) == 4 else Constant.of(given.tensor().unsqueeze(0)), places, 1)

    def _refuse_sizes(self, site: Site, role: str) -> Refusal | None:
        """Refuse known values that do not fit the attention."""
        if isinstance(getattr(self, role), Input):
            return None
        lengths = {QUERIES: site.q_len, KEYS: site.kv_len}
        wanted = (len(self._heads(site)), *(lengths[a] if isinstance(a, str) else a for a in self._axes(site, role)))
        batch, *found = self._shape(site, role)
        expected = f"{role} of {site.batch} or 1 x {' x '.join(map(str, wanted))} in every call"
        if tuple(found) != wanted or batch not in (1, site.batch):
            given = " x ".join(map(str, (batch, *found)))
            are_heads = found[:1] != list(wanted[:1])
            hint = (
                "name the heads in the order of the tensor" if are_heads else "give one for these lengths, or an Input"
            )
            return site.refuse("other-sizes", expected=expected, found=given, hint=hint)
        if site.is_dynamic:
            hint = "remove the sequence axis from dynamic_shapes, or let an Input bring it"
            return site.refuse("other-sizes", expected=expected, found="a dynamic length", hint=hint)
        return None

    def _shape(self, site: Site, role: str) -> Shape:
        given: str | Constant = getattr(self, role)
        if isinstance(given, Constant):
            return given.shape if len(given.shape) == 4 else (1, *given.shape)
        assert site.activations is not None
        first = site.activations.batches[0]
        L, S, n = first.q.shape[2], first.k.shape[2], len(self._heads(site))
        return {"q": (len(first.q), n, L, first.q.shape[3]), "k": (len(first.q), n, S, first.k.shape[3])}.get(
            role, (len(first.q), n, L, S)
        )

    def _refuse_tokens(self, site: Site, role: str) -> Refusal | None:
        are_keys = role == "k" or site.alignment == "last"
        return refuse_unknown_tokens(site, self._tokens, site.kv_len if are_keys else site.q_len)

    def _leaks(self, site: Site) -> tuple[str, ...]:
        """What the report says of a causal attention."""
        if self.map is None or not site.spec.is_causal:
            return ()
        return (
            f"{self.name}: nothing hides the keys that a map of another run reads, although the attention is causal",
        )


def _run(site: Site, role: str) -> Tensor:
    """Of the remaining heads in the first calibration batch, [B, H, ...]."""
    now, spec = site.activations, site.spec
    assert now is not None
    if role == "map":
        return next(now.weights(spec)).cpu()
    first = next(now.operands(spec))
    return (first.q if role == "q" else heads_of(spec, first.k)).cpu()
