"""Which sequence the queries and the keys of an attention are made of, and how their positions are written into them."""

from __future__ import annotations

import torch
from torch import fx

from attnopt.graph import ancestors, arg, is_tensor, opname, same_size, value

_SOURCES = {
    "convolution",
    "conv1d",
    "conv2d",
    "conv3d",
    "linear",
    "addmm",
    "mm",
    "matmul",
    "bmm",
    "baddbmm",
    "einsum",
    "embedding",
    "softmax",
    "scaled_dot_product_attention",
}

_OF_EACH_TOKEN = {
    "linear",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "mean",
    "var",
    "slice",
    "split",
    "split_with_sizes",
    "chunk",
    "getitem",
    "_to_copy",
}  # beside what works number by number


def is_cross(q: fx.Node, k: fx.Node) -> bool:
    """Keys come from another sequence: the two share no projection's input, nor any stream of tokens behind it."""
    return not _streams(q) & _streams(k)


def positions(q: fx.Node) -> tuple[str, ...]:
    """Rotary encodings show themselves as a sine and a cosine between the projection and the core."""
    names = {opname(n) for n in ancestors(q, stop=_is_source)}
    return ("rope",) if {"sin", "cos"} <= names or "view_as_complex" in names else ()


def _is_source(node: fx.Node) -> bool:
    return opname(node) in _SOURCES


def _streams(node: fx.Node) -> set[fx.Node]:
    """What feeds the first projection above ``node``: the nodes that write into that sequence."""
    found: set[fx.Node] = set()
    for first in ancestors(node, stop=_is_source):
        if first.op == "placeholder":
            found.add(first)
        elif _is_source(first):
            found |= _fed_by(first)
    return found


def _fed_by(projection: fx.Node) -> set[fx.Node]:
    """The same for one projection; of two, one behind the other as of low rank, what feeds the first."""
    while True:
        found: set[fx.Node] = set()
        for x in projection.all_input_nodes:
            if not is_tensor(x) or x.op == "get_attr":
                continue
            above = list(ancestors(x, stop=_is_source))
            streams = {n for n in above if _is_source(n) or (n.op == "placeholder" and is_tensor(n))}
            if not streams and opname(projection) == "linear" and x is arg(projection, 0):
                streams = {n for n in above if n.op == "get_attr"}  # learned queries alone
            found |= streams
        if len(found) != 1 or not _keeps_tokens(behind := next(iter(found)), projection):
            return found
        projection = behind


def _keeps_tokens(first: fx.Node, second: fx.Node) -> bool:
    """Between two projections nothing moves a token, nor makes several into one."""
    if opname(first) != "linear" or opname(second) != "linear":
        return False
    above = set(ancestors(second, stop=lambda n: n is first))
    between, open_ends = {first}, [first]
    while open_ends:
        fresh = [n for n in open_ends.pop().users if n in above and n not in between]
        between.update(fresh)
        open_ends.extend(fresh)
    return all(_is_of_each_token(n, value(first).shape[:-1]) for n in between)


def _is_of_each_token(node: fx.Node, tokens: tuple[int, ...]) -> bool:
    if opname(node) not in _OF_EACH_TOKEN and torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return False
    if not is_tensor(node):
        return True
    sizes = value(node).shape
    return len(sizes) == len(tokens) + 1 and all(map(same_size, sizes, tokens))
