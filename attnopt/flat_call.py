"""A call with objects among its inputs and outputs, such as caches, as a graph can make it: with their tensors alone.

A graph takes and returns tensors.  Here objects are taken apart on the way in, put together on the way out, and what the call
changes in the caller's own objects is written there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from attnopt.containers import (
    NUMBERS,
    Build,
    Fixed,
    Given,
    Leaf,
    Made,
    Match,
    Node,
    Part,
    Passed,
    Path,
    Walk,
    copied,
    is_object,
    mapped,
    text,
)
from attnopt.errors import CaptureError

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class OtherObjectsError(CaptureError):
    """The model makes other objects of these inputs than it did when it was captured."""


class Parts(dict[str, Any]):
    """The tensors of one object, in a graph's output."""


pytree.register_pytree_node(
    Parts,
    lambda x: (list(x.values()), list(x)),
    lambda values, names: Parts(zip(names, values, strict=True)),
    serialized_type_name="attnopt.Parts",
    to_dumpable_context=lambda names: names,
    from_dumpable_context=lambda names: names,
    flatten_with_keys_fn=lambda x: ([(pytree.MappingKey(k), v) for k, v in x.items()], list(x)),
)


@dataclass(frozen=True)
class Inputs:
    """What stands among the inputs: ``places`` are the leaves of the tree of arguments, ``paths`` those of its tensors.

    ``writes``: leaves into which the call writes.  ``counters``: numbers that the call changes.  ``varying``: axes of leaves
    that other calls may give other sizes."""

    names: tuple[str, ...]
    positional: int
    places: tuple[tuple[Path, Part], ...]
    nodes: tuple[Node, ...]
    paths: tuple[Path, ...]
    stops: frozenset[Path] = frozenset()
    writes: tuple[int, ...] = ()
    counters: frozenset[Path] = frozenset()
    varying: frozenset[tuple[Path, int]] = frozenset()

    @property
    def has_objects(self) -> bool:
        return any(isinstance(part, Made) for _, part in self.places)

    def stop(self, x: Any, path: Path) -> bool:
        return path in self.stops or is_object(x)

    def named(self, args: Args, kwargs: Mapping[str, Any]) -> Kwargs:
        return dict(zip(self.names, (*args, *(kwargs[n] for n in self.names[self.positional :])), strict=True))

    def split(self, named: Mapping[str, Any]) -> tuple[Args, Kwargs]:
        values = list(named.items())
        return tuple(v for _, v in values[: self.positional]), dict(values[self.positional :])

    def is_inside(self, place: int) -> bool:
        """The leaf is part of an object."""
        return self.paths[place] not in {path for path, part in self.places if isinstance(part, Leaf)}

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Names for the leaves of objects."""
        return _labels([_inner(path, self.places) for path in self.paths])

    @functools.cached_property
    def homes(self) -> dict[int, Path]:
        """Where each object was met first."""
        found: dict[int, Path] = {}

        def look(part: Part, path: Path) -> None:
            if isinstance(part, Made) and part.place not in found:
                found[part.place] = path
                for key, inner in self.nodes[part.place].parts():
                    look(inner, (*path, key))

        for path, part in self.places:
            look(part, path)
        return found


@dataclass(frozen=True)
class Results:
    """What the call gives: ``objects`` among its outputs, ``states`` of the caller's objects that it changes, ``writes`` from
    its leaves to the inputs'.  ``paths`` are those of its leaves, ``outer`` how much of each leads to the object it is in."""

    nodes: tuple[Node, ...]
    objects: tuple[Part, ...]
    states: tuple[tuple[int, Node], ...]
    writes: tuple[tuple[int, int], ...]
    paths: tuple[Path, ...]
    outer: tuple[int, ...]
    visible: int  # leaves of the output; the others are of states and writes

    @property
    def has_state(self) -> bool:
        return len(self.paths) > self.visible


@dataclass(frozen=True)
class Taken:
    """One call's inputs, taken apart."""

    args: Args
    kwargs: Kwargs
    objects: tuple[Any, ...]
    leaves: tuple[Any, ...]


