"""Optimizing a model that ``fully_shard`` or ``parallelize_module`` has split, so that no process ever holds all of its weights.

The graph is traced on their form alone.  Wherever it or a pass reads a weight, all processes gather that one, and calibration
keeps those of one layer while all batches run through it.  New weights are split as those whose places they take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from attnopt.api import optimize as optimize_whole
from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import ROOM, difference, tensors, tolerance
from attnopt.base.split_weight import Part, SplitWeight, split_parameter
from attnopt.capture.calibration import Batch, Calibration
from attnopt.capture.run_unchanged import outputs_of
from attnopt.compiler.policy import Policy
from attnopt.distributed.calibration import RankPeers
from attnopt.distributed.gathered_weight import gathered_weight, whole_of
from attnopt.distributed.ranks import Ranks
from attnopt.distributed.unsplit import without_splitting
from attnopt.errors import CalibrationError, DistributedError
from attnopt.graph.copies import copy_program
from attnopt.graph.nodes import get_attr, is_call, stored
from attnopt.graph.store import put
from attnopt.ir.interfaces import Backend
from attnopt.ir.peers import Peers
from attnopt.model import OptimizedModel


def optimize(
    model: nn.Module,
    policy: object = "fuse",
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    dynamic_shapes: object = None,
    calibration: Iterable[Batch] | Calibration | None = None,
    backend: str | Backend = "auto",
    tolerance: float | None = None,
    strict: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> OptimizedModel:
    """``attnopt.optimize`` for a model split by ``fully_shard`` or ``parallelize_module``, without gathering it whole.

    Every process that shares the weights calls this, with the same arguments.  ``calibration``: of ``share_calibration``, with
    as many batches on each process; or the same batches on all.  Parameters of the result are DTensors, split as those of
    ``model`` and shared with it where they did not change; each is gathered where the result reads it, and let go.
    ``gathered`` makes the result whole, for ``save`` and the exports.

    Raises AttnoptError on every process: DistributedError where the model computes something else with whole weights.
    """
    if not isinstance(model, nn.Module) or split_parameter(model) is None:
        raise DistributedError("no parameter of the model is a DTensor", hint="call attnopt.optimize")
    inputs = CallInputs.of(args, kwargs)
    if not any(inputs):
        raise DistributedError(
            "a split model needs example inputs", hint="pass the same args or kwargs on every process"
        )
    peers = calibration.peers if isinstance(calibration, Calibration) else None
    split = SplitModel.of(model, peers)
    with split.peers.working({"the example inputs": dict(enumerate(tensors(inputs)))}):
        chosen = Policy.of(policy)
        data = None if calibration is None else Calibration.of(calibration, shared=True)
        split.check(inputs, 0 if data is None else len(data))
    given = {"the policy": chosen.to_json(), "the options": (backend, tolerance, strict, limit, seed)}
    batches = {} if data is None else {"the calibration data": dict(enumerate(tensors(data.batches)))}
    with nullcontext() if peers is not None else split.peers.working({**given, **batches}):
        fast = optimize_whole(
            split.whole,
            chosen,
            *inputs,
            dynamic_shapes=dynamic_shapes,
            calibration=data,
            backend=backend,
            tolerance=tolerance,
            strict=strict,
            limit=limit,
            seed=seed,
        )
    return _divided(fast)


@dataclass(frozen=True, eq=False)
class SplitModel:
    """``whole``: a copy of the user's ``model`` without what splits its work; its weights are gathered where they are read."""

    model: nn.Module
    whole: nn.Module
    peers: RankPeers

    @classmethod
    def of(cls, model: nn.Module, peers: Peers | None) -> SplitModel:
        """``peers``: who have other calibration data.  Raises DistributedError."""
        _reshard(model)
        meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
        ranks = _ranks(max(meshes, key=lambda mesh: mesh.size()))
        if peers is not None and peers.count != ranks.size:
            raise DistributedError(
                f"{ranks.size} processes share the weights, and {peers.count} the calibration data",
                hint="share the data among all processes that share the weights",
            )
        everyone = peers if isinstance(peers, RankPeers) else RankPeers(ranks)

        def split(x: Tensor, name: str) -> Tensor:
            if not isinstance(x, DTensor):
                return x
            made = SplitWeight(_Shared(x, name, everyone))
            return nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made

        return cls(model, without_splitting(model, split), everyone)

    def check(self, inputs: CallInputs, batches: int) -> None:
        """The copy computes what the model does.  Raises DistributedError, CalibrationError."""
        if len(set(self.peers.everyone(batches))) > 1:
            raise CalibrationError(
                "the processes have different numbers of calibration batches, and those that share weights run them together",
                hint="give each as many, as a DistributedSampler does",
            )
        with torch.no_grad():
            want = [whole_of(x) if isinstance(x, DTensor) else x for x in outputs_of(self.model, inputs)]
            _reshard(self.model)
            got = outputs_of(self.whole, inputs)
        apart = difference(got, want)
        if not apart <= ROOM * min(tolerance(want), tolerance(got)):
            raise DistributedError(
                f"with whole weights, the model computes something else than split: {apart:.2g} (relative)",
                hint="optimize it before it is split, where its code reads the number of its own heads, or a mixed-precision "
                "policy rounds its weights",
            )


