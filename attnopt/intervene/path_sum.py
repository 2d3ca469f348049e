"""A second sum beside a residual stream, of the same paths times gains, for the readout alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.base.sizes import same_size
from attnopt.errors import RewriteError
from attnopt.graph.axes import resolve_all
from attnopt.graph.cleanup import draws
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, calls, dtype, is_call, value
from attnopt.graph.store import store
from attnopt.intervene.readout import Readout, Share
from attnopt.match.rearrange import Arranger
from attnopt.observe.frozen_norms import LAYER_NORM, RMS_NORM, layer_norm, rms_norm

ORIGIN: dict[str, object] = {"pass": "path-gain"}
BUFFER = "path_gain"  # how names of the gains begin


def add_path_sum(gm: fx.GraphModule, readout: Readout, gains: Mapping[str, Tensor]) -> dict[str, fx.Node]:
    """Let what reads the ends of the streams read this sum.  Returns the nodes of the gains, which are buffers.

    ``gains``: by path a number, or one for each head [H].  Layers read the stream as before.  Norms between the layers have the
    scale that they have in the model.  Raises RewriteError for dropout that is on.
    """
    at = {_place(readout.shares[name], gain): (name, gain) for name, gain in gains.items()}
    now: dict[fx.Node, fx.Node] = {}  # from nodes of the stream to their counterparts in the sum
    held: dict[str, fx.Node] = {}
    for node in list(gm.graph.nodes):
        is_followed = any(n in now for n in readout.path.followed.get(node, ()))
        if node not in at and not is_followed:
            continue
        emit = Emitter(gm.graph, _after(node), ORIGIN)
        made = _again(emit, node, readout.path.followed[node], now) if is_followed else node
        if node in at:
            name, gain = at[node]
            held[name] = _buffer(gm, emit, name, gain.to(value(node).device, dtype(node)))
            factor = held[name] if gain.dim() == 0 else _by_head(emit, readout.shares[name], held[name])
            made = emit.call(aten.mul.Tensor, made, factor)
        now[node] = made
    for end in readout.ends:
        if end in now:
            end.replace_all_uses_with(now[end])
    return held


def drop_zeros(held: Mapping[str, fx.Node], gains: Mapping[str, Tensor]) -> None:
    """Leave out of the sum what is multiplied by 0, so that a path of the last layer need not be computed."""
    for name, node in held.items():
        if gains[name].dim() == 0 and gains[name] == 0:
            for product in list(node.users):
                for addition in list(product.users):
                    _skip(addition, product)


def _skip(addition: fx.Node, zero: fx.Node) -> None:
    """The other operand in the place of its sum with zeros, if it has the same form."""
    if not is_call(addition, aten.add.Tensor) or addition.kwargs:
        return
    other = addition.args[1] if addition.args[0] is zero else addition.args[0]
    if not isinstance(other, fx.Node) or other is zero or dtype(other) != dtype(addition):
        return
    ours, theirs = value(other).shape, value(addition).shape
    if len(ours) == len(theirs) and all(map(same_size, ours, theirs)):
        addition.replace_all_uses_with(other)


def _place(share: Share, gain: Tensor) -> fx.Node:
    if gain.dim() == 0:
        return share.node
    assert share.heads is not None
    return share.heads.raised.region.out.node


def _again(emit: Emitter, node: fx.Node, followed: tuple[fx.Node, ...], now: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """``node`` for the sum in the place of the stream."""
    if draws(node):
        raise RewriteError(
            f"{node.name} draws random numbers, and the sum for the readout would draw others",
            hint="put the model in evaluation mode",
        )
    if calls(node, LAYER_NORM) or calls(node, RMS_NORM):
        return _frozen(emit, node, now)

    def here(n: fx.Node) -> fx.Node:
        return now.get(n, n) if n in followed else n

    return emit.call(node.target, *fx.node.map_arg(node.args, here), **fx.node.map_arg(node.kwargs, here))


def _frozen(emit: Emitter, node: fx.Node, now: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The norm at its scale for the stream."""
    whole = node.args[0]
    assert isinstance(whole, fx.Node)
    norm = layer_norm if calls(node, LAYER_NORM) else rms_norm
    others = [n for n in node.all_input_nodes if n is not whole]

    def computed(part: Tensor, stream: Tensor, *rest: Tensor) -> Tensor:
        known = dict(zip(others, rest, strict=True))
        given: Any = fx.node.map_arg((node.args[1:], node.kwargs), known.__getitem__)
        args, kwargs = given
        wide = torch.promote_types(part.dtype, torch.float32)
        return norm(part.to(wide), stream.to(wide), *args, **kwargs).to(part.dtype)

    return emit.inline(computed, now.get(whole, whole), whole, *others)


def _by_head(emit: Emitter, share: Share, gains: fx.Node) -> fx.Node:
    """Gains [H] in the layout of the heads' outputs."""
    assert share.heads is not None
    region = share.heads.raised.region
    return Arranger(emit, region).arrange(gains, (region.heads,), resolve_all(region.out.axes))


def _buffer(gm: fx.GraphModule, emit: Emitter, name: str, gain: Tensor) -> fx.Node:
    stored = store(gm, f"{BUFFER}_{name.replace('.', '_')}", gain.clone())
    with emit.graph.inserting_before(emit.before):
        node = emit.graph.get_attr(stored)
    with emit.mode:
        node.meta["val"] = torch.empty(gain.shape, dtype=gain.dtype, device=gain.device)
    return node


def _after(node: fx.Node) -> fx.Node:
    """Where what reads ``node`` may stand."""
    place = node.next
    while place.op == "placeholder":
        place = place.next
    return place
