"""The form of a call with objects, as plain data: a file may name classes, but only known ones are instantiated.

Reading calls no code of a class: instances only get their attributes, which are tensors of the graph,
numbers, text, and objects of the same kind.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from attnopt.base.object_template import Fixed, Given, Kind, Leaf, Made, Node, Part, Passed
from attnopt.base.trees import Path
from attnopt.capture.flat_call import Form, InputForm, Results
from attnopt.errors import ArchiveError

_BUILTIN = {Kind.of(c).name: c for c in (list, dict, tuple, OrderedDict, deque, torch.Size)}
_CACHES = ("Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin", "DummyLayer")  # of transformers.cache_utils
_REFERENCES: dict[str, type[Leaf | Passed | Made | Given]] = {
    "leaf": Leaf, "passed": Passed, "made": Made, "given": Given,
}  # fmt: skip
Resolve = Callable[[str], type]


def form_to_json(form: Form) -> dict[str, object]:
    """Raises ArchiveError for anything that could not be loaded without running code."""
    inputs, results = form.inputs, form.results
    return {
        "names": list(inputs.names),
        "positional": inputs.positional,
        "places": [[_path(path), _part(part)] for path, part in inputs.places],
        "nodes": [_node(n) for n in inputs.nodes],
        "paths": [_path(p) for p in inputs.paths],
        "stops": sorted(map(_path, inputs.stops), key=str),
        "writes": list(inputs.writes),
        "counters": sorted(map(_path, inputs.counters), key=str),
        "results": {
            "nodes": [_node(n) for n in results.nodes],
            "objects": [_part(p) for p in results.objects],
            "states": [[place, _node(n)] for place, n in results.states],
            "writes": [list(w) for w in results.writes],
            "paths": [_path(p) for p in results.paths],
            "outer": list(results.outer),
            "visible": results.visible,
        },
    }


def form_from_json(data: Mapping[str, Any], classes: Iterable[type] = ()) -> Form:
    """``classes``: the user's own, which may be instantiated, too.  Raises ArchiveError for any other class."""
    made = data["results"]
    resolve = partial(_resolved, {Kind.of(c).name: c for c in classes})
    inputs = InputForm(
        names=tuple(map(str, data["names"])),
        positional=int(data["positional"]),
        places=tuple((_path_of(path), _part_of(part, resolve)) for path, part in data["places"]),
        nodes=tuple(_node_of(n, resolve) for n in data["nodes"]),
        paths=tuple(map(_path_of, data["paths"])),
        stops=frozenset(map(_path_of, data["stops"])),
        writes=tuple(map(int, data["writes"])),
        counters=frozenset(map(_path_of, data["counters"])),
    )
    results = Results(
        nodes=tuple(_node_of(n, resolve, is_made=True) for n in made["nodes"]),
        objects=tuple(_part_of(p, resolve) for p in made["objects"]),
        states=tuple((int(place), _node_of(n, resolve)) for place, n in made["states"]),
        writes=tuple((int(to), int(place)) for to, place in made["writes"]),
        paths=tuple(map(_path_of, made["paths"])),
        outer=tuple(map(int, made["outer"])),
        visible=int(made["visible"]),
    )
    return Form(inputs, results)


def _node(node: Node) -> dict[str, object]:
    def entries(found: Iterable[tuple[object, Part]]) -> list[object]:
        return [[_key(key), _part(part, f"{node.kind.name}.{key}")] for key, part in found]

    return {"kind": node.kind.name, "attributes": entries(node.attributes), "items": entries(node.items)}


def _part(part: Part, where: str = "an input") -> list[object]:
    if not isinstance(part, Fixed):
        return [next(name for name, kind in _REFERENCES.items() if isinstance(part, kind)), part.place]
    match part.value:
        case None | bool() | int() | float() | str() as plain:
            return ["value", plain]
        case torch.dtype() as dtype:
            return ["dtype", str(dtype).removeprefix("torch.")]
        case torch.device() as device:
            return ["device", str(device)]
        case type() as cls:
            return ["class", Kind.of(cls).name]
    raise ArchiveError(
        f"{where} is a {type(part.value).__name__}, which cannot be saved without pickling",
        hint="let the inputs and outputs of the model hold only tensors, numbers, strings, and lists or dicts of them",
    )


def _key(key: object) -> str | int:
    if isinstance(key, (str, int)) and not isinstance(key, bool):
        return key
    raise ArchiveError(f"key {key!r} cannot be saved: keys must be strings or integers")


def _path(path: Path) -> list[str | int]:
    return [_key(p) for p in path]


def _path_of(data: Iterable[object]) -> Path:
    return tuple(p if isinstance(p, int) else str(p) for p in data)


def _node_of(data: Mapping[str, Any], resolve: Resolve, is_made: bool = False) -> Node:
    name = str(data["kind"])
    for key, _ in data["attributes"]:
        if not str(key).isidentifier() or str(key).startswith("__"):
            raise ArchiveError(f"a file may not set the attribute {key!r}")
    return Node(
        Kind(name, resolve(name) if is_made else None),
        tuple((str(key), _part_of(part, resolve)) for key, part in data["attributes"]),
        tuple((key if isinstance(key, int) else str(key), _part_of(part, resolve)) for key, part in data["items"]),
    )


def _part_of(data: Any, resolve: Resolve) -> Part:
    name, value = data
    if name in _REFERENCES:
        return _REFERENCES[name](int(value))
    match name, value:
        case "value", None | bool() | int() | float() | str():
            return Fixed(value)
        case "dtype", str() if isinstance(dtype := getattr(torch, value, None), torch.dtype):
            return Fixed(dtype)
        case "device", str():
            return Fixed(torch.device(value))
        case "class", str():
            return Fixed(resolve(value))
    raise ArchiveError(f"a file may not contain the value {str(data)[:60]!r}")


def _resolved(own: Mapping[str, type], name: str) -> type:
    """The class of this name: a plain list or dict, a cache of transformers, or one of the user's."""
    found = own.get(name) or _BUILTIN.get(name) or _cache_class(name)
    if found is None:
        raise ArchiveError(
            f"the model returns a {name}, and load() does not instantiate classes named by a file",
            hint=f"pass the class: attnopt.load(path, classes=[{name.rpartition(':')[2]}])",
        )
    return found


def _cache_class(name: str) -> type | None:
    """A transformers cache class, or a part of one."""
    if re.fullmatch(r"transformers(\.\w+)+:\w+", name) is None:
        return None
    module, _, attribute = name.partition(":")
    with contextlib.suppress(Exception):
        found = getattr(importlib.import_module(module), attribute, None)
        known = importlib.import_module("transformers.cache_utils")
        roots = tuple(c for c in (getattr(known, n, None) for n in _CACHES) if isinstance(c, type))
        if isinstance(found, type) and issubclass(found, roots) and Kind.of(found).name == name:
            return found
    return None