def _reshard(model: nn.Module) -> None:
    """After a call, the root still has its own parameters whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _ranks(mesh: DeviceMesh) -> Ranks:
    """All processes of the mesh.  Raises DistributedError."""
    if mesh.ndim == 1:
        return Ranks.of(mesh, None)
    everyone = dist.group.WORLD
    if everyone is None or mesh.size() != dist.get_world_size():
        raise DistributedError(
            f"the weights are split over a mesh of {mesh.ndim} axes, which leaves out some processes",
            hint="start only the processes of the mesh, or optimize the model before it is split",
        )
    return Ranks(everyone, dist.get_rank(), mesh.size())


@dataclass(frozen=True, eq=False)
class _Shared(Part):
    """A DTensor.  Before it is gathered, the processes say that they all want this one."""

    held: DTensor
    name: str
    peers: RankPeers

    @property
    def form(self) -> Tensor:
        return self.held

    def gather(self) -> Tensor:
        self.peers.agree(self.name)
        try:
            return whole_of(self.held)
        except Exception as e:
            self.peers.fail(e)

    def of(self, x: Tensor) -> _Shared:
        placements = [_alike(p, x.dim()) for p in self.held.placements]
        made = distribute_tensor(x.detach(), self.held.device_mesh, placements, src_data_rank=None)
        return replace(self, held=made, name=f"{self.name} {tuple(x.shape)}")


def _alike(placement: Any, axes: int) -> Placement:
    """Along the same axis, if a tensor of so many axes has it."""
    if placement.is_replicate():
        return Replicate()
    return Shard(placement.dim if placement.dim < axes else 0)


# ------------------------------------------------------------ the result
def _divided(fast: OptimizedModel) -> OptimizedModel:
    """With DTensors as parameters, each gathered where it is read."""
    module = fast.graph_module
    order = {n: place for place, n in enumerate(module.graph.nodes)}
    for node in list(module.graph.find_nodes(op="get_attr")):
        if not isinstance(get_attr(module, str(node.target)), SplitWeight):
            continue
        for user in sorted(node.users, key=order.__getitem__):  # apart, so that none is kept from one to the next
            with module.graph.inserting_before(user):
                whole = module.graph.call_function(gathered_weight, (node,))
            whole.meta.update(node.meta)
            user.replace_input_with(node, whole)
    every = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    for name, x in list(chain(*every)):
        if isinstance(x, SplitWeight):
            put(module, name, _as_held(x))
    module.graph.lint()
    module.recompile()
    sites = tuple(replace(site, parameters={}) for site in fast.origin.sites)  # whose weights no process has
    return OptimizedModel(module, replace(fast.origin, sites=sites))


def _as_held(x: SplitWeight) -> Tensor:
    held = x.part.form
    is_new = isinstance(x, nn.Parameter) and not isinstance(held, nn.Parameter)
    return nn.Parameter(held, x.requires_grad) if is_new else held


def gathered(fast: OptimizedModel) -> OptimizedModel:
    """A result of ``attnopt.distributed.optimize`` with whole weights on every process, as ``save`` and the exports need it.

    All processes that share the weights call this together.
    """
    module, _ = copy_program(fast.graph_module)
    for node in list(module.graph.nodes):
        if is_call(node, gathered_weight):
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)
    for name, x in stored(module).items():
        if isinstance(x, DTensor):
            whole = whole_of(x)
            put(module, name, nn.Parameter(whole, x.requires_grad) if isinstance(x, nn.Parameter) else whole)
    module.recompile()
    live = stored(module)
    return OptimizedModel(
        module, replace(fast.origin, sites=tuple(replace(s, parameters=live) for s in fast.origin.sites))
    )
