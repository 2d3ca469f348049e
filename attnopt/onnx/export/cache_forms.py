"""How a decoder keeps keys and values: of all tokens or of a window, in float32 or in int8."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.calibration import Batch, Calibration
from attnopt.compiler.origin import Origin
from attnopt.errors import AttnoptError, ExportError
from attnopt.graph.nodes import inputs_of
from attnopt.graph.record import recorded
from attnopt.graph.sdpa import call_arguments
from attnopt.onnx.export.head_slots import uniform
from attnopt.onnx.export.kv_cache import WIDTH, Kept
from attnopt.onnx.export.mark import Marked
from attnopt.onnx.export.sink_tokens import LARGEST

LATENT = "latent"
WINDOWS, TYPES = ("masked", "rolling"), ("float32", "int8", LATENT)
COARSE = 0.1  # how much of the largest logit int8 keys and values may change one
PLACES = 16  # positions, spread over the context, at which keys are measured


@dataclass(frozen=True)
class CacheOptions:
    """``windows``: "masked" keeps all tokens, "rolling" those of the window.  ``kv``: type of keys and values.

    ``pad_heads``: heads of zeros make all layers alike.  ``calibration``: what the scales of int8 are made of; by default the
    example.
    """

    windows: str
    kv: str
    pad_heads: bool
    calibration: Iterable[Batch] | Calibration | None

    @property
    def tolerance(self) -> float | None:
        """Of the logits, relative to the largest; None for what rounding explains."""
        return COARSE if self.kv == "int8" else None

    def check(self) -> None:
        """Raises ExportError."""
        for name, given, known in (("windows", self.windows, WINDOWS), ("kv", self.kv, TYPES)):
            if given not in known:
                listed = " or ".join(f'"{k}"' for k in known)
                raise ExportError(f"invalid value {name}={given!r}: expected {listed}")
        if self.calibration is not None and self.kv != "int8":
            raise ExportError('calibration is for the scales of kv="int8"', hint="leave calibration out")
        if self.kv == LATENT and (self.windows == "rolling" or self.pad_heads):
            raise ExportError(
                f'kv="{LATENT}" keeps the latents of all tokens, in buffers as wide as each layer needs',
                hint="leave windows and pad_heads out",
            )

    def settled(
        self, gm: fx.GraphModule, origin: Origin, marked: Sequence[Marked], context_length: int
    ) -> tuple[Marked, ...]:
        """The attentions of ``gm``, each with the form in which its keys and values are kept.  Raises ExportError."""
        forms = self.in_slots(marked)
        if self.windows == "rolling":
            forms = [replace(f, rolls=f.window is not None and f.window < context_length) for f in forms]
            if not any(f.rolls for f in forms):
                raise ExportError(
                    f'windows="rolling" has no effect: no attention has a window of fewer than {context_length} tokens',
                    hint="leave it out, or restrict attentions with local-window",
                )
        for m, f in zip(marked, forms, strict=True):
            if f.sinks and not f.rolls:
                raise ExportError(
                    f"it has a window with sinks, {m.site.spec.pattern}, which GroupQueryAttention does not mask",
                    site=m.site.name,
                    hint='pass windows="rolling" with a context_length beyond the window, or leave sinks out',
                )
        if self.kv == "int8":
            _check_width([m for m, f in zip(marked, forms, strict=True) if f.rolls])
            batches = self._batches(origin)
            room = _headroom(sum(_tokens(gm, batch) for batch in batches), context_length)
            found = _scales(gm, marked, _placed(gm, batches, context_length), room)
            forms = [replace(f, scales=s) for f, s in zip(forms, found, strict=True)]
        return tuple(replace(m, form=f) for m, f in zip(marked, forms, strict=True))

    def in_slots(self, marked: Sequence[Marked]) -> list[Kept]:
        """The form of each, in buffers that are alike in all layers.  Raises ExportError."""
        forms, specs = [_kept(m) for m in marked], [m.site.spec for m in marked]
        if self.pad_heads and len({spec.head_dim for spec in specs}) == 1:
            forms = [replace(f, slots=slots) for f, slots in zip(forms, uniform(specs), strict=True)]
        sizes = {(len(f.slots.kv_heads), spec.head_dim) for f, spec in zip(forms, specs, strict=True)}
        if len(sizes) == 1:
            return forms
        listed = ", ".join(f"{heads} heads of {dim}" for heads, dim in sorted(sizes))
        raise ExportError(
            f"the layers' keys and values have different sizes ({listed or 'none found'}), but the cache needs a single size",
            hint="keep the same number of K/V heads in each layer, or export with pad_heads=True",
        )

    def _batches(self, origin: Origin) -> list[CallInputs]:
        if self.calibration is None:
            return [origin.inputs]
        try:
            return [origin.signature.arrange(*batch) for batch in Calibration.of(self.calibration)]
        except AttnoptError as e:
            raise ExportError(f"the calibration data is not valid: {e}") from e


def about(marked: Sequence[Marked]) -> list[dict[str, object]]:
    """What a runtime has to know of each layer's buffers, as plain data."""
    forms = [_kept(m) for m in marked]
    return [
        {
            "site": m.site.name,
            "window": f.window,
            "sinks": f.sinks,
            "rolls": f.rolls,
            "type": "int8" if f.scales else "float32",
        }
        for m, f in zip(marked, forms, strict=True)
    ]


