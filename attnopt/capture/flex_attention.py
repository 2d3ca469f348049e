"""Calls of torch's ``flex_attention``, expanded to operators that the matcher reads.

A call stays in the graph beside its expanded form until that is replaced: an attention that is not raised runs
the model's own kernel.  Semantics are those of torch's eager implementation: ``mask_mod`` decides, and the blocks of a
``BlockMask`` only say where to evaluate it.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from attnopt.graph.emitter import Emitter
from attnopt.graph.evaluate import evaluate, inputs_behind, is_plain, symbols
from attnopt.graph.nodes import arg, aten, dtype, is_call, opname, shape, source_line, value
from attnopt.ir.refusal import Refusal

KEPT = "attnopt.call"  # in ``meta`` of the result of a call and of its expansion: the name that links the two
_WHY = "attnopt.unread"  # in ``meta`` of a call that is not written out
_INDICES = 4  # batch, head, query and key


def is_flex(node: fx.Node) -> bool:
    return node.op == "call_function" and opname(node) == "flex_attention"


def write_out(gm: fx.GraphModule) -> bool:
    """Redirect users of a call to its expanded form; otherwise record the reason.  Returns whether any was expanded."""
    found = False
    for call in [n for n in gm.graph.nodes if is_flex(n)]:
        results = [u for u in call.users if u.users]
        if len(results) != 1 or not is_call(results[0], operator.getitem) or arg(results[0], 1) != 0:
            call.meta[_WHY] = "flex_attention whose log-sum-exp or maximum score is used"
            continue
        try:
            made = _written_out(gm, call, results[0])
        except Exception as e:  # a score_mod is any code of the user's
            call.meta[_WHY] = f"flex_attention whose score_mod or mask_mod cannot be read: {type(e).__name__}: {e}"
            continue
        if made is None:
            call.meta[_WHY] = "flex_attention whose BlockMask blocks and mask_mod hide different keys"
            continue
        results[0].replace_all_uses_with(made)
        made.meta[KEPT] = results[0].meta[KEPT] = results[0].name
        found = True
    return found


@contextmanager
def freshly_traced() -> Iterator[None]:
    """A call outside torch.compile is traced by dynamo, which remembers it from calls at other sizes, and then makes sizes
    symbolic that the export does not know."""
    library = sys.modules.get("torch.nn.attention.flex_attention")
    if library is None:
        yield
        return
    from torch._C._dynamo.eval_frame import reset_code

    inner = [c for c in library.flex_attention.__code__.co_consts if isinstance(c, CodeType)]
    for code in inner:
        reset_code(code)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield


def index_plainly(gm: fx.GraphModule) -> None:
    """``table[head, 0]`` in a score_mod or mask_mod, which dynamo wraps, as the operator that it is."""
    for mod in gm.children():
        if not isinstance(mod, fx.GraphModule):
            continue
        for node in list(mod.graph.nodes):
            if opname(node) == "flat_apply" and "ModIndex" in str(arg(node, 2)):
                table, *indices = node.args[3:]
                node.target, node.args = aten.index.Tensor, (table, indices)
            elif is_call(node, aten.detach_.default):
                node.target = aten.detach.default
            elif is_call(node, aten.lift_fresh_copy.default) and (held := _held(mod, node.args[0])) is not None:
                node.target, node.args = aten.full.default, ([], held.item())
                node.kwargs = {"dtype": held.dtype, "device": held.device}
        mod.graph.eliminate_dead_code()
        mod.recompile()
        for name in {name for name, _ in mod.named_buffers()} - {str(n.target) for n in mod.graph.nodes}:
            delattr(mod, name)


def _held(mod: fx.GraphModule, node: Any) -> Tensor | None:
    """The single number that the graph keeps as a tensor."""
    found = getattr(mod, str(node.target), None) if node.op == "get_attr" else None
    return found if isinstance(found, Tensor) and found.dim() == 0 and not isinstance(found, FakeTensor) else None


def why_unread(call: fx.Node) -> Refusal | None:
    """Why a call is not expanded; None if it is."""
    found = call.meta.get(_WHY)
    if found is None:
        return None
    hint = "return only the output, and build the BlockMask with create_block_mask"
    return Refusal("opaque-operator", "supported operators", found, source_line(call), hint)


def is_written_out(node: fx.Node) -> bool:
    """``node`` is part of the expanded form of a call."""
    return "call" in node.meta.get("attnopt", {})


def call_behind(node: fx.Node) -> fx.Node:
    """The result of the call that ``node`` represents; otherwise ``node`` itself."""
    name = node.meta.get(KEPT)
    return node if name is None else next(n for n in node.graph.nodes if n.meta.get(KEPT) == name and n is not node)


def restore_calls(gm: fx.GraphModule) -> None:
    """Restore calls whose expanded form is still in use; remove the others."""
    for result in [n for n in gm.graph.nodes if KEPT in n.meta and is_call(n, operator.getitem)]:
        form = call_behind(result)
        form.replace_all_uses_with(result)
        for node in (form, result):
            del node.meta[KEPT]
        if result.users:
            continue
        call = result.args[0]
        assert isinstance(call, fx.Node)
        gm.graph.erase_node(result)
        mods = [n for n in call.all_input_nodes if n.op == "get_attr" and len(n.users) == 1]
        gm.graph.erase_node(call)
        for mod in mods:
            if not mod.users and isinstance(getattr(gm, str(mod.target), None), fx.GraphModule):
                gm.graph.erase_node(mod)
                gm.delete_submodule(str(mod.target))


def _written_out(gm: fx.GraphModule, call: fx.Node, result: fx.Node) -> fx.Node | None:
    """The operators of torch's eager implementation; None if the blocks hide what the mask shows."""
    q, k, v, score_mod, block_mask, scale, _, captured, mask_captured = (arg(call, i) for i in range(9))
    if not isinstance(scale, (int, float)):
        raise TypeError(f"a scale of {scale}")
    emit = Emitter(gm.graph, result, {"call": result.name})
    k, v = (_as_many(emit, t, q) for t in (k, v))
    wide = torch.float64 if dtype(q) == torch.float64 else torch.float32
    product = emit.call(aten.matmul.default, _cast(emit, q, wide), emit.call(aten.mT.default, _cast(emit, k, wide)))
    scores = emit.call(aten.mul.Tensor, product, float(scale))
    device = value(q).device
    sizes = [emit.size(q, 0), emit.size(q, 1), emit.size(q, 2), emit.size(k, 2)]
    grid = [emit.call(aten.arange.default, size, device=device) for size in sizes]
    seen = _on_grid(emit, _module(gm, block_mask[-1]), (), grid, mask_captured)
    while is_call(seen, aten.expand.default):
        seen = seen.args[0]  # type: ignore[assignment]
    if _blocks_disagree(gm, block_mask, scores, seen):
        return None
    modified = _on_grid(emit, _module(gm, score_mod), (scores,), grid, captured)
    for size in [u for u in scores.users if is_call(u, aten.sym_size.int)]:  # which need no scores
        size.replace_all_uses_with(sizes[arg(size, 1)])
    hidden = emit.call(aten.bitwise_not.default, seen)
    modified = emit.call(aten.masked_fill.Scalar, modified, hidden, -math.inf)
    weights = _cast(emit, emit.call(aten._safe_softmax.default, modified, -1), dtype(q))
    return emit.call(aten.matmul.default, weights, _cast(emit, v, dtype(q)))


