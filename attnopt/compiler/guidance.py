"""Two branches of one model in one graph: the model, and a weaker form of it that it is pushed away from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.closeness import difference, tensors, tolerance
from attnopt.base.cpu_timing import interleaved
from attnopt.compiler.compile import Compiled, again, carried_out
from attnopt.compiler.job import Job
from attnopt.compiler.origin import Origin
from attnopt.compiler.policy import Policy
from attnopt.errors import RewriteError, VerificationError
from attnopt.graph.cleanup import draws, prune_unused_state, remove_unused_nodes, share_equal_nodes, writes
from attnopt.graph.copies import copy_program
from attnopt.graph.emitter import Emitter
from attnopt.graph.nodes import inputs_of, is_tensor, stored, value
from attnopt.graph.store import store
from attnopt.ir.projection import Projection

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
    if strong.origin.form is not None:
        raise RewriteError(
            "guidance needs a model that takes and returns tensors only",
            hint="call the model without a cache, or wrap it in a module that returns its tensors",
        )
    weak = again(replace(job, policy=weak_policy), strong)
    module, names = joined(strong.module, weak.module, scale)
    _verify(module, strong, weak, scale)
    return replace(weak, module=module, origin=_origin(strong, weak, module, names))


def joined(strong: fx.GraphModule, weak: fx.GraphModule, scale: float) -> tuple[fx.GraphModule, dict[str, str]]:
    """One graph of both, in which what is equal stands once, and the names in it of what ``weak`` reads.

    Outputs that are no numbers that can be pushed are ``strong``'s.  Raises RewriteError.
    """
    _refuse_what_happens_twice(strong, weak)
    module, _ = copy_program(strong)
    graph = module.graph
    output = graph.output_node()
    inputs = iter(inputs_of(graph))
    checks = {str(n.target): n for n in graph.nodes if n.op == "call_module"}  # both have those of the model
    known = {str(n.target): n for n in graph.nodes if n.op == "get_attr"}
    placed: dict[str, fx.Node] = {}
    here: dict[fx.Node, fx.Node] = {}
    for node in weak.graph.nodes:
        if node.op == "placeholder":
            here[node] = next(inputs)
            here[node].meta["val"] = node.meta["val"]  # with the sizes of what only the weak branch reads
        elif node.op == "get_attr":
            name = str(node.target)
            if name not in placed:
                held, ours = attrgetter(name)(weak), known.get(name)
                if ours is None or not _same(held, attrgetter(name)(module)):
                    ours = _added(module, output, node, held)
                placed[name] = ours
            here[node] = placed[name]
        elif node.op == "call_module":
            here[node] = checks[str(node.target)]
        elif node.op != "output":
            with graph.inserting_before(output):
                here[node] = graph.node_copy(node, here.__getitem__)
    ours, spec = pytree.tree_flatten(output.args[0])
    theirs = [here[n] if isinstance(n, fx.Node) else n for n in pytree.tree_leaves(weak.graph.output_node().args[0])]
    emit = Emitter(graph, output)
    both = [_pushed(emit, a, b, scale) for a, b in zip(ours, theirs, strict=True)]
    output.args = (pytree.tree_unflatten(both, spec),)
    share_equal_nodes(module)
    remove_unused_nodes(module)
    prune_unused_state(module)
    graph.lint()
    module.recompile()
    return module, {name: str(node.target) for name, node in placed.items()}


def _refuse_what_happens_twice(strong: fx.GraphModule, weak: fx.GraphModule) -> None:
    called = [n for g in (strong, weak) for n in g.graph.nodes if n.op == "call_function"]
    if (changing := next(filter(writes, called), None)) is not None:
        raise RewriteError(
            f"the model writes to its state or to an input ({changing.name}), which two branches would do twice",
            hint="put it in evaluation mode, or wrap it in a module without that state",
        )
    if (drawing := next(filter(draws, called), None)) is not None:
        raise RewriteError(
            f"the model draws random numbers ({drawing.name}), and the two branches would draw different ones",
            hint="put it in evaluation mode, or give it its noise as an input",
        )


def _added(module: fx.GraphModule, before: fx.Node, node: fx.Node, held: Tensor | nn.Module) -> fx.Node:
    """A node of ``module`` that reads ``held``, as ``node`` does in another graph."""
    name = store(module, str(node.target), held)
    with module.graph.inserting_before(before):
        made = module.graph.get_attr(name)
    made.meta.update(node.meta)
    return made


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.device == b.device and torch.equal(a, b)


def _origin(strong: Compiled, weak: Compiled, module: fx.GraphModule, names: Mapping[str, str]) -> Origin:
    """The sites of the weak branch with the names that its weights have now, and what both branches told."""
    told, seconds = weak.origin.report, strong.origin.report.seconds
    report = replace(
        told,
        cpu_seconds=_measured(strong.module, module, weak.program.inputs),
        seconds={
            stage: seconds.get(stage, 0.0) + told.seconds.get(stage, 0.0) for stage in {**seconds, **told.seconds}
        },
        warnings=tuple(dict.fromkeys((*strong.origin.report.warnings, *told.warnings))),
    )
    live = stored(module)
    sites = (replace(s, parameters=live, projections=_renamed(s.projections, names)) for s in weak.origin.sites)
    return replace(weak.origin, report=report, sites=tuple(sites))


def _renamed(projections: Mapping[str, Projection], names: Mapping[str, str]) -> dict[str, Projection]:
    def now(name: str | None) -> str | None:
        return None if name is None else names.get(name, name)

    return {role: replace(p, weight=now(p.weight), bias=now(p.bias)) for role, p in projections.items()}


def _pushed(emit: Emitter, strong: object, weak: object, scale: float) -> object:
    if not (is_tensor(strong) and is_tensor(weak)) or not _is_pushed(value(strong)):
        return strong
    return emit.inline(lambda a, b: a + scale * (a - b), strong, weak)


def _is_pushed(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _verify(module: fx.GraphModule, strong: Compiled, weak: Compiled, scale: float) -> None:
    """The graph gives what the two models give.  Raises VerificationError."""
    args, kwargs = weak.program.inputs
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        got, a, b = (tensors(m(*args, **kwargs)) for m in (module, strong.module, weak.module))
    want = [x + scale * (x - y) if _is_pushed(x) else x for x, y in zip(a, b, strict=True)]
    apart = difference(got, want)
    if not apart <= ROOM * (1 + 2 * abs(scale)) * tolerance(want):
        raise VerificationError(
            f"the two branches together differ from each alone by {apart:.2g} (relative)", hint="report the model"
        )


def _measured(alone: fx.GraphModule, both: fx.GraphModule, inputs: CallInputs) -> Mapping[str, float]:
    """CPU seconds of one call of the model alone, and of both branches."""
    calls = {
        "before": partial(alone, *inputs.args, **inputs.kwargs),
        "after": partial(both, *inputs.args, **inputs.kwargs),
    }
    with torch.no_grad():
        times = interleaved(calls, ROUNDS)
    return {name: times.median(name) for name in ("before", "after")}
