"""The file of a decoder over latents, in operators of ONNX alone: past and present are the latents of each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from attnopt.base.call_inputs import CallInputs
from attnopt.compiler.compile import compiled
from attnopt.compiler.job import Options
from attnopt.compiler.origin import Origin
from attnopt.errors import ExportError
from attnopt.onnx.export.cache_forms import LATENT
from attnopt.onnx.export.causal_pattern import reach_of
from attnopt.onnx.export.latent_decoder import LatentDecoder, latent_decoder
from attnopt.onnx.export.mark import Marked, fastest, mark
from attnopt.onnx.export.translate import OPSETS, expand, translated
from attnopt.onnx.export.verify_decoder import Whole

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxruntime import InferenceSession

EXAMPLE = 3, 5, 4  # sequences, past tokens, and new ones: sizes that differ from each other
Step = Callable[[Tensor, Tensor, "list[Tensor] | None"], "tuple[Tensor, list[Tensor]]"]


def checked_decoder(gm: fx.GraphModule, origin: Origin) -> tuple[LatentDecoder, tuple[Marked, ...]]:
    """The decoder of a graph, which gives its logits for prompts and for each token after them, and its attentions.  Raises
    ExportError."""
    made, marked = latent_decoder(gm, origin)
    with torch.no_grad():
        Whole(gm, origin, "logits", 0).verify_run(Growing(made))
    return made, marked


class Growing:
    """Calls over a cache that grows by the tokens of each, padding included; see ``Run``."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.past: list[Tensor] | None = None
        self.mask: Tensor | None = None

    def __call__(self, ids: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
        seen = torch.zeros_like(lengths) if self.mask is None else self.mask.sum(1)
        new = (torch.arange(ids.shape[1]) < (lengths - seen)[:, None]).long()
        self.mask = new if self.mask is None else torch.cat([self.mask, new], 1)
        logits, self.past = self.step(ids, self.mask, self.past)
        return logits


def latent_run(session: InferenceSession, logits: str, capacity: int) -> Growing:
    """A file in ONNX Runtime."""
    past = [i for i in session.get_inputs() if i.name.endswith(LATENT)]
    names = [logits, *(i.name.replace("past_key_values", "present") for i in past)]

    def step(ids: Tensor, mask: Tensor, cache: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        empty = [np.zeros((len(ids), 0, i.shape[2]), np.float32) for i in past]
        given = empty if cache is None else [c.numpy() for c in cache]
        feed: dict[str, Any] = {i.name: x for i, x in zip(past, given, strict=True)}
        feed |= {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        try:
            made = [torch.from_numpy(x) for x in session.run(names, feed)]
        except Exception as e:
            raise ExportError(f"ONNX Runtime cannot run the exported decoder: {str(e)[:300]}") from e
        return made[0], made[1:]

    return Growing(step)


def latent_model(decoder: LatentDecoder, marked: Sequence[Marked]) -> ir.Model:
    """The decoder in ONNX.  Raises ExportError."""
    from attnopt.onnx.export.peephole import settle
    from attnopt.onnx.export.write_form import write

    rows, past, new = EXAMPLE
    example = {
        "input_ids": torch.zeros(rows, new, dtype=torch.int64),
        "attention_mask": torch.ones(rows, past + new, dtype=torch.int64),
        "past_key_values": [torch.randn(rows, past, width) for width in decoder.widths],
    }
    made = compiled(decoder, "fuse", CallInputs((), example), [], Options())
    marked_gm, forms = mark(made.module, fastest(contrib=False))
    model, _ = translated(marked_gm, made.origin, OPSETS[0])
    expand(model.graph, forms, write)
    settle(model, contrib=False)
    _name(model.graph, decoder.widths)
    return model


def _name(graph: ir.Graph, widths: Sequence[int]) -> None:
    """Inputs and outputs, and their axes, as those of a cache are called."""
    import onnx_ir as ir

    ids, mask, *past = graph.inputs
    logits, *present = graph.outputs
    ids.name, mask.name, logits.name = "input_ids", "attention_mask", "logits"
    ids.shape, mask.shape = ir.Shape(["batch", "length"]), ir.Shape(["batch", "total_length"])
    for n, (old, new, width) in enumerate(zip(past, present, widths, strict=True)):
        old.name, new.name = f"past_key_values.{n}.{LATENT}", f"present.{n}.{LATENT}"
        old.shape, new.shape = (ir.Shape(["batch", axis, width]) for axis in ("past_length", "total_length"))


def about_latents(decoder: LatentDecoder, marked: Sequence[Marked]) -> list[dict[str, object]]:
    """What a runtime has to know of each layer's cache, as plain data."""
    windows = [reach_of(m.site.spec.pattern) for m in marked]
    return [
        {"site": m.site.name, "window": window, "sinks": sinks, "rolls": False, "type": "float32", "latents": width}
        for m, (window, sinks), width in zip(marked, windows, decoder.widths, strict=True)
    ]