@dataclass(frozen=True)
class Form:
    """How a graph stands for a call with objects."""

    inputs: Inputs
    results: Results

    def take(self, args: Args, kwargs: Mapping[str, Any]) -> Taken:
        """The inputs as the graph takes them.  Raises CaptureError where they are not built as the example was."""
        return take(self.inputs, args, kwargs)

    def give(self, out: Any, taken: Taken) -> Any:
        """The model's own output, made of the graph's; the caller's own objects are brought up to date."""
        leaves = _kept_apart(pytree.tree_leaves(out), self.results, taken)
        build = Build(self.results.nodes, leaves, taken.objects, taken.leaves)
        parts, plain = iter(self.results.objects), iter(leaves)

        def back(x: Any, _: Path) -> Any:
            if not isinstance(x, Parts):
                return next(plain)
            for _ in x:
                next(plain)
            return build.part(next(parts))

        made = mapped(out[0] if self.results.has_state else out, lambda x, _: isinstance(x, Parts), back)
        for place, node in self.results.states:
            build.fill(taken.objects[place], node)
        with torch.no_grad():
            for to, place in self.results.writes:
                taken.leaves[to].copy_(leaves[place])
        return made

    def run(self, model: nn.Module, args: Args, kwargs: Mapping[str, Any]) -> list[Any]:
        """The graph's leaves as the model itself gives them, from inputs as the graph takes them.

        Raises OtherObjectsError where the model makes other objects of them than when it was captured."""
        own_args, own_kwargs, build, leaves = _put_together(self.inputs, args, kwargs)
        versions = [_version(x) for x in leaves]
        out = model(*own_args, **own_kwargs)
        try:
            return self._leaves(out, build, leaves, versions)
        except CaptureError as e:
            raise OtherObjectsError(str(e).partition("\n")[0], hint="optimize with example inputs of this size") from None

    def _leaves(self, out: Any, build: Build, leaves: list[Any], versions: list[int]) -> list[Any]:
        objects = [build.made[i] for i in range(len(self.inputs.nodes))]
        match = Match(self.results.nodes, objects, leaves, ignores_dtypes=True)
        known = {id(x) for x in objects}
        parts = iter(self.results.objects)

        def look(x: Any, path: Path) -> None:
            if not (is_object(x) or id(x) in known):
                match.leaves[len(match.leaves)] = x
            elif (part := next(parts, None)) is not None:
                match.part(part, x, path)

        mapped(out, lambda x, _: is_object(x) or id(x) in known, look)
        states = dict(self.results.states)
        for place, node in enumerate(self.inputs.nodes):
            match.node(states.get(place, _as_given(node)), objects[place], self.inputs.homes[place])
        for to, place in self.results.writes:
            match.leaves[place] = leaves[to]
        for place, (x, before) in enumerate(zip(leaves, versions, strict=True)):
            if _version(x) != before and place not in self.inputs.writes:
                raise CaptureError(f"{text(self.inputs.paths[place])} is written to, which it was not when captured")
        return [match.leaves[i] for i in range(len(self.results.paths))]


def _version(x: Any) -> int:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _as_given(node: Node) -> Node:
    """What an object holds that a call leaves as it is."""

    def same(part: Part) -> Part:
        match part:
            case Leaf(place):
                return Passed(place)
            case Made(place):
                return Given(place)
        return part

    return Node(
        node.kind,
        tuple((name, same(part)) for name, part in node.attributes),
        tuple((key, same(part)) for key, part in node.items),
    )


