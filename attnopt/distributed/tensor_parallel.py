"""``attnopt.distributed.tensor_parallel``: an optimized model with its weights split over ranks, as DTensors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import ROOM, difference, tensors, tolerance
from attnopt.distributed.ranks import Ranks
from attnopt.distributed.same_inputs import require_same_inputs, sampled
from attnopt.distributed.same_model import require_optimized, told_of
from attnopt.distributed.sharded_attention import ShardedAttention
from attnopt.errors import DistributedError, VerificationError
from attnopt.graph.copies import copy_program
from attnopt.graph.nodes import calls, module_path, stored, written
from attnopt.graph.ops import Kind, named, of
from attnopt.graph.sdpa import call_arguments
from attnopt.graph.store import put
from attnopt.lower.attention_calls import attention_calls, lowered_at
from attnopt.model import OptimizedModel, run_graph

Plan = Mapping[str, ParallelStyle | Placement]


class TensorParallel(nn.Module):
    """See ``tensor_parallel``.  Parameters are DTensors; inputs and outputs are plain and whole, the same on every rank."""

    def __init__(self, inner: OptimizedModel, mesh: DeviceMesh, ranks: Ranks) -> None:
        super().__init__()
        self.inner, self.mesh, self.ranks = inner, mesh, ranks

    def forward(self, *args: object, **kwargs: object) -> Any:
        """The outputs of the model."""
        with self.ranks.together("reading the inputs") as told:
            inputs, give = self.inner.arranged(args, kwargs)
            told.own = sampled(inputs)
        require_same_inputs(told.all)
        return give(self._run(inputs))

    @property
    def attentions(self) -> dict[str, str]:
        """How each attention was shared at the last call."""
        return {m.site: m.way for m in self.inner.modules() if isinstance(m, ShardedAttention)}

    def _run(self, inputs: CallInputs) -> Any:
        made = run_graph(self.inner.graph_module, _distributed(inputs, self.mesh))
        return pytree.tree_map_only(DTensor, lambda x: x.full_tensor(), made)


def tensor_parallel(
    fast: OptimizedModel, mesh: DeviceMesh, plan: Plan, *, axis: str | int | None = None
) -> TensorParallel:
    """``fast`` with its weights split over the ranks of one axis of ``mesh``; every rank calls this, and then the result.

    ``plan``: as of torch's ``parallelize_module``, the names of modules of the model, or globs over them, with
    ``ColwiseParallel()`` or ``RowwiseParallel()``; or names of parameters with a placement such as ``Shard(0)``.  Any plan gives
    the outputs of ``fast``: it only decides what travels.  Layouts of inputs and outputs in a style are not needed.
    Where queries come split by heads and their number divides by the ranks, each rank computes its own heads, with the key/value
    heads that only it reads, or copies of those that others read too; ``attentions`` tells.

    The result is compared with ``fast`` on its example inputs.  Raises DistributedError on every rank, or VerificationError.
    """
    ranks = Ranks.of(mesh, axis)
    with ranks.together("reading the model"):
        given = told_of(require_optimized(fast))
        if names := written(fast.graph_module):
            raise DistributedError(
                f"the model writes to its state {names[0]}", hint="optimize it without a cache of its own"
            )
        placements = _placements(fast.graph_module, plan)
    ranks.require_same({**given, "the plan": placements})
    line = _line_of(mesh, axis)
    with ranks.together("splitting the weights"):
        origin = fast.origin
        known = tuple(replace(site, parameters={}) for site in origin.sites)  # which would keep whole weights alive
        module = _split(fast.graph_module, line, placements)
        made = TensorParallel(OptimizedModel(module, replace(origin, sites=known)), line, ranks)
    _settle(module, _distributed(origin.inputs, line), line)
    with ranks.together("comparing with one rank"):
        _compare(made, fast)
    return made


def _line_of(mesh: DeviceMesh, axis: str | int | None) -> DeviceMesh:
    """The mesh of one axis."""
    if mesh.ndim == 1:
        return mesh
    name = axis if isinstance(axis, str) else (mesh.mesh_dim_names or ())[axis or 0]
    return mesh[name]


def _compare(made: TensorParallel, fast: OptimizedModel) -> None:
    """Raises VerificationError."""
    inputs = fast.origin.inputs
    with torch.no_grad():
        want, got = tensors(run_graph(fast.graph_module, inputs)), tensors(made._run(inputs))
    apart = difference(got, want)
    if not apart <= ROOM * tolerance(want):
        raise VerificationError(
            f"the ranks together do not compute what one rank alone would: {apart:.2g} (relative)",
            hint="run the model on one rank, and report it",
        )


# ------------------------------------------------------------ the plan
def _placements(gm: fx.GraphModule, plan: Plan) -> dict[str, Placement]:
    """Of each parameter that the plan splits.  Raises DistributedError."""
    parameters = [name for name, x in stored(gm).items() if isinstance(x, nn.Parameter)]
    found: dict[str, Placement] = {}
    for key, style in plan.items():
        of_key = {name: kind for name in parameters if (kind := _kind(name, key, style)) is not None}
        if not of_key:
            modules = sorted({name.rpartition(".")[0] for name in parameters})
            near = difflib.get_close_matches(key, [*modules, *parameters], n=3, cutoff=0.3)
            raise DistributedError(
                f"the plan names {key!r}, and the optimized model has no such parameter",
                hint=f"the nearest are {', '.join(near)}; passes that remove heads join and rename projections"
                if near
                else "list them with fast.named_parameters()",
            )
        found |= {name: _placement(gm, name, style, kind) for name, kind in of_key.items()}
    return found


def _kind(name: str, key: str, style: ParallelStyle | Placement) -> str | None:
    """ "weight" or "bias" if the plan's ``key`` means this parameter."""
    owner, _, last = name.rpartition(".")
    wanted = name if isinstance(style, Placement) else owner
    parts, globs = wanted.split("."), key.split(".")
    if len(parts) != len(globs) or not all(map(fnmatch, parts, globs)):
        return None
    return last


