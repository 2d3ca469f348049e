"""What queries see of the tokens before them, where a decoder keeps their keys and values, or what these are made of."""

from __future__ import annotations

from collections.abc import Mapping

from attnopt.errors import ExportError
from attnopt.ir.operands import Operands
from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export.canonical import Canonical
from attnopt.onnx.export.choose_form import OnnxSite
from attnopt.patterns import Pattern
from attnopt.patterns.bands import Band


def bare(call: Canonical, whose: str, others: Mapping[str, object]) -> Canonical:
    """The call of queries, keys and values alone, with everything that hides keys in its pattern.

    ``whose`` names what computes over the cache, and ``others`` what it does not support besides, where that is true.  Raises
    ExportError."""
    if call.lowered is None:
        raise ExportError(
            "this attention was left unchanged, so its keys and values cannot be cached",
            site=call.site.name,
            hint='use a policy that fuses every attention: {"*": "fuse", ...}',
        )
    given = call.operands
    return call.having(Operands(given.q, given.k, given.v), _pattern(call.site, call.lowered.spec, whose, others))


def reach_of(pattern: Pattern) -> tuple[int | None, int]:
    """How many keys a query sees, its own included, or None for all before it; and how many of the first tokens besides."""
    bands = pattern.bands or ()
    window = next((1 - band.low for band in bands if band.low is not None), None)
    return window, next((band.first for band in bands if band.first is not None), 0)


def _pattern(site: OnnxSite, spec: AttentionSpec, whose: str, others: Mapping[str, object]) -> Pattern:
    """Everything before a query of unpadded inputs, or a window of that.  ``spec`` is what lowering noted."""
    if spec.pooling is not None:
        raise _error(site.name, f"it has pooled keys, which {whose} does not support")
    if spec.is_cross or not site.is_square:
        raise _error(site.name, "its keys and queries come from different sequences")
    for what, given in {
        "channels in the place of tokens": spec.between_channels,
        "weights without a softmax": spec.linear is not None,
        "a softmax over queries": spec.sends,
        "clamped scores": spec.clamp is not None,
        "a bias on its scores": spec.has_bias,
        "sinks": spec.has_sinks,
        "zero keys": spec.zero_keys is not None,
        "keys of other tokens": spec.extension is not None,
        "blocks chosen at run time": spec.selection is not None,
        "rows chosen at run time": spec.rows is not None,
        "a mask other than a padding mask": spec.has_mask and spec.seen_as is None,
        **others,
    }.items():
        if given:
            raise _error(site.name, f"it has {what}, which {whose} does not support")
    pattern = spec.visible_pattern
    match pattern.bands:
        case (Band(high=0, step=1, first=None),):
            return pattern
        case (Band(high=0, step=1, first=None), Band(low=None, high=0, step=1)) if spec.softcap is None:
            return pattern
        case (Band(low=None, high=0, step=1), Band(high=0, step=1, first=None)) if spec.softcap is None:
            return pattern
    raise _error(
        site.name,
        f"the pattern is {pattern}{'' if spec.softcap is None else ' with a softcap'}, but {whose} supports only "
        "Causal() and a causal window, and a window with sinks if there is no softcap",
    )


def _error(site: str, why: str) -> ExportError:
    hint = (
        "a decoder needs causal attentions, each with its keys and values in one cache; use export_onnx for all others"
    )
    return ExportError(why, site=site, hint=hint)
