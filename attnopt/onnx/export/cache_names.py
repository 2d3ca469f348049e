"""File names of cache tensors: input ``past_key_values.0.key``, output ``present.0.key``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from attnopt.base.trees import Path
from attnopt.capture.flat_call import Form
from attnopt.compiler.origin import Origin
from attnopt.graph.cleanup import remove_unused_nodes
from attnopt.graph.copies import copy_program
from attnopt.graph.nodes import ancestors, inputs_of, value

if TYPE_CHECKING:
    import onnx_ir as ir

PAST, PRESENT = "past_key_values", "present"
_SIDES = {"self_attention_cache": "decoder", "cross_attention_cache": "encoder"}
_RETURNED = "_orig"  # torch's suffix for an input that is also an output
_SINGULAR = {"keys": "key", "values": "value"}


@dataclass(frozen=True)
class Names:
    """``inputs``: those in objects, by graph name; ``plain``: the others.  ``outputs``: all, in order."""

    inputs: dict[str, str]
    plain: frozenset[str]
    outputs: tuple[str, ...]

    def give(self, graph: ir.Graph) -> None:
        """Rename, and drop unused inputs in objects."""
        for x in list(graph.inputs):
            if str(x.name).removesuffix(_RETURNED) in self.plain:
                x.name = str(x.name).removesuffix(_RETURNED)
            elif x.name in self.inputs:
                if not x.uses() and not x.is_graph_output():
                    graph.inputs.remove(x)
                x.name = self.inputs[x.name]
        for x, name in zip(graph.outputs, self.outputs, strict=True):
            x.name = name


def with_names(gm: fx.GraphModule, origin: Origin) -> tuple[fx.GraphModule, Names | None]:
    """The graph without outputs that the file does not need: constants of objects, and numbers that no input continues."""
    form = origin.form
    if form is None:
        return gm, None
    placeholders = inputs_of(gm.graph)
    inside = [i for i, n in enumerate(placeholders) if _is_inside(form, i)]
    counted = {form.inputs.paths[i] for i in inside if isinstance(value(placeholders[i]), torch.SymInt)}
    leaves = pytree.tree_leaves(gm.graph.output_node().args[0])
    kept = [i for i, leaf in enumerate(leaves) if _is_needed(form, i, leaf, counted)]
    made = _returning(gm, kept, [0] * len(kept))
    names = [_dotted(form.inputs.paths[i][:1], form.inputs.paths[i], 1) for i in inside]
    roots = [form.results.paths[i][: form.results.outer[i]] for i in kept]
    several = len({roots[k] for k, i in enumerate(kept) if not _is_plain(form, i)}) > 1
    outputs = [_output(form, i, root, several) for i, root in zip(kept, roots, strict=True)]
    taken = {n.name for n in placeholders} | set(names)
    renamed = dict(zip([placeholders[i].name for i in inside], names, strict=True))
    plain = frozenset(n.name for n in placeholders if n.name not in renamed)
    return made, Names(renamed, plain, _distinct(outputs, taken))


def without_caches(gm: fx.GraphModule, origin: Origin) -> fx.GraphModule:
    """The graph without outputs that are parts of objects, such as the model's own cache."""
    form = origin.form
    if form is None:
        return gm
    plain = [i for i in range(len(form.results.paths)) if _is_plain(form, i)]
    return _returning(gm, plain, {_output(form, i, (), False): 0 for i in plain})


def _returning(gm: fx.GraphModule, kept: Sequence[int], form: Any) -> fx.GraphModule:
    """A copy with these outputs only, in a structure like ``form``."""
    made, _ = copy_program(gm)
    node = made.graph.output_node()
    leaves = pytree.tree_leaves(node.args[0])
    spec = pytree.tree_structure(form)
    node.args = (tuple(leaves[i] for i in kept),)
    made.graph._codegen.pytree_info = made.graph._codegen.pytree_info._replace(out_spec=spec)  # type: ignore[attr-defined]
    made._out_spec = spec
    remove_unused_nodes(made)
    return made


def _is_inside(form: Form, place: int) -> bool:
    return form.inputs.is_inside(place)


def _is_plain(form: Form, place: int) -> bool:
    return form.results.outer[place] == len(form.results.paths[place])


def _is_needed(form: Form, place: int, leaf: object, counted: set[Path]) -> bool:
    if not isinstance(leaf, fx.Node) or _is_plain(form, place):
        return isinstance(leaf, fx.Node)
    if not isinstance(value(leaf), Tensor):
        return form.results.paths[place] in counted
    return any(n.op == "placeholder" for n in ancestors(leaf))


def _output(form: Form, place: int, root: Path, several: bool) -> str:
    path, outer = form.results.paths[place], form.results.outer[place]
    if _is_plain(form, place):
        return "_".join(map(str, path)) or "output"
    name = "_".join(map(str, root)) or PAST
    start = PRESENT if name == PAST or not several else f"{PRESENT}_{name}"
    return _dotted((start,), path, outer)


def _dotted(start: Path, path: Path, outer: int) -> str:
    """The number of the layer first, as everybody writes it; then the side of an encoder-decoder; keys and values in the
    singular."""
    inner = [p for p in path[outer:] if p != "layers"]
    sides = [_SIDES[p] for p in inner if p in _SIDES]
    rest = [p for p in inner if p not in _SIDES]
    if rest and isinstance(rest[0], int):
        rest[1:1] = sides
    else:
        rest[:0] = sides
    if rest:
        rest[-1] = _SINGULAR.get(rest[-1], rest[-1])
    return ".".join(map(str, (*start, *rest)))


def _distinct(names: Sequence[str], taken: set[str]) -> tuple[str, ...]:
    made: list[str] = []
    for name in names:
        new, count = name if not name.isdigit() else f"output_{name}", 1
        while new in taken or new in made:
            count += 1
            new = f"{name}_{count}"
        made.append(new)
    return tuple(made)