def _placement(gm: fx.GraphModule, name: str, style: ParallelStyle | Placement, kind: str) -> Placement:
    if isinstance(style, Placement):
        return style
    if not isinstance(style, (ColwiseParallel, RowwiseParallel)):
        raise DistributedError(
            f"the plan has a {type(style).__name__} for {name!r}, and an optimized model calls no modules",
            hint="give ColwiseParallel(), RowwiseParallel(), or a placement for each parameter",
        )
    by_column = isinstance(style, ColwiseParallel)
    if kind == "bias":
        return Shard(0) if by_column else Replicate()
    out = _output_axis(gm, name)
    return Shard(out if by_column else 1 - out)


def _output_axis(gm: fx.GraphModule, name: str) -> int:
    """The axis of a weight's output features.  Raises DistributedError."""
    for node in gm.graph.find_nodes(op="get_attr"):
        if node.target != name:
            continue
        for user in node.users:
            if calls(user, named("linear")):
                return 0
            if calls(user, named("addmm mm matmul") | of(Kind.EMBEDDING)):
                return 1
    raise DistributedError(
        f"the plan splits {name!r}, which no linear layer or embedding reads directly",
        hint="give a placement for the parameter, such as torch.distributed.tensor.Shard(0)",
    )


# ------------------------------------------------------------ the graph
def _split(gm: fx.GraphModule, mesh: DeviceMesh, placements: Mapping[str, Placement]) -> fx.GraphModule:
    module, _ = copy_program(gm)
    for number, node in enumerate(list(attention_calls(module.graph))):
        _replace(module, node, f"attention_{number}", mesh)
    for name, x in stored(module).items():
        made: Tensor = distribute_tensor(x, mesh, [placements.get(name, Replicate())], src_data_rank=None)
        put(module, name, nn.Parameter(made, x.requires_grad) if isinstance(x, nn.Parameter) else made)
    module.graph.lint()
    module.recompile()
    return module


def _replace(module: fx.GraphModule, node: fx.Node, name: str, mesh: DeviceMesh) -> None:
    noted = lowered_at(node)
    part = ShardedAttention(node, noted.site if noted is not None else module_path(node) or node.name, mesh)
    module.add_submodule(name, part)
    with module.graph.inserting_before(node):
        made = module.graph.call_module(name, tuple(call_arguments(node).values()))
    node.replace_all_uses_with(made)
    module.graph.erase_node(node)


def _settle(module: fx.GraphModule, inputs: CallInputs, mesh: DeviceMesh) -> None:
    """DTensor has no rule for some operators of some shards, as for a reshape that splits no whole heads: their operands are
    collected.  What the graph makes of nothing, as tables of positions, becomes a DTensor where it meets one.

    Raises DistributedError where an operator cannot run on whole operands either."""
    trial = _Trial(module)
    with torch.no_grad(), implicit_replication():
        trial.run(*pytree.tree_leaves(inputs), enable_io_processing=False)
    for name, nodes in (("collected", trial.refused), ("known", trial.mixed)):
        module.add_submodule(name, Whole(mesh))
        for node in nodes:
            with module.graph.inserting_before(node):
                for operand in node.all_input_nodes:
                    if name == "collected" or operand in trial.plain:
                        node.replace_input_with(operand, module.graph.call_module(name, (operand,)))
    module.graph.lint()
    module.recompile()


class Whole(nn.Module):
    """The same tensor, whole on every rank; a number is left as it is."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh

    def forward(self, x: Any) -> Any:
        if isinstance(x, DTensor):
            return x.redistribute(self.mesh, [Replicate()])
        return DTensor.from_local(x, self.mesh, [Replicate()], run_check=False) if isinstance(x, Tensor) else x


class _Trial(fx.Interpreter):
    """``refused``: the nodes that run on whole operands alone; ``plain``: those that give a plain tensor; ``mixed``: those that
    read such and DTensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.refused: list[fx.Node] = []
        self.mixed: list[fx.Node] = []
        self.plain: set[fx.Node] = set()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kinds = {isinstance(x, DTensor) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if len(kinds) == 2:
            self.mixed.append(self.node)
        try:
            return super().call_function(target, args, kwargs)
        except Exception:
            whole = pytree.tree_map(_collected, (args, kwargs))
        try:
            made = super().call_function(target, *whole)
        except Exception as e:
            raise DistributedError(
                f"{target} cannot run on DTensors: {type(e).__name__}: {str(e).splitlines()[0]}",
                hint="run the model on one rank, or by context_parallel",
            ) from e
        self.refused.append(self.node)
        return made

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        made = super().run_node(n)
        if isinstance(made, Tensor) and not isinstance(made, DTensor):
            self.plain.add(n)
        return made


def _collected(x: Any) -> Any:
    """The same, whole on every rank."""
    return x.redistribute(placements=[Replicate()]) if isinstance(x, DTensor) else x


def _distributed(inputs: CallInputs, mesh: DeviceMesh) -> CallInputs:
    """Those that are whole on every rank."""
    made: CallInputs = pytree.tree_map_only(
        Tensor, lambda x: DTensor.from_local(x, mesh, [Replicate()], run_check=False), inputs
    )
    return made
