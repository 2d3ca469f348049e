"""Objects that hold tensors, such as caches: flattened into tensors and a template, and rebuilt."""

from __future__ import annotations

import dataclasses
import enum
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.errors import CaptureError

T = TypeVar("T")
Path = tuple[Any, ...]  # of attributes, keys and indices
OF_EACH_KIND = "optimize the model once more with an example of this structure, and keep both results"
NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)
LARGEST = 100_000  # objects in one container

_VALUES = (
    Tensor, bool, int, float, complex, str, bytes, type(None), type(...), type, enum.Enum, range, slice, frozenset, set,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, *NUMBERS, nn.Module, types.ModuleType,
    types.FunctionType, types.BuiltinFunctionType,
)  # fmt: skip
_SEQUENCES, _MAPPINGS = (list, deque), (dict, OrderedDict)
_OWN_FIELDS = (object, *_SEQUENCES, tuple, torch.Size, *_MAPPINGS)
HINT = "use a cache that holds only tensors, numbers, and plain lists or dicts of them"


@dataclass(frozen=True)
class Leaf:
    """A tensor or number, by its index among the leaves."""

    place: int


@dataclass(frozen=True)
class Passed:
    """A tensor or number passed by the caller, by its index among the leaves of the input."""

    place: int


@dataclass(frozen=True)
class Made:
    """An object, by its index among the nodes of the template."""

    place: int


@dataclass(frozen=True)
class Given:
    """An object passed by the caller, by its index among the nodes of the input."""

    place: int


@dataclass(frozen=True)
class Fixed:
    """A value that is the same at every call."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fixed) and _equal(other.value, self.value)

    def __hash__(self) -> int:
        return hash(type(self.value))


Part = Leaf | Passed | Made | Given | Fixed


@dataclass(frozen=True)
class Kind:
    """A class by name; ``cls`` is None if it was read from a file and must not be instantiated."""

    name: str
    cls: type | None = field(default=None, compare=False)

    @classmethod
    def of(cls, found: type) -> Kind:
        return cls(f"{found.__module__}:{found.__qualname__}", found)


@dataclass(frozen=True)
class Node:
    """An object: its attributes by name, and its items as a sequence or a mapping."""

    kind: Kind
    attributes: tuple[tuple[str, Part], ...]
    items: tuple[tuple[Any, Part], ...]

    def parts(self) -> Iterator[tuple[object, Part]]:
        yield from self.attributes
        yield from self.items


def is_object(x: object) -> bool:
    """Neither a value nor a tree of values that torch.export flattens: it may hold tensors."""
    if isinstance(x, _VALUES):
        return False
    if pytree.tree_is_leaf(x):
        return type(x) not in pytree.CONSTANT_NODES and _fields(x) is not None
    return not isinstance(x, (tuple, *_SEQUENCES, *_MAPPINGS)) and not dataclasses.is_dataclass(x)


def mapped(x: object, stop: Callable[[object, Path], bool], f: Callable[[Any, Path], object], path: Path = ()) -> Any:
    """A tree of values with ``f`` applied to each leaf; ``stop`` marks leaves that torch would enter."""
    if stop(x, path) or pytree.tree_is_leaf(x):
        return f(x, path)
    children, spec = pytree.tree_flatten(x, is_leaf=lambda y: y is not x)
    keys = _keys(x, len(children))
    made = [mapped(c, stop, f, (*path, key)) for key, c in zip(keys, children, strict=True)]
    return pytree.tree_unflatten(made, spec)


def in_lists(x: object, f: Callable[[Any], object]) -> Any:
    """``f`` of each leaf in torch.export's notation of dynamic shapes, in which classes of a library's own are lists."""
    if pytree.tree_is_leaf(x):
        return f(x)
    children, spec = pytree.tree_flatten(x, is_leaf=lambda y: y is not x)
    made = [in_lists(c, f) for c in children]
    known = type(x) in (list, tuple, deque, dict, OrderedDict, defaultdict) or hasattr(x, "_fields")
    return pytree.tree_unflatten(made, spec) if known else made


def _keys(x: object, count: int) -> Sequence[object]:
    if isinstance(x, Mapping) and len(x) == count:
        return list(x)
    if dataclasses.is_dataclass(x):
        names = [f.name for f in dataclasses.fields(x)]
        if len(names) == count:
            return names
    return list(getattr(x, "_fields", range(count)))


def base_of(cls: type) -> type | None:
    """The built-in class that creates the instances of ``cls``; None if it has hidden state."""
    for c in cls.__mro__:
        if c in _OWN_FIELDS:
            return c
        if isinstance(vars(c).get("__new__"), types.BuiltinFunctionType):
            return None
    return None


def _fields(x: object) -> tuple[dict[str, object], list[tuple[object, object]]] | None:
    """(attributes, items) of an object; None for one that cannot be looked into."""
    if base_of(type(x)) is None:
        return None
    attributes = dict(vars(x)) if hasattr(x, "__dict__") else {}
    slots = [s for c in type(x).__mro__ for s in _slots(c)]
    attributes.update({s: getattr(x, s) for s in slots if hasattr(x, s)})
    if isinstance(x, deque):
        return {**attributes, "maxlen": x.maxlen}, list(enumerate(x))
    if isinstance(x, (list, tuple)):
        return attributes, list(enumerate(x))
    if isinstance(x, dict):
        return attributes, list(x.items())
    return (attributes, []) if slots or hasattr(x, "__dict__") else None


def _slots(cls: type) -> tuple[str, ...]:
    found = vars(cls).get("__slots__", ()) if cls not in _OWN_FIELDS else ()
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(
        f"_{cls.__name__.lstrip('_')}{n}" if n.startswith("__") and not n.endswith("__") else n
        for n in names
        if n not in ("__dict__", "__weakref__")
    )


def text(path: Path) -> str:
    """A path in Python notation."""
    parts = [f"[{p!r}]" if not isinstance(p, str) or not p.isidentifier() else f".{p}" for p in path]
    return "".join(parts).removeprefix(".")


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
        found = None if isinstance(x, _VALUES) else _fields(x)
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
        found = _fields(x)
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
        found = None if isinstance(x, _VALUES) else _fields(x)
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


def _equal(x: object, wanted: object) -> bool:
    if x is wanted:
        return True
    if type(x) is not type(wanted) or isinstance(x, Tensor):
        return False
    try:
        return bool(x == wanted) or (isinstance(x, float) and x != x and wanted != wanted)
    except Exception:
        return False


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
        there = _fields(x)
        assert there is not None
        for name in there[0]:
            if name not in attributes and name != "maxlen":
                object.__delattr__(x, name)
        for name, value in attributes.items():
            object.__setattr__(x, name, value)
        if isinstance(x, _SEQUENCES):
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
