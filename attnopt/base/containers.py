"""Objects that hold tensors, such as caches: flattened into tensors and a template, and rebuilt."""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnopt.base.object_fields import NUMBERS, SEQUENCES, VALUES, base_of, fields_of, is_object
from attnopt.base.object_template import Fixed, Given, Kind, Leaf, Made, Node, Part, Passed
from attnopt.base.trees import Path, mapped, text
from attnopt.errors import CaptureError

T = TypeVar("T")
OF_EACH_KIND = "optimize the model once more with an example of this structure, and keep both results"
LARGEST = 100_000  # objects in one container
HINT = "use a cache that holds only tensors, numbers, and plain lists or dicts of them"


@dataclass
class Walk:
    """Flattens objects.  ``given`` and ``passed``: what the caller passed in, by its identity.

    ``counters`` are the paths of numbers that are leaves; all other numbers are constant."""

    given: Mapping[int, int] = field(default_factory=dict)
    passed: Mapping[int, int] = field(default_factory=dict)
    counters: frozenset[Path] = frozenset()
    nodes: list[Node] = field(default_factory=list)
    objects: list[object] = field(default_factory=list)  # of the nodes, which keeps their identities theirs
    leaves: list[object] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)  # of the leaves
    fixed: dict[Path, object] = field(default_factory=dict)
    _seen: dict[int, Part] = field(default_factory=dict)

    def leaf(self, x: object, path: Path) -> Leaf:
        made = Leaf(len(self.leaves))
        self.leaves.append(x)
        self.paths.append(path)
        if isinstance(x, (Tensor, *NUMBERS)):
            self._seen.setdefault(id(x), made)
        return made

    def part(self, x: object, path: Path) -> Part:
        """Raises CaptureError for anything whose identity or content a copy would not preserve."""
        if isinstance(x, (Tensor, *NUMBERS)):
            if id(x) in self.passed:
                return Passed(self.passed[id(x)])
            return self._seen.get(id(x)) or self.leaf(x, path)
        if isinstance(x, (types.MethodType, weakref.ref)):
            raise CaptureError(
                f"{text(path)} refers to another object, which a copy of its owner would share", hint=HINT
            )
        found = None if isinstance(x, VALUES) else fields_of(x)
        if found is None:
            if path in self.counters:
                return self.leaf(x, path)
            self.fixed[path] = x
            return Fixed(x)
        if id(x) in self.given:
            return Given(self.given[id(x)])
        return self._seen.get(id(x)) or self._object(x, path)

    def _object(self, x: object, path: Path) -> Made:
        if len(self.nodes) == LARGEST:
            raise CaptureError(f"{text(path[:1])} contains more than {LARGEST} objects", hint=HINT)
        made = Made(len(self.nodes))
        self._seen[id(x)] = made
        self.nodes.append(Node(Kind.of(type(x)), (), ()))
        self.objects.append(x)
        self.nodes[made.place] = self.node(x, path)
        return made

    def node(self, x: object, path: Path) -> Node:
        """The current contents of an object."""
        found = fields_of(x)
        assert found is not None
        attributes, items = found
        return Node(
            Kind.of(type(x)),
            tuple((name, self.part(value, (*path, name))) for name, value in attributes.items()),
            tuple((key, self.part(value, (*path, key))) for key, value in items),
        )


