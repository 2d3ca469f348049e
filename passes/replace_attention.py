"""Put a mixer in the place of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from attnopt.base.options import number, whole
from attnopt.fit.mixer_fit import FittedMixer, MixerFit, fails_at, hides_pairs, reads_later
from attnopt.ir import blame
from attnopt.ir.interfaces import Pass, Rewrite
from attnopt.ir.mixer import Mixer
from attnopt.ir.mixer_registry import mixer
from attnopt.ir.module_mixer import ModuleMixer
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Site
from attnopt.ir.token_mixing import TokenMixing
from attnopt.passes.preconditions import (
    refuse_edits,
    refuse_extended,
    refuse_fitted_selection,
    refuse_no_single_run,
    refuse_other_keys,
    refuse_pooled,
    refuse_rows,
    refuse_segmented,
)

FIRST = "let replace come first"


@dataclass(frozen=True)
class Replace(Pass):
    """Another way to mix tokens takes the place of attention.

    Fourier filters (GFNet, arXiv:2107.00645), depthwise convolutions, pooled tokens (PoolFormer, arXiv:2111.11418), linear
    attention (Hedgehog, arXiv:2402.04347), or a module of your own.
    The mixer reads the values of all heads and gives their outputs: value and output projections stay, those of queries and keys
    go unless it reads them.  It is fitted to the outputs of the attention on calibration data: by least squares for each channel
    where it is linear in its weights, else distilled by Adam for at most ``steps``, until held-back tokens get no better.
    ``mixer``: "fft", "conv", "pool", "linear-attention", each with its options as in "conv(kernel=5)"; a ``Mixer``; or a
    function of the site that returns a module from values to outputs, [B, L, H * Dv] each.
    ``minimum_r2``: refuse where it explains less of the variance of head outputs on held-back tokens.
    Hidden tokens, such as padding, count as zeros.  Raises PolicyError, CalibrationError.
    """

    name: ClassVar[str] = "replace"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True
    mixer: Mixer | str | Callable[[Site], nn.Module]
    minimum_r2: float | None = None
    steps: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixer", mixer(self.name, self.mixer))
        if self.minimum_r2 is not None:
            object.__setattr__(self, "minimum_r2", number(self.name, "minimum_r2", self.minimum_r2))
        whole(self.name, "steps", self.steps, least=1)
        whole(self.name, "seed", self.seed)

    def check(self, site: Site) -> Refusal | None:
        spec, chosen = site.spec, self._mixer
        return (
            refuse_other_keys(site)
            or refuse_segmented(site)
            or refuse_pooled(site, FIRST)
            or refuse_rows(site, FIRST)
            or refuse_extended(site, FIRST)
            or refuse_fitted_selection(site, FIRST)
            or refuse_edits(site, spec.after, FIRST)
            or _refuse_unknown_masks(site)
            or self._answer(chosen, site)
            or refuse_no_single_run(site)
            or _refuse_new_weights(site)
            or _refuse_masked_pairs(site)
            or self._refuse_fit(site)
        )

    def rewrite(self, site: Site) -> Rewrite:
        found = self._fitted(site)
        edit = TokenMixing(site.spec.heads, found.mixer, found.mixer.stored(found.weights), _is_padded(site))
        how = f"distilled in {found.steps} steps" if found.steps else "fitted in closed form"
        note = f"replace: {found.mixer}, {how}, explains {found.r2:.1%} of the head outputs on {found.tokens} held-out tokens"
        masks = (
            ("replace: masks are taken to hide padding: a key from every query or from none",) if edit.padded else ()
        )
        return Rewrite(site.spec.followed_by(edit), notes=(f"{note} (R^2 {found.r2:.4f})", *masks))

    @property
    def _mixer(self) -> Mixer:
        assert isinstance(self.mixer, Mixer)
        return self.mixer

    def _fitted(self, site: Site) -> FittedMixer:
        return MixerFit(self._mixer, self.steps, self.seed).of(site)

    @staticmethod
    def _answer(chosen: Mixer, site: Site) -> Refusal | None:
        if isinstance(chosen, ModuleMixer) and chosen.make is None:
            hint = "pass the factory of the module to Replace"
            return site.refuse(
                "unknown-module", expected="a module", found=f"only its name, {chosen.called}", hint=hint
            )
        with blame.blamed(chosen, "mixer", "check", site.name):
            return chosen.check(site)

    def _refuse_fit(self, site: Site) -> Refusal | None:
        found = self._fitted(site)
        if self.minimum_r2 is not None and found.r2 < self.minimum_r2:
            return site.refuse(
                "explains-too-little",
                expected=f"an R^2 of at least {self.minimum_r2:g} on held-out tokens",
                found=f"{found.r2:.4f} by {found.mixer}",
                hint="keep this attention, or use a mixer that reads more tokens",
            )
        if site.spec.is_causal and reads_later(found, site):
            return site.refuse(
                "looks-ahead",
                expected="a mixer whose outputs depend on no later token, because the attention is causal",
                found=str(found.mixer),
                hint="use conv, which is causal here",
            )
        why = fails_at(found, site, site.q_len + max(site.kv_step, 1)) if site.is_dynamic else ""
        if why:
            return site.refuse(
                "wrong-length",
                expected=f"{site.q_len} tokens in every call",
                found=f"a dynamic length, at which {found.mixer} fails: {why}",
                hint="remove the sequence axis from dynamic_shapes",
            )
        return None


def _refuse_unknown_masks(site: Site) -> Refusal | None:
    """Refuse keys that are hidden from some queries, in a way that no mixer would know."""
    spec = site.spec
    hint = "a mixer would pass them on; exclude the site"
    if spec.selection is not None:
        return site.refuse("unknown-mask", expected="keys that are known", found=str(spec.selection), hint=FIRST)
    if spec.has_mask and spec.seen_as is None:
        expected = "a mask that is known to hide padding alone"
        return site.refuse("unknown-mask", expected=expected, found="a mask operand", hint=hint)
    return None


def _refuse_new_weights(site: Site) -> Refusal | None:
    """Refuse values or outputs that are no longer those of the model."""
    assert site.activations is not None
    if not site.activations.edits:
        return None
    return site.refuse(
        "already-edited", expected="the weights of the model", found="new ones of an earlier pass", hint=FIRST
    )


def _refuse_masked_pairs(site: Site) -> Refusal | None:
    """Refuse masks that, on the calibration data, hide keys from some queries and not from others."""
    assert site.activations is not None
    if not _is_padded(site) or not any(map(partial(hides_pairs, site.spec), site.activations.batches)):
        return None
    return site.refuse(
        "unknown-mask",
        expected="masks that hide a key from every query or from none, such as those of padding",
        found="keys that some queries see and others do not",
        hint="a mixer would pass them on; exclude the site",
    )


def _is_padded(site: Site) -> bool:
    """Some keys may be hidden from every query."""
    return site.spec.has_mask or site.bias_hides
