"""Calls with objects among their inputs and outputs, such as caches, in the form of a graph: only their tensors.

A graph takes and returns tensors.  Objects are flattened on input and rebuilt on output, and what the call
changes in the caller's own objects is written there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.base.call_inputs import CallInputs
from attnopt.base.containers import Build, Match
from attnopt.base.object_fields import is_object
from attnopt.base.object_template import Given, Leaf, Made, Node, Part, Passed
from attnopt.base.trees import Path, mapped, text
from attnopt.errors import CaptureError

Args = tuple[object, ...]
Kwargs = dict[str, object]


class OtherObjectsError(CaptureError):
    """The model builds other objects from these inputs than at capture."""


class Parts(dict[str, object]):
    """The tensors of one object in the output of a graph."""


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
class InputForm:
    """Objects among the inputs: ``places`` are the leaves of the tree of arguments, ``paths`` those of its tensors.

    ``writes``: leaves that the call writes.  ``counters``: numbers that the call changes.  ``varying``: axes of leaves
    whose size may differ between calls."""

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

    def stop(self, x: object, path: Path) -> bool:
        return path in self.stops or is_object(x)

    def named(self, args: Args, kwargs: Mapping[str, object]) -> Kwargs:
        return dict(zip(self.names, (*args, *(kwargs[n] for n in self.names[self.positional :])), strict=True))

    def split(self, named: Mapping[str, object]) -> CallInputs:
        values = list(named.items())
        return CallInputs(tuple(v for _, v in values[: self.positional]), dict(values[self.positional :]))

    def is_inside(self, place: int) -> bool:
        """The leaf is part of an object."""
        return self.paths[place] not in {path for path, part in self.places if isinstance(part, Leaf)}

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Names for the leaves of objects."""
        return labels_of([inner_path(path, self.places) for path in self.paths])

    @functools.cached_property
    def homes(self) -> dict[int, Path]:
        """Where each object was met first."""
        found: dict[int, Path] = {}

        def look(part: Part, path: Path) -> None:
            if isinstance(part, Made) and part.place not in found:
                found[part.place] = path
                for key, inner in self.nodes[part.place].parts():
                    look(inner, (*path, key))

        for place, part in self.places:
            look(part, place)
        return found


@dataclass(frozen=True)
class Results:
    """The results of a call: ``objects`` among its outputs, ``states`` of the caller's objects that it changes, ``writes`` from
    its leaves to the inputs'.  ``paths`` are those of its leaves, ``outer`` how much of each leads to the object it is in."""

    nodes: tuple[Node, ...]
    objects: tuple[Part, ...]
    states: tuple[tuple[int, Node], ...]
    writes: tuple[tuple[int, int], ...]
    paths: tuple[Path, ...]
    outer: tuple[int, ...]
    visible: int  # leaves of the output; the others belong to states and writes

    @property
    def has_state(self) -> bool:
        return len(self.paths) > self.visible


@dataclass(frozen=True)
class Taken:
    """The flattened inputs of one call."""

    inputs: CallInputs
    objects: tuple[object, ...]
    leaves: tuple[Any, ...]


@dataclass(frozen=True)
class Form:
    """How a graph represents a call with objects."""

    inputs: InputForm
    results: Results

    def take(self, args: Args, kwargs: Mapping[str, object]) -> Taken:
        """The inputs of the graph.  Raises CaptureError if their structure differs from the example."""
        return take(self.inputs, args, kwargs)

    def give(self, out: Any, taken: Taken) -> object:
        """The output of the model, built from that of the graph; the caller's objects are updated."""
        leaves = _kept_apart(pytree.tree_leaves(out), self.results, taken)
        build = Build(self.results.nodes, leaves, taken.objects, taken.leaves)
        parts, plain = iter(self.results.objects), iter(leaves)

        def back(x: object, _: Path) -> object:
            if not isinstance(x, Parts):
                return next(plain)
            for _name in x:
                next(plain)
            return build.part(next(parts))

        made = mapped(out[0] if self.results.has_state else out, lambda x, _: isinstance(x, Parts), back)
        for place, node in self.results.states:
            build.fill(taken.objects[place], node)
        with torch.no_grad():
            for to, place in self.results.writes:
                taken.leaves[to].copy_(leaves[place])
        return made

    def run(self, model: nn.Module, args: Args, kwargs: Mapping[str, object]) -> list[object]:
        """The leaves of the graph as computed by the model itself, from the inputs of the graph.

        Raises OtherObjectsError if the model builds other objects than at capture."""
        own_args, own_kwargs, build, leaves = put_together(self.inputs, args, kwargs)
        versions = [_version(x) for x in leaves]
        out = model(*own_args, **own_kwargs)
        try:
            return self._leaves(out, build, leaves, versions)
        except CaptureError as e:
            raise OtherObjectsError(
                str(e).partition("\n")[0], hint="optimize with example inputs of this size"
            ) from None

    def _leaves(self, out: object, build: Build, leaves: list[object], versions: list[int]) -> list[object]:
        objects = [build.made[i] for i in range(len(self.inputs.nodes))]
        match = Match(self.results.nodes, objects, leaves, ignores_dtypes=True)
        known = {id(x) for x in objects}
        parts = iter(self.results.objects)

        def look(x: object, path: Path) -> None:
            if not (is_object(x) or id(x) in known):
                match.leaves[len(match.leaves)] = x
            elif (part := next(parts, None)) is not None:
                match.part(part, x, path)

        mapped(out, lambda x, _: is_object(x) or id(x) in known, look)
        states = dict(self.results.states)
        for place, node in enumerate(self.inputs.nodes):
            match.node(states.get(place, as_given(node)), objects[place], self.inputs.homes[place])
        for to, place in self.results.writes:
            match.leaves[place] = leaves[to]
        for place, (x, before) in enumerate(zip(leaves, versions, strict=True)):
            if _version(x) != before and place not in self.inputs.writes:
                raise CaptureError(f"{text(self.inputs.paths[place])} is written to, which it was not at capture")
        return [match.leaves[i] for i in range(len(self.results.paths))]


