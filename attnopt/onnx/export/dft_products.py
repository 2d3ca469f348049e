"""Discrete Fourier transforms as products with constant matrices, which is exact, for runtimes without complex numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.base.sizes import is_static
from attnopt.graph.cleanup import remove_unused_nodes
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import aten, value
from attnopt.graph.sdpa import call_arguments


def in_products(gm: fx.GraphModule) -> None:
    """Changes each transform along one axis of a fixed length.  The others are left to the exporter."""
    for node in list(gm.graph.nodes):
        write = _WRITE.get(node.target) if node.op == "call_function" else None
        if write is None:
            continue
        given = call_arguments(node)
        source, axis = given["self"], given.get("dim", -1)
        length = value(node if node.target is aten.fft_irfft.default else source).shape[axis]
        if given.get("norm") not in (None, "backward") or not is_static(length) or given.get("n") not in (None, length):
            continue
        made = write(_Along(Emitter(gm.graph, node), source, axis % value(source).dim(), int(length)))
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
    remove_unused_nodes(gm)


@dataclass(frozen=True)
class _Along:
    """Products along one axis of ``source``."""

    emit: Emitter
    source: fx.Node
    axis: int
    length: int

    @property
    def parts(self) -> tuple[fx.Node, fx.Node]:
        """The real and the imaginary part."""
        pair = self.emit.call(aten.view_as_real.default, self.source)
        first, second = (self.emit.call(aten.select.int, pair, -1, i) for i in (0, 1))
        return first, second

    def times(self, x: fx.Node, matrix: Tensor) -> fx.Node:
        """``matrix`` [new, old] times the axis."""
        rank = value(x).dim()
        last = [*(a for a in range(rank) if a != self.axis), self.axis]
        back = [last.index(a) for a in range(rank)]
        held = self.emit.constant(matrix.T.contiguous().to(value(x).dtype))
        moved = self.emit.call(aten.permute.default, x, last)
        return self.emit.call(aten.permute.default, self.emit.call(aten.matmul.default, moved, held), back)

    def complex(self, re: fx.Node, im: fx.Node) -> fx.Node:
        return self.emit.call(aten.view_as_complex.default, self.emit.call(aten.stack.default, [re, im], -1))

    def waves(self, frequencies: int) -> tuple[Tensor, Tensor]:
        """cos and sin [frequencies, length], float64."""
        turns = torch.arange(frequencies)[:, None] * torch.arange(self.length) % self.length
        angle = turns.double() * (2 * math.pi / self.length)
        return angle.cos(), angle.sin()


def _rfft(x: _Along) -> fx.Node:
    cos, sin = x.waves(x.length // 2 + 1)
    return x.complex(x.times(x.source, cos), x.times(x.source, -sin))


def _irfft(x: _Along) -> fx.Node:
    (re, im), (cos, sin) = x.parts, x.waves(x.length // 2 + 1)
    counted = torch.full((len(cos), 1), 2.0, dtype=torch.float64)
    counted[0] = 1.0
    if x.length % 2 == 0:
        counted[-1] = 1.0
    back, across = ((w * counted / x.length).T for w in (cos, sin))
    return x.emit.call(aten.sub.Tensor, x.times(re, back), x.times(im, across))


def _fft(x: _Along) -> fx.Node:
    return _both(x, 1.0, 1.0)


def _ifft(x: _Along) -> fx.Node:
    return _both(x, -1.0, 1.0 / x.length)


def _both(x: _Along, sign: float, scale: float) -> fx.Node:
    """``(re + i im) (cos - i sign sin) scale``."""
    (re, im), (cos, sin) = x.parts, (w * scale for w in x.waves(x.length))
    add, call = aten.add.Tensor, x.emit.call
    real = call(add, x.times(re, cos), x.times(im, sign * sin))
    return x.complex(real, call(add, x.times(im, cos), x.times(re, -sign * sin)))


_WRITE: dict[object, Callable[[_Along], fx.Node]] = {
    aten.fft_rfft.default: _rfft,
    aten.fft_irfft.default: _irfft,
    aten.fft_fft.default: _fft,
    aten.fft_ifft.default: _ifft,
}
