"""Find every attention of a captured program: match, raise, prove, name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from attnopt.backends.attention_operator import ATTENTION, ATTENTION_WITH_LSE
from attnopt.base.debug import debugging
from attnopt.base.sizes import is_static, step
from attnopt.capture.flex_attention import is_flex, is_written_out, why_unread
from attnopt.capture.program import Program
from attnopt.errors import PeerError
from attnopt.graph.axes import resolve, resolve_all
from attnopt.graph.nodes import (
    ancestors,
    calls,
    dtype,
    get_attr,
    input_name,
    inputs_of,
    is_call,
    is_number,
    is_tensor,
    module_path,
    operand,
    opname,
    shape,
    source_line,
    stored,
    value,
)
from attnopt.graph.ops import Kind, of
from attnopt.ir.call_tensor import BATCH, KEYS, QUERIES
from attnopt.ir.operands import Operands
from attnopt.ir.projection import Projection
from attnopt.ir.refusal import Refusal
from attnopt.ir.site import Alignment, InputTensor, NearMiss, Site, TokenFeatures
from attnopt.match.anchors import Softmax, normalisers
from attnopt.match.chains import Chain, chains
from attnopt.match.escapes import where_used
from attnopt.match.fused import is_fused
from attnopt.match.masks import hides_keys, keeps_a_mask
from attnopt.match.pair_sums import write_products
from attnopt.match.projections import read_output, read_projection
from attnopt.match.prove import example_values, region_key, site_error, site_tolerance
from attnopt.match.raise_region import Raised, raise_region
from attnopt.match.recognize import recognise
from attnopt.match.region import Region
from attnopt.match.rejection import NotAttentionError
from attnopt.match.token_path import TokenPath, token_path
from attnopt.match.token_streams import positions, relation


@dataclass(frozen=True)
class Found:
    """A site with its position in the graph.  ``dirty``: the affected nodes of each role, between the core and the weights.
    ``path``: how keys and values come from tokens, or why other tokens could not take their place."""

    site: Site
    raised: Raised
    dirty: dict[str, tuple[fx.Node, ...]]
    output_op: fx.Node | None
    error: float
    path: TokenPath | Refusal


@dataclass(frozen=True)
class Rejected:
    """A softmax anchor that is no site: the first ``node`` that differs from an attention; ``near``: a near miss."""

    anchor: fx.Node
    refusal: Refusal
    node: fx.Node
    near: bool

    @property
    def told(self) -> NearMiss:
        return NearMiss(module_path(self.anchor), self.refusal, source_line(self.anchor))


@dataclass(frozen=True)
class Findings:
    """All findings, what was rejected, and the number of softmax anchors examined."""

    found: tuple[Found, ...]
    near_misses: tuple[NearMiss, ...]
    candidates: int
    rejected: tuple[Rejected, ...]


def find(program: Program) -> Findings:
    """Every attention of ``program``, in the order in which they run."""
    gm = program.module
    write_products(gm)
    examples = example_values(gm, *program.inputs)
    parameters = stored(gm)
    found: list[Found] = []
    near: list[NearMiss] = []
    rejected: list[Rejected] = []
    names: Counter[str] = Counter()
    proofs: dict[object, float] = {}
    softmaxes, unread = list(normalisers(gm.graph)), _unread(gm)
    for node, anchor in sorted(((_node_of(a), a) for a in (*softmaxes, *chains(gm.graph))), key=lambda pair: pair[0]):
        try:
            region = recognise(anchor)
            owner = _owner(region)
            name = owner if not names[owner] else f"{owner}#{names[owner] + 1}"
            raised = raise_region(gm, region, name)
            key = region_key(raised)
            if key not in proofs:
                proofs[key] = site_error(gm, raised, examples)
            error = proofs[key]
            if not error <= site_tolerance(raised):
                raise NotAttentionError(_not_equal(raised, error), raised.region.out.node)
            found.append(_describe(program, raised, name, parameters, error, examples))
            names[owner] += 1
        except NotAttentionError as e:
            if isinstance(anchor, Chain) and not e.near:
                continue  # two products are no candidate yet
            is_near = e.near or is_written_out(node)
            rejected.append(Rejected(node, e.refusal, e.node or node, is_near))
            if is_near:
                near.append(rejected[-1].told)
            else:
                near += [miss for n in _beside(node) for miss in _in_onnx_runtime(gm, n, every=True)[:1]]
        except PeerError:
            raise
        except Exception as e:
            if debugging() and not _is_empty(node):
                raise
            rejected.append(Rejected(node, _defeated(node, e), node, True))
            near.append(rejected[-1].told)
    mixed = {n for f in found for n in _inside_operands(f.raised.region)}
    rejected = [replace(r, near=False) if r.anchor in mixed else r for r in rejected]
    near = [miss for miss in near if all(miss != r.told for r in rejected if r.anchor in mixed)]
    return Findings(
        tuple(found), (*near, *unread), _candidates(softmaxes, found, rejected) + len(unread), tuple(rejected)
    )


def _node_of(anchor: Softmax | Chain | fx.Node) -> fx.Node:
    if isinstance(anchor, Chain):
        return anchor.second.node
    return anchor.weights if isinstance(anchor, Softmax) else anchor


def _candidates(softmaxes: Sequence[object], found: Sequence[Found], rejected: Sequence[Rejected]) -> int:
    """Softmax anchors, and attentions without one, found or nearly found."""
    nodes = {_node_of(a) for a in softmaxes if isinstance(a, (Softmax, fx.Node))}
    others = {f.raised.region.anchor for f in found if f.raised.region.linear is not None}
    return len(softmaxes) + len(others) + len({r.anchor for r in rejected} - nodes)


def _inside_operands(region: Region) -> Iterator[fx.Node]:
    """What computes a map that is part of an attention, or the features that take a softmax's place: a softmax in it is no other
    attention."""
    if region.mixture is not None:
        for o in region.mixture.operands:
            yield from ancestors(o.node, stop=is_number)
    if region.linear is not None:
        for o in (region.q, region.k):
            yield from ancestors(o.node, stop=lambda n: is_number(n) or calls(n, _PROJECTIONS))


def _unread(gm: fx.GraphModule) -> list[NearMiss]:
    """Attentions in a branch or a loop, and operators that are a whole attention."""
    found: list[NearMiss] = []
    for path, owner in gm.named_modules():
        if not isinstance(owner, fx.GraphModule):
            continue
        inside = {a.weights if isinstance(a, Softmax) else a for a in normalisers(owner.graph)} if path else set()
        for node in owner.graph.nodes:
            if node in inside:  # traced from generated code: the user's line is unknown
                hint = "remove the branch or loop from the model, or optimize the module inside it on its own"
                found.append(NearMiss(path, Refusal("in-a-region", "code that runs unconditionally", path, "", hint)))
            elif is_flex(node):
                if (unread := why_unread(node)) is not None:
                    found.append(NearMiss(module_path(node) or path, unread, source_line(node)))
            elif opname(node) == "onnx_nodes":
                found += _in_onnx_runtime(gm, node)
            elif node.op == "call_function" and not is_fused(node) and _is_whole(opname(node)):
                hint = "disable the inference fast path before capture: torch.backends.mha.set_fastpath_enabled(False)"
                if is_call(node, ATTENTION, ATTENTION_WITH_LSE):
                    hint = "optimize the original model with all of its passes"
                refusal = Refusal("opaque-operator", "supported operators", opname(node), source_line(node), hint)
                found.append(NearMiss(module_path(node) or path, refusal, source_line(node)))
    return found


def _beside(node: fx.Node) -> list[fx.Node]:
    """The nodes of a file executed by ONNX Runtime that produce the scores of a softmax, or read its weights."""
    above = [n.args[0] if opname(n) == "getitem" else n for n in node.all_input_nodes]
    return [n for n in (*above, *node.users) if isinstance(n, fx.Node) and opname(n) == "onnx_nodes"]


def _in_onnx_runtime(gm: fx.GraphModule, node: fx.Node, every: bool = False) -> list[NearMiss]:
    """Attentions and softmaxes of a file among the nodes executed by ONNX Runtime; ``every``: all these nodes."""
    from attnopt.base.ort_session import operator_kinds

    hint = "use the file before optimization or quantization, with no attention inside a branch or loop"
    model = get_attr(gm, str(operand(node).target))
    return [
        NearMiss(module_path(node), Refusal("opaque-operator", "supported operators", kind, "", hint))
        for kind in operator_kinds(model)
        if every or "attention" in kind.lower() or "softmax" in kind.lower()
    ]


def _is_whole(name: str) -> bool:
    return "attention" in name or "transformer_encoder" in name


def _not_equal(raised: Raised, error: float) -> Refusal:
    return Refusal(
        "not-equal",
        "the canonical attention to equal the model's own computation",
        f"a relative difference of {error:.2g}",
        source_line(raised.region.out.node),
        _BLIND if raised.hides_for_good else _GAP,
    )


_PROJECTIONS = of(Kind.PRODUCT, Kind.CONVOLUTION)
_GAP = "please report the model: this is a gap in matching, and the site was left unchanged"
_BLIND = f"if the example inputs mask every key of some query, as left padding does, pad on the right; otherwise {_GAP}"


def _defeated(node: fx.Node, e: Exception) -> Refusal:
    if _is_empty(node):
        return Refusal(
            "no-elements",
            "non-empty scores",
            f"scores of {' x '.join(map(str, shape(node)))}",
            source_line(node),
            "pass example inputs with at least one sequence and one token",
        )
    return Refusal(
        "not-understood",
        "a layout that the matcher supports",
        f"{type(e).__name__}: {e}",
        source_line(node),
        "please report the model: this is a gap in matching, and the attention was left unchanged",
    )


def _is_empty(node: fx.Node) -> bool:
    return 0 in shape(node)


def _owner(region: Region) -> str:
    """The deepest module in which both the core and the query projection run."""
    core = common_modules([module_path(n) for n in region.nodes if n.meta.get("nn_module_stack")] or [""])
    paths = [module_path(n) for n in _nearest_projections(region.q.node)]
    return ".".join(common_modules([".".join(core), *paths]) or core)


def common_modules(paths: Sequence[str]) -> list[str]:
    """The modules that all these paths begin with."""
    shared: list[str] = []
    for parts in zip(*(p.split(".") for p in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def _projects(node: fx.Node) -> bool:
    return calls(node, _PROJECTIONS)


def _nearest_projections(node: fx.Node) -> list[fx.Node]:
    found = [n for n in ancestors(node, stop=_projects) if _projects(n)]
    return found[:1] if len(found) == 1 else []


def _describe(
    program: Program,
    raised: Raised,
    name: str,
    parameters: dict[str, Tensor],
    error: float,
    examples: Mapping[fx.Node, Any],
) -> Found:
    gm, spec, region = program.module, raised.spec, raised.region
    operands, shapes = raised.operands, program.own_shapes
    projections: dict[str, Projection] = {}
    dirty: dict[str, tuple[fx.Node, ...]] = {}
    for role, heads in (("q", spec.num_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads)):
        features = 2 if spec.between_channels else 3
        projections[role], dirty[role] = read_projection(operands.given[role], 1, heads, role != "q", features)
    projections["out"], op = _read_out(raised)
    related = relation(operands.q, operands.k, operands.v, examples)
    spec = replace(spec, is_cross=related in ("other", "inputs-apart"), positions=positions(operands.q))
    notes: tuple[str, ...] = ()
    if related == "assumed":
        notes += ("queries, keys and values are three inputs of the same length: assumed to be one sequence",)
    if region.escapes:
        notes += (f"the attention weights are still computed, because they are {where_used(region)}",)
    if raised.hides_for_good:
        notes += (
            "queries with all keys masked (such as left padding under a causal mask) may differ from the "
            "model, which masks with a finite number",
        )
    if keeps_a_mask(gm, (operands.bias, operands.mask)):
        notes += ("the model's own mask is kept: no pattern was proven equal to it at every length",)
    path = _BETWEEN_CHANNELS if spec.between_channels else token_path(operands.k, operands.v)
    device = value(operands.q).device.type
    if device == "meta":
        notes += ("verified on random weights: on the meta device the model has none",)
    site = Site(
        name,
        spec,
        projections,
        source_line(region.out.node),
        notes,
        parameters=parameters,
        batch=shape(operands.q)[0],
        q_len=shape(operands.q)[2],
        kv_len=shape(operands.k)[2],
        is_dynamic=not (is_static(value(operands.q).shape[2]) and is_static(value(operands.k).shape[2])),
        bias_hides=hides_keys(gm, operands.bias),
        kv_step=step(value(operands.k).shape[2]),
        inputs={
            name: InputTensor(shapes.get(name, shape(n)), dtype(n))
            for n in inputs_of(gm.graph)
            if is_tensor(n) and (name := input_name(n))
        },
        own_sizes=_own_sizes(program, operands),
        device=device,
        features=_features(path),
        alignment=_ALIGNMENT.get(related, "first"),
    )
    return Found(site, replace(raised, spec=spec), dirty, op, error, path)


_BETWEEN_CHANNELS = Refusal("not-token-wise", "keys that are tokens", "channels, whose features are tokens")


def _features(path: TokenPath | Refusal) -> TokenFeatures:
    if isinstance(path, Refusal):
        return TokenFeatures(why=path)
    batch = value(path.k).shape[0]
    return TokenFeatures(path.width, int(batch) if is_static(batch) else None)


def _own_sizes(program: Program, operands: Operands[fx.Node]) -> dict[str, int]:
    q, k = value(operands.q).shape, value(operands.k).shape
    return {axis: program.own_size(n) for axis, n in ((BATCH, q[0]), (QUERIES, q[2]), (KEYS, k[2]))}


_ALIGNMENT: dict[str, Alignment] = {"past": "last", "apart": "none", "inputs-apart": "none"}


def _read_out(raised: Raised) -> tuple[Projection, fx.Node | None]:
    """The output projection, read from the region's own output: the canonical node is not connected yet."""
    region = raised.region
    return read_output(region.out.node, [_head_of(region, h) for h in range(raised.spec.num_heads)])


def _head_of(region: Region, head: int) -> dict[int, tuple[int, ...]]:
    """The selection of one head on the region's output; with a single head, of its features."""
    features = region.queries if region.between_channels else region.value_features
    wanted = resolve(region.heads) or resolve(features)
    index = dict.fromkeys(wanted, range(0)) if region.heads else {a: range(a.size) for a in wanted}
    for atom in reversed(resolve(region.heads)):
        head, here = divmod(head, atom.size)
        index[atom] = range(here, here + 1)
    chosen: dict[int, tuple[int, ...]] = {}
    for i, axis in enumerate(resolve_all(region.out.axes)):
        if not set(axis) & set(wanted):
            continue
        flat = [0]
        for atom in axis:
            flat = [f * atom.size + j for f in flat for j in index.get(atom, range(atom.size))]
        chosen[i] = tuple(flat)
    return chosen
