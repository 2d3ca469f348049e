"""One model on several processes: sequence-parallel attention and sharded calibration, on torch.distributed."""

from attnopt.distributed.calibration import peers, share_calibration
from attnopt.distributed.context_parallel import ContextParallel, context_parallel
from attnopt.distributed.plan import AttentionPlan, ParallelPlan, plan
from attnopt.distributed.split_model import gathered, optimize
from attnopt.distributed.tensor_parallel import TensorParallel, tensor_parallel
from attnopt.distributed.traffic import Link

__all__ = [
    "AttentionPlan",
    "ContextParallel",
    "Link",
    "ParallelPlan",
    "TensorParallel",
    "context_parallel",
    "gathered",
    "optimize",
    "peers",
    "plan",
    "share_calibration",
    "tensor_parallel",
]
