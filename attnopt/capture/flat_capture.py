"""Capture of a model with objects among its inputs and outputs: their contents, and what a call changes in them."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.export import Dim

from attnopt.base.call_inputs import CallInputs
from attnopt.base.containers import Build, Walk, copied
from attnopt.base.object_fields import NUMBERS, is_object
from attnopt.base.object_template import Leaf, Part
from attnopt.base.trees import Path, mapped
from attnopt.capture.dynamic_axes import arguments_by_name
from attnopt.capture.flat_call import (
    Args,
    Form,
    InputForm,
    Parts,
    Results,
    as_given,
    inner_path,
    labels_of,
    put_together,
    take,
)
from attnopt.capture.signature import Signature

Container = list[object] | dict[object, object]


@dataclass
class Calls:
    """The calls of a model during capture.  ``form`` is known after tracing; None without objects."""

    inputs: InputForm | None = None
    results: Results | None = field(default=None, init=False)

    @classmethod
    def of(cls, model: nn.Module, args: Args, kwargs: Mapping[str, object], run: Callable[..., object] | None) -> Calls:
        """``run`` calls a model without changing it: once, with copies, if objects or lists are passed
        in; None for a model that cannot be run."""
        found = _inputs_of(model, args, kwargs)
        if found is None:
            return cls(None)
        changes_lists = any(isinstance(x, (list, dict)) for x in (*args, *kwargs.values()))
        if run is None or not (found.has_objects or changes_lists):
            return cls(found)
        found = _watched(model, found, args, kwargs, run)
        return cls(found)

    @property
    def form(self) -> Form | None:
        if self.inputs is None or self.results is None:
            return None
        is_plain = not (
            self.inputs.has_objects or self.results.objects or self.results.has_state or self.results.states
        )
        return None if is_plain else Form(self.inputs, self.results)

    @property
    def has_objects(self) -> bool:
        return self.inputs is not None and self.inputs.has_objects

    def flat(self, given: CallInputs) -> CallInputs:
        if self.inputs is None or not self.inputs.has_objects:
            return given
        return take(self.inputs, *given).inputs

    @contextmanager
    def traced(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model as torch.export calls it: with leaves for objects, and leaves of objects for its outputs."""
        if self.inputs is None:
            yield model
            return
        inputs, forward, before = self.inputs, model.forward, vars(model).get("forward")

        @functools.wraps(forward)
        def flat(*args: object, **kwargs: object) -> object:
            own_args, own_kwargs, build, leaves = put_together(inputs, args, kwargs, clones=True)
            out, self.results = _apart(inputs, forward(*own_args, **own_kwargs), build, leaves)
            return out

        flat.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        model.forward = flat
        try:
            yield model
        finally:
            if before is None:
                del model.forward
            else:
                model.forward = before


def _inputs_of(
    model: nn.Module, args: Args, kwargs: Mapping[str, object], found: InputForm | None = None
) -> InputForm | None:
    """The objects among the inputs; ``found``: what is known so far; None if they do not fit the model."""
    names = tuple(n for p in (Signature.of(model.forward, args, kwargs),) for n in (*p.positional, *p.keywords))
    if len(set(names)) != len(args) + len(kwargs):
        return None
    made = found or InputForm(names, len(args), (), (), ())
    walk, places = Walk(counters=made.counters), list[tuple[Path, Part]]()

    def look(x: object, path: Path) -> None:
        places.append((path, walk.part(x, path) if made.stop(x, path) else walk.leaf(x, path)))

    mapped(made.named(args, kwargs), made.stop, look)
    return replace(made, places=tuple(places), nodes=tuple(walk.nodes), paths=tuple(walk.paths))


