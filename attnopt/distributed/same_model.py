"""The optimized model that every rank brings, which has to be one."""

from __future__ import annotations

from attnopt.base.closeness import tensors
from attnopt.errors import DistributedError
from attnopt.graph.nodes import stored
from attnopt.model import OptimizedModel


def require_optimized(fast: object) -> OptimizedModel:
    """Raises DistributedError."""
    if isinstance(fast, OptimizedModel):
        return fast
    raise DistributedError(
        f"expected an optimized model, found {type(fast).__name__}", hint="pass the result of attnopt.optimize"
    )


def told_of(fast: OptimizedModel) -> dict[str, object]:
    """What has to be the same on all ranks, by name."""
    return {
        "the policy": fast.report.policy,
        "the graph": fast.graph_module.code,
        "the weights": stored(fast.graph_module),
        "the example inputs": dict(enumerate(tensors(fast.origin.inputs))),
    }
