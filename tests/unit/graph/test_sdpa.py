"""One reader of the arguments of torch's attention: every way to pass them, and the defaults."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from attnopt.base.call_inputs import CallInputs
from attnopt.capture.capture import capture
from attnopt.graph.nodes import is_call
from attnopt.graph.sdpa import SDPA, SdpaArguments, sdpa_arguments

sdpa = functional.scaled_dot_product_attention
CALLS: dict[str, tuple[Callable[..., Tensor], dict[str, object]]] = {
    "three operands": (lambda q, k, v, m: sdpa(q, k, v), {}),
    "a mask by place": (lambda q, k, v, m: sdpa(q, k, v, m), {"attn_mask": True}),
    "a mask by name": (lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), {"attn_mask": True}),
    "all by place": (lambda q, k, v, m: sdpa(q, k, v, None, 0.0, True), {"is_causal": True}),
    "options by name": (lambda q, k, v, m: sdpa(q, k, v, is_causal=True, scale=0.3), {"is_causal": True, "scale": 0.3}),
    "fewer keys": (lambda q, k, v, m: sdpa(q, k[:, :2], v[:, :2], enable_gqa=True), {"enable_gqa": True}),
    "a scale of zero": (lambda q, k, v, m: sdpa(q, k, v, scale=0.0), {"scale": 0.0}),
}


class Call(nn.Module):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return self.call(q, k, v, m)


def called(call: Callable[..., Tensor]) -> fx.Node:
    length = torch.export.Dim("length")
    q, m = torch.randn(1, 4, 6, 16), torch.ones(6, 6, dtype=torch.bool)
    axes = ({2: length}, {2: length}, {2: length}, {0: length, 1: length})
    graph = capture(Call(call), CallInputs((q, q, q, m), {}), axes).module.graph
    (node,) = (n for n in graph.nodes if is_call(n, SDPA))
    return node


@pytest.mark.parametrize(("call", "wanted"), CALLS.values(), ids=CALLS)
def test_arguments(call: Callable[..., Tensor], wanted: dict[str, object]) -> None:
    node = called(call)
    options = {"dropout_p": 0.0, "is_causal": False, "scale": 0.25, "enable_gqa": False} | wanted
    mask = node.graph.find_nodes(op="placeholder")[3] if options.pop("attn_mask", False) else None
    assert sdpa_arguments(node) == SdpaArguments(*node.args[:3], attn_mask=mask, **options)  # type: ignore[arg-type]


def test_a_scale_that_is_computed() -> None:
    node = called(sdpa)
    node.kwargs = {"scale": node.graph.find_nodes(op="placeholder")[0]}
    assert sdpa_arguments(node).scale is None