def take(inputs: Inputs, args: Args, kwargs: Mapping[str, Any]) -> Taken:
    match = Match(inputs.nodes)
    places = iter(inputs.places)

    def apart(x: Any, path: Path) -> Any:
        wanted, part = next(places, (None, None))
        if part is None or path != wanted or isinstance(part, Leaf) == inputs.stop(x, path):
            raise CaptureError(
                f"{text(path)} is {type(x).__name__}, and the example had other values there",
                hint="pass inputs of the same structure as the example's",
            )
        if isinstance(part, Leaf):
            match.leaves[part.place] = x
            return x
        known = set(match.leaves)
        match.part(part, x, path)
        return {inputs.labels[i]: x for i, x in match.leaves.items() if i not in known}

    flat = mapped(inputs.named(args, kwargs), inputs.stop, apart)
    if next(places, None) is not None:
        raise CaptureError(
            f"called with {len(match.leaves)} values, captured with {len(inputs.paths)}",
            hint="pass inputs of the same structure as the example's",
        )
    leaves = tuple(match.leaves[i] for i in range(len(inputs.paths)))
    _check_apart(inputs, leaves)
    objects = tuple(match.objects[i] for i in range(len(inputs.nodes)))
    return Taken(*inputs.split(flat), objects, leaves)


def _check_apart(inputs: Inputs, leaves: tuple[Any, ...]) -> None:
    """A graph writes into one tensor at a time: what lies in the same memory would keep what it held."""
    for i in inputs.writes:
        for j, other in enumerate(leaves):
            if i != j and isinstance(other, Tensor) and _overlap(leaves[i], other):
                raise CaptureError(
                    f"{text(inputs.paths[i])} is written to, and shares its memory with {text(inputs.paths[j])}",
                    hint="give the two tensors memory of their own",
                )


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or not a.numel() or not b.numel() or a.is_meta or b.is_meta:
        return False
    (first, end), (other, other_end) = _extent(a), _extent(b)
    return first < other_end and other < end


def _extent(t: Tensor) -> tuple[int, int]:
    steps = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (steps + 1) * t.element_size()


def _kept_apart(leaves: list[Any], results: Results, taken: Taken) -> list[Any]:
    """The graph may return what it was given: before that is written to, other results get memory of their own."""
    written = [taken.leaves[to] for to, _ in results.writes]
    return [
        x.clone() if isinstance(x, Tensor) and any(_overlap(x, w) for w in written) else x for x in leaves
    ]


def _put_together(inputs: Inputs, args: Args, kwargs: Mapping[str, Any], clones: bool = False) -> Any:
    """(args, kwargs) of the model itself, what they were made with, and their leaves."""
    named = inputs.named(args, kwargs)
    leaves = pytree.tree_leaves(named)
    if clones:  # so that the graph reads its inputs and does not write them
        leaves = [x.clone() if i in inputs.writes else x for i, x in enumerate(leaves)]
    build, parts = Build(inputs.nodes, leaves), dict(inputs.places)

    def back(_: Any, path: Path) -> Any:
        return build.part(parts[path])

    own = mapped(named, lambda _, path: path in parts, back)
    return *inputs.split(own), build, leaves


def _labels(paths: list[Path]) -> tuple[str, ...]:
    """A name for each path that is one in Python, all different."""
    made: dict[str, None] = {}
    for path in paths:
        name = base = "_".join("".join(c if c.isalnum() else "_" for c in str(p)) for p in path) or "value"
        count = 1
        while name in made:
            count += 1
            name = f"{base}_{count}"
        made[name] = None
    return tuple(made)


def _inner(path: Path, places: tuple[tuple[Path, Part], ...]) -> Path:
    """The path inside the object, after that of the argument."""
    outer = [p for p, part in places if isinstance(part, Made) and path[: len(p)] == p]
    return path[max(map(len, outer)) :] if outer else path