def _version(x: object) -> int:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def as_given(node: Node) -> Node:
    """The contents of an object that a call does not change."""

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


def take(inputs: InputForm, args: Args, kwargs: Mapping[str, object]) -> Taken:
    match = Match(inputs.nodes)
    places = iter(inputs.places)

    def apart(x: object, path: Path) -> object:
        wanted, part = next(places, (None, None))
        if part is None or path != wanted or isinstance(part, Leaf) == inputs.stop(x, path):
            raise CaptureError(
                f"{text(path)} is {type(x).__name__}, but the example had a value of another type there",
                hint="pass inputs with the same structure as the example",
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
            f"called with {len(match.leaves)} values, but captured with {len(inputs.paths)}",
            hint="pass inputs with the same structure as the example",
        )
    leaves = tuple(match.leaves[i] for i in range(len(inputs.paths)))
    _check_apart(inputs, leaves)
    objects = tuple(match.objects[i] for i in range(len(inputs.nodes)))
    return Taken(inputs.split(flat), objects, leaves)


def _check_apart(inputs: InputForm, leaves: tuple[Any, ...]) -> None:
    """A graph writes into one tensor at a time: a tensor that shares the memory would keep its old values."""
    for i in inputs.writes:
        for j, other in enumerate(leaves):
            if i != j and isinstance(other, Tensor) and _overlap(leaves[i], other):
                raise CaptureError(
                    f"{text(inputs.paths[i])} is written to, but shares memory with {text(inputs.paths[j])}",
                    hint="pass tensors that do not share memory",
                )


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device or not a.numel() or not b.numel() or a.is_meta or b.is_meta:
        return False
    (first, end), (other, other_end) = _extent(a), _extent(b)
    return first < other_end and other < end


def _extent(t: Tensor) -> tuple[int, int]:
    steps = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (steps + 1) * t.element_size()


def _kept_apart(leaves: list[object], results: Results, taken: Taken) -> list[object]:
    """The graph may return its inputs: before these are written to, other results are copied."""
    written = [taken.leaves[to] for to, _ in results.writes]
    return [x.clone() if isinstance(x, Tensor) and any(_overlap(x, w) for w in written) else x for x in leaves]


def put_together(
    inputs: InputForm, args: Args, kwargs: Mapping[str, object], clones: bool = False
) -> tuple[Args, Kwargs, Build, list[object]]:
    """(args, kwargs) of the model itself, their builder, and their leaves."""
    named = inputs.named(args, kwargs)
    leaves = pytree.tree_leaves(named)
    if clones:  # so the graph reads its inputs without writing them
        leaves = [x.clone() if i in inputs.writes else x for i, x in enumerate(leaves)]
    build, parts = Build(inputs.nodes, leaves), dict(inputs.places)

    def back(_: object, path: Path) -> object:
        return build.part(parts[path])

    own = mapped(named, lambda _, path: path in parts, back)
    return *inputs.split(own), build, leaves


def labels_of(paths: list[Path]) -> tuple[str, ...]:
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


def inner_path(path: Path, places: tuple[tuple[Path, Part], ...]) -> Path:
    """The path inside the object, after that of the argument."""
    outer = [p for p, part in places if isinstance(part, Made) and path[: len(p)] == p]
    return path[max(map(len, outer)) :] if outer else path