def slots(marked: Sequence[Marked]) -> tuple[int, int]:
    """How many query and key/value heads the first layer has in its cache."""
    first = _kept(marked[0]).slots
    return len(first.heads), len(first.kv_heads)


def rolling(marked: Sequence[Marked]) -> dict[int, int]:
    """The windows of the layers whose buffers roll, by their numbers."""
    forms = [_kept(m) for m in marked]
    return {i: f.window for i, f in enumerate(forms) if f.rolls and f.window is not None}


def reach(marked: Sequence[Marked]) -> int:
    """How many tokens a prompt has at least from which every buffer that rolls forgets some; 0 if none does."""
    forms = [_kept(m) for m in marked]
    return max((f.window + f.sinks for f in forms if f.rolls and f.window is not None), default=0)


def _check_width(marked: Sequence[Marked]) -> None:
    for m in marked:
        if m.site.spec.head_dim % WIDTH:
            raise ExportError(
                f"its heads have {m.site.spec.head_dim} features, but a rolling buffer of int8 needs a multiple of {WIDTH}",
                site=m.site.name,
                hint='use kv="float32", or windows="masked"',
            )


def _kept(marked: Marked) -> Kept:
    assert isinstance(marked.form, Kept)
    return marked.form


def _scales(
    gm: fx.GraphModule, marked: Sequence[Marked], batches: Iterable[CallInputs], room: float
) -> list[tuple[Tensor, Tensor]]:
    """Of keys and of values of each attention, [G, D]: ``room`` times the largest magnitude of each feature becomes 127."""
    sides = [_keys_and_values(m.node) for m in marked]
    largest: dict[fx.Node, Tensor] = {}
    for batch in batches:
        with torch.no_grad():
            found = recorded(gm, {n for side in sides for n in side}, batch)
        visible = _visible(gm, batch)
        for node, x in found.items():
            by_token = x.float().abs().transpose(1, 2)  # [B, L, G, D]
            seen = (by_token.flatten(0, 1) if visible is None else by_token[visible]).amax(0)
            largest[node] = torch.maximum(largest[node], seen) if node in largest else seen
    for m, side in zip(marked, sides, strict=True):
        if not all(largest[n].isfinite().all() for n in side):
            raise ExportError(
                "its keys or values are not finite on the calibration data, so they have no int8 scales",
                site=m.site.name,
                hint='use kv="float32"',
            )
    return [(_scale(room * largest[k]), _scale(room * largest[v])) for k, v in sides]


def _placed(gm: fx.GraphModule, batches: Sequence[CallInputs], context_length: int) -> Iterator[CallInputs]:
    """The batches as they are and, if the model takes positions, further on in the context: rotation by position turns other
    features into large ones there."""
    yield from batches
    names = [n.name for n in inputs_of(gm.graph)]
    if "position_ids" not in names:
        return
    place, count = names.index("position_ids"), max(PLACES, len(batches))
    for i in range(1, count + 1):
        leaves, structure = pytree.tree_flatten(batches[i % len(batches)])
        room = context_length - 1 - int(leaves[place].max())
        leaves[place] = leaves[place] + max(0, room) * i // count
        yield pytree.tree_unflatten(leaves, structure)


def _scale(largest: Tensor) -> Tensor:
    """A feature that is always zero has any scale."""
    return torch.where(largest > 0, largest / LARGEST, 1.0).contiguous()


def _headroom(tokens: int, context_length: int) -> float:
    """By how much the largest number of a whole context exceeds that of the calibration ``tokens``: among n normal numbers, it
    grows as the root of log n."""
    return max(1.0, math.sqrt(math.log(context_length) / math.log(max(tokens, 2))))


def _tokens(gm: fx.GraphModule, batch: CallInputs) -> int:
    visible = _visible(gm, batch)
    if visible is not None:
        return int(visible.sum())
    names = [n.name for n in inputs_of(gm.graph)]
    ids: Tensor = pytree.tree_leaves(batch)[names.index("input_ids")]
    return ids.numel()


def _keys_and_values(call: fx.Node) -> tuple[fx.Node, fx.Node]:
    given: dict[str, Any] = call_arguments(call)
    return (given["key"], given["value"]) if "key" in given else (given["k"], given["v"])


def _visible(gm: fx.GraphModule, batch: CallInputs) -> Tensor | None:
    """[B, L]: the tokens that are no padding; None if all are."""
    names = [n.name for n in inputs_of(gm.graph)]
    mask = dict(zip(names, pytree.tree_leaves(batch), strict=True)).get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and not mask.bool().all() else None