@dataclass
class Match:
    """Compares objects with a template, and finds their leaves.  Raises CaptureError if they differ."""

    nodes: Sequence[Node]
    given: Sequence[object] = ()
    passed: Sequence[object] = ()
    ignores_dtypes: bool = False
    objects: dict[int, object] = field(default_factory=dict)
    leaves: dict[int, object] = field(default_factory=dict)

    def part(self, part: Part, x: object, path: Path) -> None:
        match part:
            case Leaf(place):
                self._leaf(place, x, path)
            case Passed(place):
                self._same(x, self.passed[place], path)
            case Given(place):
                self._same(x, self.given[place], path)
            case Fixed(value):
                if not (Fixed(x) == part or (self.ignores_dtypes and isinstance(value, torch.dtype))):
                    raise differs(path, x, value)
            case Made(place):
                if place in self.objects:
                    self._same(x, self.objects[place], path)
                    return
                self.objects[place] = x
                self.node(self.nodes[place], x, path)

    def node(self, node: Node, x: object, path: Path) -> None:
        found = None if isinstance(x, VALUES) else fields_of(x)
        if found is None or Kind.of(type(x)) != node.kind:
            raise differs(path, x, node.kind.name.rpartition(":")[2])
        attributes, items = found
        for what, wanted, there in ((".", node.attributes, attributes), ("[", node.items, dict(items))):
            names = {name for name, _ in wanted}
            if names != set(there):
                odd = sorted(map(str, names ^ set(there)))
                raise CaptureError(
                    f"{text(path)} has {len(there)} {'attributes' if what == '.' else 'items'}, captured with "
                    f"{len(wanted)}; only one of them has {', '.join(odd[:3])}",
                    hint=OF_EACH_KIND,
                )
            for name, part in wanted:
                self.part(part, there[name], (*path, name))

    def _leaf(self, place: int, x: object, path: Path) -> None:
        if self.leaves.setdefault(place, x) is not x and not (isinstance(x, int) and self.leaves[place] == x):
            raise CaptureError(
                f"{text(path)} shared its tensor with another input at capture, but does not now", hint=OF_EACH_KIND
            )

    def _same(self, x: object, wanted: object, path: Path) -> None:
        if x is not wanted and not (isinstance(x, (int, float)) and x == wanted):
            raise CaptureError(f"{text(path)} is not the same object as at capture", hint=OF_EACH_KIND)


def differs(path: Path, found: object, wanted: object) -> CaptureError:
    shown = type(found).__name__ if is_object(found) or isinstance(found, Tensor) else repr(found)[:60]
    told = wanted if isinstance(wanted, str) else repr(wanted)[:60]
    return CaptureError(f"{text(path)} is {shown}, captured with {told}", hint=OF_EACH_KIND)


@dataclass
class Build:
    """Puts objects together from a template and leaves."""

    nodes: Sequence[Node]
    leaves: Sequence[object]
    given: Sequence[object] = ()
    passed: Sequence[object] = ()
    made: dict[int, object] = field(default_factory=dict)

    def part(self, part: Part) -> Any:
        match part:
            case Leaf(place):
                return self.leaves[place]
            case Passed(place):
                return self.passed[place]
            case Given(place):
                return self.given[place]
            case Fixed(value):
                return value
            case Made(place):
                return self.made[place] if place in self.made else self._make(place)

    def _make(self, place: int) -> object:
        node = self.nodes[place]
        cls = node.kind.cls
        assert cls is not None
        base: Any = base_of(cls)
        if issubclass(cls, tuple):
            items = [self.part(part) for _, part in node.items]
            self.made[place] = base.__new__(cls, items)
            return self.made[place]
        self.made[place] = made = base.__new__(cls)
        if base is deque:
            base.__init__(made, maxlen=self.part(dict(node.attributes)["maxlen"]))
        self.fill(made, node)
        return made

    def fill(self, x: object, node: Node) -> None:
        """Set the contents of an object to exactly those of ``node``."""
        attributes = {name: self.part(part) for name, part in node.attributes}
        items = [(key, self.part(part)) for key, part in node.items]
        if isinstance(x, deque):
            del attributes["maxlen"]
        there = fields_of(x)
        assert there is not None
        for name in there[0]:
            if name not in attributes and name != "maxlen":
                object.__delattr__(x, name)
        for name, value in attributes.items():
            object.__setattr__(x, name, value)
        if isinstance(x, SEQUENCES):
            x.clear()
            x.extend(value for _, value in items)
        elif isinstance(x, dict):
            base = OrderedDict if isinstance(x, OrderedDict) else dict
            base.clear(x)
            for key, value in items:
                base.__setitem__(x, key, value)


def tensors_in(output: object) -> list[Tensor]:
    """Every tensor of a tree of values and of the objects in it, each once."""
    walk = Walk()
    mapped(
        output, lambda x, _: is_object(x), lambda x, path: walk.part(x, path) if is_object(x) else walk.leaf(x, path)
    )
    return [x for x in walk.leaves if isinstance(x, Tensor)]


def copied(inputs: T) -> T:
    """A tree of values with copied tensors and objects."""
    walk = Walk()
    tree = mapped(
        inputs, lambda x, _: is_object(x), lambda x, path: walk.part(x, path) if is_object(x) else walk.leaf(x, path)
    )
    build = Build(walk.nodes, [x.clone() if isinstance(x, Tensor) else x for x in walk.leaves])
    made: T = mapped(tree, lambda _, __: False, lambda part, _: build.part(part))
    return made
