"""Policy files: YAML or JSON, small, without aliases, tags or duplicate keys."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from attnopt.base.atomic_files import atomic_write
from attnopt.base.notation import distinct
from attnopt.errors import PolicyError

if TYPE_CHECKING:
    import yaml

SUFFIXES = (".yaml", ".yml", ".json")
LARGEST = 1 << 20  # bytes
DEEPEST = 100  # nested collections; the YAML parser is quadratic in this
LONGEST_NUMBER = 400  # characters; the time for YAML's numbers of base 60 grows with the square of it
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def read_file(path: Path) -> object:
    """The plain data in a policy file.  Raises PolicyError that names the file."""
    _check_suffix(path)
    try:
        text = _text(path)
    except (OSError, ValueError) as error:  # invalid UTF-8, and paths with a NUL, are ValueErrors
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise PolicyError(f"{path}: cannot be read: {why}") from error
    try:
        return _json(text) if path.suffix == ".json" else _yaml(text)
    except RecursionError as error:
        raise PolicyError(f"{path}: is nested too deeply") from error
    except (PolicyError, ValueError, OverflowError) as error:
        raise PolicyError(f"{path}: {error}") from error


def write_file(path: Path, data: object) -> None:
    """What ``read_file`` reads back.  Raises PolicyError for another name, ArchiveError if it cannot be written."""
    _check_suffix(path)
    text = json.dumps(data, indent=2) if path.suffix == ".json" else _to_yaml(data)
    with atomic_write(path) as made:
        made.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def _to_yaml(data: object) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    written: str = yaml.dump(data, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=120)
    return written


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise PolicyError(f"{path}: the name of a policy file must end in {', '.join(SUFFIXES)}")


def _text(path: Path) -> str:
    size = path.stat().st_size
    if not path.is_file():  # reading a pipe or a device could block or never end
        raise OSError("it is not a regular file")
    if size > LARGEST:
        raise PolicyError(f"{path}: too large for a policy: {size} bytes, at most {LARGEST} are read")
    return path.read_text(encoding="utf-8")


def _json(text: str) -> object:
    data = json.loads(text, object_pairs_hook=distinct, parse_int=_integer)
    level = [data]
    for _ in range(DEEPEST + 1):
        level = [v for c in level for v in (c.values() if isinstance(c, dict) else c if isinstance(c, list) else ())]
        if not level:
            return data
    raise RecursionError


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"number too long ({len(text)} characters)")
    return int(text)


def _yaml(text: str) -> object:
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {error}".expandtabs(1)) from error


@cache
def _loader() -> type[yaml.SafeLoader]:
    """Only plain YAML values, no aliases or tags."""
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            if isinstance(event, yaml.AliasEvent):
                raise _refused(event, "aliases (*name) are not supported; write the value out")
            if event.tag is not None:
                raise _refused(event, "tags (!name) are not supported; write a plain value")
            if self.depth == DEEPEST:
                raise RecursionError
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
            if node.tag in _NUMBERS and len(node.value) > LONGEST_NUMBER:
                raise _refused(node, f"number too long ({len(node.value)} characters)")
            return super().construct_object(node, deep)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):  # a duplicate key would silently lose its first value
                seen = set()
                for key, _ in node.value:
                    if (said := self.construct_object(key)) in seen:
                        raise _refused(key, f"duplicate key {said!r}")
                    seen.add(said)
            return found

    # Numbers as JSON writes them: YAML 1.1 wants a point and a sign.
    numbers = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", numbers, list("-+0123456789"))
    return Loader


def _refused(there: yaml.Node | yaml.Event, why: str) -> ValueError:
    assert there.start_mark is not None  # everything that is read from text has one
    return ValueError(f"line {there.start_mark.line + 1}: {why}")