def _watched(
    model: nn.Module, inputs: InputForm, args: Args, kwargs: Mapping[str, object], run: Callable[..., object]
) -> InputForm:
    """The inputs with everything that a call of the model changes in them: lists, numbers and tensors."""
    own = copied(inputs.named(args, kwargs))
    lists = {path: list(_content(x)) for path, x in _lists(own)}
    before = _numbers(own)
    tensors = [(path, x, x._version) for path, x in _tensors(own)]
    sizes = {path: tuple(x.shape) for path, x, _ in tensors}
    run(model, *inputs.split(own))
    after = _numbers(own)
    changed = frozenset(path for path, x in before.items() if path in after and after[path] != x)
    stops = {path for path, x in _lists(own) if not _same_objects(lists[path], list(_content(x)))}
    stops = {p for p in stops if not any(p != q and p[: len(q)] == q for q in stops)}
    found = _inputs_of(model, args, kwargs, replace(inputs, stops=frozenset(stops), counters=changed))
    assert found is not None
    written = {path for path, x, version in tensors if x._version != version}
    inside = {path for path, part in found.places if isinstance(part, Leaf)}
    return replace(
        found,
        writes=tuple(i for i, path in enumerate(found.paths) if path in written - inside),
        varying=_varying(sizes, {path: tuple(x.shape) for path, x in _tensors(own)}, inside),
    )


def _varying(
    before: Mapping[Path, tuple[int, ...]], after: Mapping[Path, tuple[int, ...]], plain: set[Path]
) -> frozenset[tuple[Path, int]]:
    """Axes in objects that grow in the call, or that have the length of an input axis: its batch, or its mask."""
    given = [sizes for path, sizes in before.items() if path in plain and sizes]
    batch = {sizes[0] for sizes in given}
    lengths = {size for sizes in given for size in sizes[1:]}
    found: set[tuple[Path, int]] = set()
    for path, sizes in before.items():
        later = after.get(path, sizes)
        for axis, size in enumerate(sizes):
            is_batch = size in batch and size not in sizes[:axis]
            grows = len(later) == len(sizes) and later[axis] != size
            if is_batch or grows or size in lengths:
                found.add((path, axis))
    return frozenset(found)


def _tensors(tree: object) -> list[tuple[Path, Tensor]]:
    walk = Walk()
    mapped(tree, lambda x, _: is_object(x), lambda x, p: walk.part(x, p) if is_object(x) else walk.leaf(x, p))
    return [(path, x) for path, x in zip(walk.paths, walk.leaves, strict=True) if isinstance(x, Tensor)]


def _lists(tree: object) -> list[tuple[Path, Container]]:
    """The lists and dicts of a tree of values, except that of the arguments themselves."""
    found: list[tuple[Path, Container]] = []

    def look(x: object, path: Path) -> bool:
        if path and isinstance(x, (list, dict)) and not is_object(x) and type(x) in (list, dict):
            found.append((path, x))
        return is_object(x)

    mapped(tree, look, lambda x, _: x)
    return found


def _content(x: Container) -> list[object]:
    return [i for pair in x.items() for i in pair] if isinstance(x, dict) else list(x)


def _same_objects(now: list[object], before: list[object]) -> bool:
    return len(now) == len(before) and all(
        a is b or (not isinstance(a, Tensor) and type(a) is type(b) and isinstance(a, (int, float, str)) and a == b)
        for a, b in zip(now, before, strict=True)
    )


def _numbers(tree: object) -> dict[Path, int]:
    walk, plain = Walk(), dict[Path, object]()

    def look(x: object, path: Path) -> object:
        if is_object(x):
            return walk.part(x, path)
        plain[path] = x
        return None

    mapped(tree, lambda x, _: is_object(x), look)
    return {p: x for p, x in {**plain, **walk.fixed}.items() if isinstance(x, int) and not isinstance(x, bool)}


