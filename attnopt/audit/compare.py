"""Two attentions in one call: what differs between them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnopt.audit.scores import relative, score_differences
from attnopt.audit.seen import Apart, Seen, ahead
from attnopt.audit.trace import Attended
from attnopt.ir.semantics import row_sinks
from attnopt.ir.spec import AttentionSpec
from attnopt.report.audit import Difference, Effect, Setting

NONE = "none"
_SOFTCAP = 1e-4


def sizes_apart(model: Attended, file: Attended) -> Difference | None:
    """What prevents a comparison of values."""
    a, b = model.spec, file.spec
    if a.num_heads != b.num_heads:
        return Difference("heads", f"{a.num_heads} heads", f"{b.num_heads} heads")
    if (a.head_dim, a.value_dim) != (b.head_dim, b.value_dim):
        return Difference("head-size", f"heads of {a.sizes}", f"heads of {b.sizes}")
    return None


def differences(
    model: Attended, file: Attended, tolerance: float, setting: Setting, unpadded: Apart | None = None
) -> list[Difference]:
    """``unpadded``: how the masks of the two differ in the same call without padding; what comes to it is the padding's."""
    found = [
        *score_differences(model, file, tolerance),
        *_softcap(model.spec, file.spec),
        *_sinks(model, file, tolerance),
        *_seen(model, file, tolerance, unpadded),
        *_features(model.spec, file.spec),
    ]
    if not found:
        return []
    defined = Seen.of(model).defined
    error = relative(_kept(file.output, defined), _kept(model.output, defined))
    effect = Effect(model.operands.q.shape[2], error, setting)
    return [replace(d, effect=effect) for d in found]


def _kept(x: Tensor, defined: Tensor) -> Tensor:
    return torch.where(defined, x.float(), 0.0)


def _softcap(model: AttentionSpec, file: AttentionSpec) -> list[Difference]:
    a, b = model.softcap, file.softcap
    if a == b or (a is not None and b is not None and abs(a - b) <= _SOFTCAP * abs(a)):
        return []
    return [Difference("softcap", NONE if a is None else f"{a:g}", NONE if b is None else f"{b:g}")]


def _sinks(model: Attended, file: Attended, tolerance: float) -> list[Difference]:
    a, b = (row_sinks(x.spec, x.operands.q, x.operands.k, x.operands.sinks) for x in (model, file))
    if a is None and b is None:
        return []
    if a is None or b is None:
        texts = [NONE if x is None else "a logit for each head" for x in (a, b)]
        return [Difference("sinks", texts[0], texts[1])]
    both = torch.zeros_like(a + b)
    if relative((both + b).exp(), (both + a).exp()) <= tolerance:
        return []
    return [Difference("sinks", f"logits from {float(a.min()):.3g}", f"logits from {float(b.min()):.3g}")]


def _features(model: AttentionSpec, file: AttentionSpec) -> list[Difference]:
    """What else the two say in their specs: maps, gains, pools."""
    a, b = (
        tuple(map(str, (s.has_map, s.pooling, s.extension, s.weight_gains, s.segments, s.selection, s.rows)))
        for s in (model, file)
    )
    return (
        [] if a == b else [Difference("features", ", ".join(model.features) or NONE, ", ".join(file.features) or NONE)]
    )


def masks_apart(model: Attended, file: Attended) -> Apart:
    return Apart.of(Seen.of(model), Seen.of(file))


def _seen(model: Attended, file: Attended, tolerance: float, unpadded: Apart | None) -> list[Difference]:
    apart = masks_apart(model, file)
    pairs = apart.dropped | apart.more
    if unpadded is not None:
        pairs = pairs & ~(unpadded.dropped | unpadded.more)
    kinds = _kinds(model.spec, file.spec, pairs) if unpadded is None else ["padding"]
    found = [Difference(k, _mask_text(model.spec), _mask_text(file.spec)) for k in kinds] if bool(pairs.any()) else []
    if apart.added > tolerance * apart.largest:
        there = "none" if not _adds(file) else f"another one, by up to {apart.added:.3g}"
        found.append(Difference("bias", "none" if not _adds(model) else "a bias", there))
    return found


def _adds(x: Attended) -> bool:
    return bool(Seen.of(x).added.any())


def _kinds(model: AttentionSpec, file: AttentionSpec, pairs: Tensor) -> list[str]:
    if model.is_cross or not (is_known(model) and is_known(file)):
        later, earlier = ahead(pairs)
        return ["causal"] if later and not earlier and not model.is_cross else ["mask"]
    return kinds_of(pairs, None, model.is_causal)


def kinds_of(pairs: Tensor, positions: Tensor | None, is_causal: bool) -> list[str]:
    """Of pairs [..., L, S] that one of the two hides: those of later keys are causality, the others a window."""
    later, earlier = ahead(pairs, positions)
    if later and not earlier:
        return ["causal"]
    return ["causal", "window"] if later and is_causal else ["window"]


def is_known(spec: AttentionSpec) -> bool:
    """What queries see without padding is known at every length."""
    return spec.seen_as is not None or not (spec.has_mask or spec.has_bias)


def _mask_text(spec: AttentionSpec) -> str:
    given = [name for name, has in (("mask", spec.has_mask), ("bias", spec.has_bias)) if has]
    return " and ".join([str(spec.visible_pattern), *(f"a {name}" for name in given)])