@dataclass
class Calls:
    """A model's calls while it is captured.  ``form`` is known once it was traced; None where no object takes part."""

    inputs: Inputs | None = None
    results: Results | None = field(default=None, init=False)

    @classmethod
    def of(cls, model: nn.Module, args: Args, kwargs: Mapping[str, Any], run: Callable[..., Any] | None) -> Calls:
        """``run`` calls a model so that it stays as it is, which is done once, with copies, where objects or lists are passed
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
        is_plain = not (self.inputs.has_objects or self.results.objects or self.results.has_state or self.results.states)
        return None if is_plain else Form(self.inputs, self.results)

    @property
    def has_objects(self) -> bool:
        return self.inputs is not None and self.inputs.has_objects

    def flat(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.inputs is None or not self.inputs.has_objects:
            return args, kwargs
        taken = take(self.inputs, args, kwargs)
        return taken.args, taken.kwargs

    @contextmanager
    def traced(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model as torch.export calls it: with leaves for objects, and leaves of objects for its outputs."""
        if self.inputs is None:
            yield model
            return
        inputs, forward, before = self.inputs, model.forward, vars(model).get("forward")

        @functools.wraps(forward)
        def flat(*args: Any, **kwargs: Any) -> Any:
            own_args, own_kwargs, build, leaves = _put_together(inputs, args, kwargs, clones=True)
            out, self.results = _apart(inputs, forward(*own_args, **own_kwargs), build, leaves)
            return out

        model.forward = flat
        try:
            yield model
        finally:
            if before is None:
                del model.forward
            else:
                model.forward = before


def _inputs_of(
    model: nn.Module, args: Args, kwargs: Mapping[str, Any], found: Inputs | None = None
) -> Inputs | None:
    """What stands among the inputs; ``found`` as far as that is known by now; None where they do not fit the model."""
    from attnopt.calling import Signature

    names = tuple(n for p in (Signature.of(model.forward, args, kwargs),) for n in (*p.positional, *p.keywords))
    if len(set(names)) != len(args) + len(kwargs):
        return None
    made = found or Inputs(names, len(args), (), (), ())
    walk, places = Walk(counters=made.counters), list[tuple[Path, Part]]()

    def look(x: Any, path: Path) -> None:
        places.append((path, walk.part(x, path) if made.stop(x, path) else walk.leaf(x, path)))

    mapped(made.named(args, kwargs), made.stop, look)
    return replace(made, places=tuple(places), nodes=tuple(walk.nodes), paths=tuple(walk.paths))


def _watched(
    model: nn.Module, inputs: Inputs, args: Args, kwargs: Mapping[str, Any], run: Callable[..., Any]
) -> Inputs:
    """The inputs with what a call of the model changes in them: lists, numbers and tensors."""
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
    """Axes in objects that the call makes longer, or that are as long as one of an input: its batch, or what it masks."""
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


def _tensors(tree: Any) -> list[tuple[Path, Tensor]]:
    walk = Walk()
    mapped(tree, lambda x, _: is_object(x), lambda x, p: walk.part(x, p) if is_object(x) else walk.leaf(x, p))
    return [(path, x) for path, x in zip(walk.paths, walk.leaves, strict=True) if isinstance(x, Tensor)]

def _lists(tree: Any) -> list[tuple[Path, Any]]:
    """The lists and dicts of a tree of values, beside the one of the arguments themselves."""
    found: list[tuple[Path, Any]] = []

    def look(x: Any, path: Path) -> bool:
        if path and isinstance(x, (list, dict)) and not is_object(x) and type(x) in (list, dict):
            found.append((path, x))
        return is_object(x)

    mapped(tree, look, lambda x, _: x)
    return found


def _content(x: Any) -> list[Any]:
    return [i for pair in x.items() for i in pair] if isinstance(x, dict) else list(x)


