"""One model on several processes: sequence-parallel attention and sharded calibration, on torch.distributed."""

from attnopt.distributed.calibration import share_calibration
from attnopt.distributed.context_parallel import ContextParallel, context_parallel
from attnopt.distributed.plan import AttentionPlan, ParallelPlan

__all__ = ["AttentionPlan", "ContextParallel", "ParallelPlan", "context_parallel", "share_calibration"]