def _apart(inputs: InputForm, out: object, build: Build, leaves: list[object]) -> tuple[object, Results]:
    """The output with its objects replaced by their tensors, and what is needed to rebuild them."""
    objects = [build.made[i] for i in range(len(inputs.nodes))]
    passed = {id(x): i for i, x in enumerate(leaves) if isinstance(x, (Tensor, *NUMBERS))}
    walk = Walk(given={id(x): i for i, x in enumerate(objects)}, passed=passed)
    parts, outer = list[Part](), list[int]()

    def stop(x: object, _: Path) -> bool:
        return is_object(x) or id(x) in walk.given

    def look(x: object, path: Path) -> object:
        if not stop(x, path):
            walk.leaf(x, path)
            outer.append(len(path))
            return x
        start = len(walk.leaves)
        parts.append(walk.part(x, path))
        outer.extend([len(path)] * (len(walk.leaves) - start))
        labels = labels_of([p[len(path) :] for p in walk.paths[start:]])
        return Parts(zip(labels, walk.leaves[start:], strict=True))

    made = mapped(out, stop, look)
    visible = len(walk.leaves)
    states = [(i, walk.node(x, inputs.homes[i])) for i, x in enumerate(objects)]
    changed = tuple((i, node) for i, node in states if node != as_given(inputs.nodes[i]))
    writes = tuple((i, walk.leaf(leaves[i], inputs.paths[i]).place) for i in inputs.writes)
    outer += [len(p) - len(inner_path(p, inputs.places)) for p in walk.paths[visible:]]
    results = Results(tuple(walk.nodes), tuple(parts), changed, writes, tuple(walk.paths), tuple(outer), visible)
    if results.has_state:
        made = (made, Parts(zip(labels_of(walk.paths[visible:]), walk.leaves[visible:], strict=True)))
    return made, results


def shapes_for(
    calls: Calls, model: nn.Module, args: Args, kwargs: Mapping[str, object], shapes: object, auto: bool
) -> object:
    """Dynamic shapes for the leaves of objects: a shape given for an object applies to every tensor in it.

    ``auto``: every axis that may vary, and every number that the call changes."""
    inputs = calls.inputs
    if inputs is None or not isinstance(shapes, Mapping):
        return shapes
    flat_args, flat_kwargs = calls.flat(CallInputs(args, dict(kwargs)))
    flat, own = arguments_by_name(model.forward, flat_args, flat_kwargs), arguments_by_name(model.forward, args, kwargs)
    leaves = {label: i for i, label in enumerate(inputs.labels)}

    def spread(x: object, apart: Any, asked: object) -> object:
        if is_object(x) or (isinstance(apart, dict) and not isinstance(x, dict)):
            return {label: _of_leaf(inputs, leaves[label], leaf, asked, auto) for label, leaf in apart.items()}
        if isinstance(x, (list, tuple)) and isinstance(asked, (list, tuple)):
            return type(asked)(spread(*i) for i in zip(x, apart, asked, strict=True))
        if isinstance(x, dict) and isinstance(asked, dict):
            made = {k: spread(x[k], apart[k], asked.get(k)) for k in x}
            return (
                made if type(x) in (dict, OrderedDict, defaultdict) else list(made.values())
            )  # torch knows no names there
        return asked

    unknown = {name: asked for name, asked in shapes.items() if name not in own}  # torch says so
    return {name: spread(x, flat[name], shapes.get(name)) for name, x in own.items()} | unknown


def _of_leaf(inputs: InputForm, place: int, leaf: object, asked: Any, auto: bool) -> object:
    path = inputs.paths[place]
    if auto and isinstance(leaf, Tensor):
        return {axis: Dim.AUTO for axis in range(leaf.dim()) if (path, axis) in inputs.varying} or None
    for key in inner_path(path, inputs.places):
        if (isinstance(asked, (list, tuple)) and isinstance(key, int)) or (
            isinstance(asked, Mapping) and isinstance(asked.get(key, 0), (Mapping, list, tuple, type(None)))
        ):
            asked = asked[key]
    if not isinstance(leaf, Tensor):
        return Dim.AUTO if path in inputs.counters and (auto or asked) else None
    if not isinstance(asked, Mapping):
        return None
    return {axis: dim for axis, dim in asked.items() if isinstance(axis, int) and axis < leaf.dim()} or None