def _same_objects(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(
        a is b or (not isinstance(a, Tensor) and type(a) is type(b) and isinstance(a, (int, float, str)) and a == b)
        for a, b in zip(now, before, strict=True)
    )


def _numbers(tree: Any) -> dict[Path, int]:
    walk, plain = Walk(), dict[Path, Any]()

    def look(x: Any, path: Path) -> Any:
        if is_object(x):
            return walk.part(x, path)
        plain[path] = x
        return None

    mapped(tree, lambda x, _: is_object(x), look)
    return {p: x for p, x in {**plain, **walk.fixed}.items() if isinstance(x, int) and not isinstance(x, bool)}


def _apart(inputs: Inputs, out: Any, build: Build, leaves: list[Any]) -> tuple[Any, Results]:
    """The output with the tensors of its objects in their places, and what it takes to put them together."""
    objects = [build.made[i] for i in range(len(inputs.nodes))]
    passed = {id(x): i for i, x in enumerate(leaves) if isinstance(x, (Tensor, *NUMBERS))}
    walk = Walk(given={id(x): i for i, x in enumerate(objects)}, passed=passed)
    parts, outer = list[Part](), list[int]()

    def stop(x: Any, _: Path) -> bool:
        return is_object(x) or id(x) in walk.given

    def look(x: Any, path: Path) -> Any:
        if not stop(x, path):
            walk.leaf(x, path)
            outer.append(len(path))
            return x
        start = len(walk.leaves)
        parts.append(walk.part(x, path))
        outer.extend([len(path)] * (len(walk.leaves) - start))
        labels = _labels([p[len(path) :] for p in walk.paths[start:]])
        return Parts(zip(labels, walk.leaves[start:], strict=True))

    made = mapped(out, stop, look)
    visible = len(walk.leaves)
    states = [(i, walk.node(x, inputs.homes[i])) for i, x in enumerate(objects)]
    changed = tuple((i, node) for i, node in states if node != _as_given(inputs.nodes[i]))
    writes = tuple((i, walk.leaf(leaves[i], inputs.paths[i]).place) for i in inputs.writes)
    outer += [len(p) - len(_inner(p, inputs.places)) for p in walk.paths[visible:]]
    results = Results(tuple(walk.nodes), tuple(parts), changed, writes, tuple(walk.paths), tuple(outer), visible)
    if results.has_state:
        made = (made, Parts(zip(_labels(walk.paths[visible:]), walk.leaves[visible:], strict=True)))
    return made, results


def shapes_for(calls: Calls, model: nn.Module, args: Args, kwargs: Mapping[str, Any], shapes: Any, auto: bool) -> Any:
    """Dynamic shapes for the leaves of objects: those that are given for one count for every tensor in it.

    ``auto``: every axis that may vary, and every number that the call changes."""
    inputs = calls.inputs
    if inputs is None or not inputs.has_objects or not isinstance(shapes, Mapping):
        return shapes
    flat_args, flat_kwargs = calls.flat(args, dict(kwargs))
    flat = inspect.signature(model.forward).bind(*flat_args, **flat_kwargs).arguments
    own = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    leaves = {label: i for i, label in enumerate(inputs.labels)}

    def spread(x: Any, apart: Any, asked: Any) -> Any:
        if is_object(x) or (isinstance(apart, dict) and not isinstance(x, dict)):
            return {label: _of_leaf(inputs, leaves[label], leaf, asked, auto) for label, leaf in apart.items()}
        if isinstance(x, (list, tuple)) and isinstance(asked, (list, tuple)):
            return type(asked)(spread(*i) for i in zip(x, apart, asked, strict=True))
        if isinstance(x, dict) and isinstance(asked, dict):
            return {k: spread(x[k], apart[k], asked.get(k)) for k in x}
        return asked

    return {name: spread(x, flat[name], shapes.get(name)) for name, x in own.items()}


def _of_leaf(inputs: Inputs, place: int, leaf: Any, asked: Any, auto: bool) -> Any:
    path = inputs.paths[place]
    if auto and isinstance(leaf, Tensor):
        return {axis: Dim.AUTO for axis in range(leaf.dim()) if (path, axis) in inputs.varying} or None
    for key in _inner(path, inputs.places):
        if isinstance(asked, (list, tuple)) and isinstance(key, int):
            asked = asked[key]
        elif isinstance(asked, Mapping) and isinstance(asked.get(key, 0), (Mapping, list, tuple, type(None))):
            asked = asked[key]
    if not isinstance(leaf, Tensor):
        return Dim.AUTO if path in inputs.counters and (auto or asked) else None
    if not isinstance(asked, Mapping):
        return None
    return {axis: dim for axis, dim in asked.items() if isinstance(axis, int) and axis < leaf.dim()} or None
