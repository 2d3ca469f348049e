"""The arguments of ``torch.nn.functional.scaled_dot_product_attention``, read from its calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from attnopt.graph.nodes import aten, shape

SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class SdpaArguments:
    """Every argument, defaults filled in.  ``scale`` is None if it is computed at run time."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool


def sdpa_arguments(node: fx.Node) -> SdpaArguments:
    """The arguments of a call of ``SDPA``."""
    given = call_arguments(node)
    if given["scale"] is None:
        given["scale"] = shape(given["query"])[-1] ** -0.5
    given["scale"] = None if isinstance(given["scale"], fx.Node) else float(given["scale"])
    return SdpaArguments(**given)


def call_arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an operator's call by its name, defaults filled in; None for one that is missing."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}