def _module(gm: fx.GraphModule, node: Any) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = operator.attrgetter(str(node.target))(gm)
    return found


def _on_grid(
    emit: Emitter, mod: Callable[..., Tensor], leading: tuple[fx.Node, ...], grid: list[fx.Node], captured: Any
) -> fx.Node:
    """``mod`` of every batch, head, query and key; ``leading`` tensors have these axes."""
    for axis in reversed(range(_INDICES)):
        places = [0 if axis == i else None for i in range(_INDICES)]
        mod = torch.vmap(mod, (*(0 for _ in leading), *places, *(None for _ in captured)))
    made = emit.inline(mod, *leading, *grid, *captured, pre_dispatch=False)
    for node in [
        n for n in emit.graph.nodes if is_call(n, aten._to_copy.default) and isinstance(n.args[0], (int, float))
    ]:
        number: Any = node.args[0]
        node.replace_all_uses_with(number)  # vmap's form of a number next to tensors
        emit.graph.erase_node(node)
    return made


def _as_many(emit: Emitter, t: fx.Node, q: fx.Node) -> fx.Node:
    """Keys or values for every sequence and head of the queries."""
    repeats = shape(q)[1] // shape(t)[1]
    if repeats > 1:
        t = emit.call(aten.repeat_interleave.self_int, t, repeats, 1)
    if shape(t)[0] != shape(q)[0]:
        t = emit.call(aten.expand.default, t, [emit.size(q, 0), -1, -1, -1])
    return t


def _cast(emit: Emitter, node: fx.Node, kind: torch.dtype) -> fx.Node:
    return node if dtype(node) == kind else emit.call(aten._to_copy.default, node, dtype=kind)


def _blocks_disagree(gm: fx.GraphModule, block_mask: Any, scores: fx.Node, seen: fx.Node) -> bool:
    """Skipped blocks hide what ``seen`` shows, or full blocks show what it hides, as far as both are known."""
    tables = [n for n in block_mask[2:6] if isinstance(n, fx.Node)]
    if any(inputs_behind(n) or not is_plain(n) for n in (*tables, seen)):
        return False
    sizes, (rows, columns) = symbols(gm.graph), shape(scores)[-2:]
    counts, indices, *whole = (evaluate(gm, n, sizes) for n in tables)
    visible = (
        evaluate(gm, seen, sizes).expand(1, 1, rows, columns) if len(shape(seen)) < 3 else evaluate(gm, seen, sizes)
    )
    row = torch.arange(rows) // block_mask[-3]
    column = torch.arange(columns) // block_mask[-2]

    def listed(counts: Tensor, indices: Tensor) -> Tensor:
        """[B, H, L, S]"""
        blocks = torch.arange(indices.shape[-1])
        chosen = (indices.unsqueeze(-1) == blocks) & (blocks < counts.unsqueeze(-1)).unsqueeze(-1)
        return chosen.any(-2)[..., row[:, None], column]

    full = listed(*whole) if whole else torch.zeros(())
    asked = listed(counts, indices) | full.bool()
    return bool((visible & ~asked).any()) or bool((full.bool() & ~visible).any())
