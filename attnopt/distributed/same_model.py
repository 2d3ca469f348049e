"""The optimized model that every rank brings, which has to be one."""

from __future__ import annotations

from attnopt.base.closeness import tensors
from attnopt.base.split_weight import split_parameter
from attnopt.errors import DistributedError
from attnopt.graph.nodes import stored
from attnopt.model import OptimizedModel


def require_optimized(fast: object) -> OptimizedModel:
    """Raises DistributedError."""
    if not isinstance(fast, OptimizedModel):
        raise DistributedError(
            f"expected an optimized model, found {type(fast).__name__}", hint="pass the result of attnopt.optimize"
        )
    if (name := split_parameter(fast)) is not None:
        raise DistributedError(
            f"{name} is split over several processes (a DTensor)",
            hint="attnopt.distributed.gathered gives the same model with whole weights",
        )
    return fast


def told_of(fast: OptimizedModel) -> dict[str, object]:
    """What has to be the same on all ranks, by name."""
    return {
        "the policy": fast.report.policy,
        "the graph": fast.graph_module.code,
        "the weights": stored(fast.graph_module),
        "the example inputs": dict(enumerate(tensors(fast.origin.inputs))),
    }
