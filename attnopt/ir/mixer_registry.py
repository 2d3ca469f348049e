"""Mixers, by name."""

from __future__ import annotations

from attnopt.base.named_object import named_object
from attnopt.base.registry import Registry
from attnopt.ir.fourier_mixer import FourierFilter
from attnopt.ir.linear_attention import LinearAttention
from attnopt.ir.local_mixers import DepthwiseConv, TokenPool
from attnopt.ir.mixer import Mixer
from attnopt.ir.module_mixer import ModuleMixer

MIXERS = Registry(
    "attnopt.mixers",
    "mixer",
    Mixer,  # type: ignore[type-abstract]
    {kind.name: kind for kind in (FourierFilter, DepthwiseConv, TokenPool, LinearAttention, ModuleMixer)},
    lambda cls: getattr(cls, "name", None),
)


def mixer(owner: str, given: object) -> Mixer:
    """A mixer, its text such as ``"conv(kernel=5)"``, or a factory of modules.  Raises PolicyError, PluginError."""
    if isinstance(given, Mixer):
        return given
    if callable(given):
        return ModuleMixer(str(getattr(given, "__qualname__", type(given).__name__)), given)
    return named_object(MIXERS, owner, "mixer", given, hint='write it as in "conv(kernel=5)"')
