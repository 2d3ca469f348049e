"""Two branches of one model in one graph: the model, and a weaker form of it that it is pushed away from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.base.closeness import difference, tensors, tolerance
from attnopt.base.cpu_timing import interleaved
from attnopt.compiler.compile import Compiled, again, carried_out
from attnopt.compiler.job import Job
from attnopt.compiler.policy import Policy
from attnopt.errors import RewriteError, VerificationError
from attnopt.graph.cleanup import has_effects, prune_unused_state, share_equal_nodes
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import get_attr, inputs_of, is_tensor, value
from attnopt.lower.lower import copy_program

ROUNDS = 3  # of timing
ROOM = 8  # times the rounding of the two branches


def guided(job: Job, scale: float) -> Compiled:
    """``strong + scale * (strong - weak)``, where ``weak`` is the model under the policy of ``job``.  Raises AttnoptError.

    Both branches fuse what the policy leaves alone, so that they share every layer before the first one that differs.
    """
    globs = [glob for glob, _ in job.policy.rules]
    fused = Policy.of("fuse")
    weak_policy = job.policy if "*" in globs else Policy((*fused.rules, *job.policy.rules))
    strong = carried_out(replace(job, policy=fused, batches=()))
    if strong.origin.form is not None or strong.origin.file is not None:
        raise RewriteError(
            "guidance needs a PyTorch model that takes and returns tensors only",
            hint="call the model without a cache, or wrap it in a module that returns its tensors",
        )
    weak = again(replace(job, policy=weak_policy), strong)
    module = joined(strong.module, weak.module, scale)
    _verify(module, strong, weak, scale)
    report = replace(weak.origin.report, cpu_seconds=_measured(strong, module))
    return replace(weak, module=module, origin=replace(weak.origin, report=report))


def joined(strong: fx.GraphModule, weak: fx.GraphModule, scale: float) -> fx.GraphModule:
    """One graph of both, in which what is equal stands once.  Outputs that are no floating-point tensors are ``strong``'s."""
    changing = next(
        (n for g in (strong, weak) for n in g.graph.nodes if n.op == "call_function" and has_effects(n)), None
    )
    if changing is not None:
        raise RewriteError(
            f"the model changes its own state ({changing.name}), which two branches would do twice",
            hint="put it in evaluation mode, or wrap it in a module without that state",
        )
    module, _ = copy_program(strong)
    graph = module.graph
    output = graph.output_node()
    attributes = {str(n.target): n for n in graph.nodes if n.op == "get_attr"}
    inputs = iter(inputs_of(graph))
    here: dict[fx.Node, fx.Node] = {}
    for node in weak.graph.nodes:
        if node.op == "placeholder":
            here[node] = next(inputs)
        elif node.op == "get_attr":
            here[node] = _attribute(module, output, attributes, weak, node)
        elif node.op != "output":
            with graph.inserting_before(output):
                here[node] = graph.node_copy(node, here.__getitem__)
    ours, spec = pytree.tree_flatten(output.args[0])
    theirs = [here[n] if isinstance(n, fx.Node) else n for n in pytree.tree_leaves(weak.graph.output_node().args[0])]
    emit = Emitter(graph, output)
    both = [_pushed(emit, a, b, scale) for a, b in zip(ours, theirs, strict=True)]
    output.args = (pytree.tree_unflatten(both, spec),)
    share_equal_nodes(module)
    graph.eliminate_dead_code()
    prune_unused_state(module)
    graph.lint()
    module.recompile()
    return module


def _attribute(
    module: fx.GraphModule, before: fx.Node, known: dict[str, fx.Node], weak: fx.GraphModule, node: fx.Node
) -> fx.Node:
    """The node of ``module`` with the same stored value, which is added if it has none under this name."""
    name, held = str(node.target), get_attr(weak, str(node.target))
    while name in known:
        if _same(get_attr(module, name), held):
            return known[name]
        name += "_weak"
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner) if _has_module(module, owner) else None
    if parent is None or hasattr(parent, leaf):
        parent, leaf = module, f"weak_{name.replace('.', '_')}"
        while hasattr(parent, leaf):
            leaf += "_"
    if isinstance(held, torch.nn.Parameter) or not isinstance(held, Tensor):
        setattr(parent, leaf, held)
    else:
        parent.register_buffer(leaf, held)
    target = leaf if parent is module else name
    with module.graph.inserting_before(before):
        known[name] = module.graph.get_attr(target)
    known[name].meta.update(node.meta)
    return known[name]


def _has_module(module: fx.GraphModule, name: str) -> bool:
    return name in dict(module.named_modules())


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(a.device == b.device and (a.data_ptr() == b.data_ptr() or torch.equal(a, b)))


def _pushed(emit: Emitter, strong: object, weak: object, scale: float) -> object:
    if not (is_tensor(strong) and is_tensor(weak)) or not value(strong).dtype.is_floating_point:
        return strong
    return emit.inline(lambda a, b: a + scale * (a - b), strong, weak)


def _verify(module: fx.GraphModule, strong: Compiled, weak: Compiled, scale: float) -> None:
    """The graph gives what the two models give.  Raises VerificationError."""
    args, kwargs = strong.program.inputs
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        got, a, b = (tensors(m(*args, **kwargs)) for m in (module, strong.module, weak.module))
    want = [x + scale * (x - y) if x.is_floating_point() else x for x, y in zip(a, b, strict=True)]
    apart = difference(got, want)
    if not apart <= ROOM * (1 + 2 * abs(scale)) * tolerance(want):
        raise VerificationError(
            f"the two branches together differ from each alone by {apart:.2g} (relative)", hint="report the model"
        )


def _measured(strong: Compiled, module: fx.GraphModule) -> Mapping[str, float]:
    """CPU seconds of one call of the model alone, and of both branches."""
    args, kwargs = strong.program.inputs
    calls = {"before": partial(strong.module, *args, **kwargs), "after": partial(module, *args, **kwargs)}
    with torch.no_grad():
        times = interleaved(calls, ROUNDS)
    return {name: times.median(name) for name in ("before", "after")}
