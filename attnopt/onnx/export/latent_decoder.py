"""A language model, some tokens at a time, over a cache of latents: of a token and layer, the fewest numbers that determine
its keys and values.  Both are computed anew at each step, for all tokens, and keys then rotated by their positions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnopt.backends.reference import Reference
from attnopt.backends.sdpa import Sdpa
from attnopt.compiler.origin import Origin
from attnopt.errors import ExportError
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import ancestors, arg, aten, get_attr, inputs_of, is_call, value
from attnopt.graph.store import store
from attnopt.ir.interfaces import Backend
from attnopt.ir.spec import AttentionSpec
from attnopt.onnx.export.canonical import Canonical
from attnopt.onnx.export.causal_pattern import bare, reach_of
from attnopt.onnx.export.choose_form import Form
from attnopt.onnx.export.decoder_inputs import with_cache
from attnopt.onnx.export.latent_source import LatentSource, latent_source, of_content
from attnopt.onnx.export.mark import Marked, placeholders
from attnopt.patterns.algebra import FULL


class LatentDecoder(nn.Module):
    """``forward(input_ids, attention_mask, past_key_values=None)``: logits [B, N, V] of further tokens, and the cache with them.

    ``input_ids`` int [B, N].  ``attention_mask`` [B, P + N]: 0 for padding, anywhere, among all tokens so far; each other token
    has the number of those before it as its position.  ``past_key_values``: the latents [B, P, width] of each layer, as the
    last call returned them; None at the start.
    """

    def __init__(self, graph: fx.GraphModule, sources: Sequence[LatentSource]) -> None:
        super().__init__()
        self.body = graph
        self.widths = tuple(s.width for s in sources)
        self.element = sources[0].down.element_size()
        self._otherwise = sum(s.kept_otherwise for s in sources)

    @property
    def bytes_per_token(self) -> int:
        """Of the cache, in all layers."""
        return sum(self.widths) * self.element

    @property
    def kv_bytes_per_token(self) -> int:
        """Of a cache of keys and values in all layers."""
        return self._otherwise * self.element

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        past = self.empty(input_ids.shape[0]) if past_key_values is None else past_key_values
        logits, *present = self.body(input_ids, attention_mask, *past)
        return logits, present

    def empty(self, batch: int) -> list[Tensor]:
        """The cache before the first token."""
        like = self.body.get_buffer("latents_0.down")
        return [like.new_zeros(batch, 0, width) for width in self.widths]


def latent_decoder(gm: fx.GraphModule, origin: Origin) -> tuple[LatentDecoder, tuple[Marked, ...]]:
    """Of the graph of a decoder, and its attentions.  Raises ExportError."""
    marked_gm, marked = with_cache(gm, origin, _over_latents)
    content, calls = of_content(marked_gm.graph), placeholders(marked_gm.graph)
    sources = []
    for m, call in zip(marked, calls, strict=True):
        _, k, v, *_ = arg(call, 0)
        sources.append(latent_source(marked_gm, m.site.name, k, v, content))
    if not any(s.width < s.kept_otherwise for s in sources):
        widest = max((s.kept_otherwise for s in sources), default=0)
        raise ExportError(
            f"the latents of each layer would be as wide as its keys and values ({widest} numbers of a token)",
            hint="apply latent-kv with a smaller rank to the attentions first",
        )
    layers = [_Layer(call, m.site.spec, s) for call, m, s in zip(calls, marked, sources, strict=True)]
    return LatentDecoder(_Writer(marked_gm, layers, content).written(), sources), marked


@dataclass(frozen=True)
class _Layer:
    call: fx.Node
    spec: AttentionSpec
    source: LatentSource

    @property
    def q(self) -> fx.Node:
        found: fx.Node = arg(self.call, 0)[0]
        return found


def _over_latents(emit: Emitter, call: Canonical) -> tuple[Canonical, Form]:
    return bare(call, "a cache of latents", {}), Form("latents", 0.0)


class _Writer:
    """Writes the graph of the new tokens again, and in it keys and values of all tokens, of their latents."""

    def __init__(self, gm: fx.GraphModule, layers: Sequence[_Layer], content: Collection[fx.Node]) -> None:
        self.gm, self.layers, self.graph = gm, layers, fx.Graph()
        self.root, self.content = nn.Module(), set(content)
        self.stored: dict[str, str] = {}
        self.of_new: dict[fx.Node, fx.Node] = {}
        self.of_all: dict[fx.Node, fx.Node] = {}
        self.seen: dict[tuple[int | None, int], fx.Node] = {}

    def written(self) -> fx.GraphModule:
        ids, mask = (self.graph.placeholder(name) for name in ("input_ids", "attention_mask"))
        past = [self.graph.placeholder(f"past_{i}") for i in range(len(self.layers))]
        self.every, self.start = self._module("positions", _Positions(), mask), past[0]
        new = self._module("new_positions", _Last(), self.every, past[0])
        for node in inputs_of(self.gm.graph):
            given = {"input_ids": (ids, mask), "position_ids": (new, self.every)}.get(node.name, (None, None))
            for table, found, like in ((self.of_new, given[0], ids), (self.of_all, given[1], mask)):
                alike = _Like(value(node).dtype, node.name == "attention_mask")
                table[node] = self._module(f"given_{node.name}", alike, like if found is None else found)
        present = [self._attention(i, layer, mask, past[i]) for i, layer in enumerate(self.layers)]
        (logits,) = self._outputs()
        self._copy([logits], self.of_new)
        self.graph.output((self.of_new[logits], *present))
        made = fx.GraphModule(self.root, self.graph)
        made.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        made.recompile()
        made.delete_all_unused_submodules()
        return made

    def _attention(self, number: int, layer: _Layer, mask: fx.Node, past: fx.Node) -> fx.Node:
        """Put the attention among the nodes of the new tokens; the cache with them."""
        source, spec = layer.source, layer.spec
        self._copy([source.features, layer.q], self.of_new)
        kept = self._module(f"latents_{number}", _Kept(source.down), past, self.of_new[source.features])
        k, v = self._keys_and_values(number, source, kept)
        attend = _Attend(replace(spec, pattern=FULL, has_mask=True))
        seen = self._seen(spec, mask)
        self.of_new[layer.call] = self._module(f"attend_{number}", attend, self.of_new[layer.q], k, v, seen)
        return kept

    def _keys_and_values(self, number: int, source: LatentSource, kept: fx.Node) -> tuple[fx.Node, fx.Node]:
        table = self.of_all
        table.pop(source.features, None)  # of another attention that reads them, with latents of its own
        for n, node in enumerate(source.inside):
            if (up := self._up(node, source)) is not None:
                table[node] = self._module(f"up_{number}_{n}", up, kept)
                continue
            if source.features in node.all_input_nodes and source.features not in table:
                table[source.features] = self._module(f"back_{number}", _Up(source.down), kept)
            self._copy([n for n in node.all_input_nodes if n not in table], table)
            table[node] = self._again(node, table)
        return table[source.k], table[source.v]

    def _up(self, node: fx.Node, source: LatentSource) -> _Up | None:
        """The projection of the features as one of their latents; None if it is another operator, or its weight is computed."""
        held = [x for x in node.args[1:] if x is not None]
        if not is_call(node, aten.linear.default) or arg(node, 0) is not source.features:
            return None
        stored = [get_attr(self.gm, str(x.target)) for x in held if isinstance(x, fx.Node) and x.op == "get_attr"]
        if len(stored) < len(held):
            return None
        return _Up(stored[0] @ source.down, *stored[1:])

    def _seen(self, spec: AttentionSpec, mask: fx.Node) -> fx.Node:
        key = reach_of(spec.pattern)
        if key not in self.seen:
            self.seen[key] = self._module(f"seen_{len(self.seen)}", _Seen(*key), self.every, mask, self.start)
        return self.seen[key]

    def _copy(self, wanted: Iterable[fx.Node], table: dict[fx.Node, fx.Node]) -> None:
        """Everything that ``wanted`` is computed from, which is not there yet."""
        needed = {n for w in wanted for n in ancestors(w, stop=table.__contains__)} - table.keys()
        if table is self.of_all and needed & self.content:
            raise ExportError(
                f"keys or values read the size of {min(needed & self.content).name}, which a cache does not have for all tokens",
                hint="please report the model",
            )
        for node in sorted(needed):
            table[node] = self._again(node, table)

    def _again(self, node: fx.Node, table: Mapping[fx.Node, fx.Node]) -> fx.Node:
        if node.op != "get_attr":
            return self.graph.node_copy(node, table.__getitem__)
        name = str(node.target)
        if name not in self.stored:
            self.stored[name] = store(self.root, name, get_attr(self.gm, name))
        return self.graph.get_attr(self.stored[name])

    def _module(self, name: str, module: nn.Module, *given: fx.Node) -> fx.Node:
        while hasattr(self.root, name):
            name += "_"
        self.root.add_module(name, module)
        return self.graph.call_module(name, given)

    def _outputs(self) -> list[fx.Node]:
        """The logits.  Raises ExportError."""
        found = [n for n in self.gm.graph.output_node().all_input_nodes if isinstance(value(n), Tensor)]
        named = [n for n in found if value(n).dim() == 3]
        if len(found) != 1 or len(named) != 1:
            raise ExportError(
                f"the model returns {len(found)} tensors, expected logits [batch, length, vocabulary]",
                hint="wrap the model so that it returns only the logits",
            )
        return named


# ------------------------------------------------------------ what the graph calls
class _Positions(nn.Module):
    """Of all tokens so far [B, T]: how many that are no padding come before each."""

    def forward(self, mask: Tensor) -> Tensor:
        return (mask.long().cumsum(1) - 1).clamp(min=0)


class _Last(nn.Module):
    """Those of the new tokens."""

    def forward(self, every: Tensor, past: Tensor) -> Tensor:
        return every[:, past.shape[1] :]


class _Like(nn.Module):
    """The input of the model in its type; for a mask, that of tokens which are all there."""

    def __init__(self, dtype: torch.dtype, is_mask: bool) -> None:
        super().__init__()
        self.dtype, self.is_mask = dtype, is_mask

    def forward(self, given: Tensor) -> Tensor:
        return torch.ones_like(given, dtype=self.dtype) if self.is_mask else given.to(self.dtype)


class _Kept(nn.Module):
    """The latents of all tokens [B, P + N, width]."""

    def __init__(self, down: Tensor) -> None:
        super().__init__()
        self.down: Tensor
        self.register_buffer("down", down)

    def forward(self, past: Tensor, features: Tensor) -> Tensor:
        return torch.cat([past, features @ self.down], 1)


class _Up(nn.Module):
    """Latents [B, T, width] through ``weight`` [out, width]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, latents: Tensor) -> Tensor:
        return nn.functional.linear(latents, self.weight, self.bias)


class _Seen(nn.Module):
    """Bool [B, 1, N, T]: which tokens the new ones see, by their positions."""

    def __init__(self, window: int | None, sinks: int) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks

    def forward(self, every: Tensor, mask: Tensor, past: Tensor) -> Tensor:
        queries, keys = every[:, past.shape[1] :, None], every[:, None, :]
        seen = keys <= queries
        if self.window is not None:
            near = queries - keys < self.window
            seen = seen & (near | (keys < self.sinks) if self.sinks else near)
        return (seen & mask[:, None, :].bool()).unsqueeze(1)


class _Attend(nn.Module):
    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        backend: Backend = Sdpa() if Sdpa().check(spec) is None else Reference()
        self.attend: Any = backend.lower(spec)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        made: Tensor = self.attend(q, k, v, bias=None, mask=seen, sinks=None)
        return made
